"""The private parts of other libraries that this one uses are there, each where it is looked for (decision 15)."""

from __future__ import annotations

import asyncio
import inspect
import socket
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any

import pytest
from fastapi import Request

PAGE = "docs/decisions/0015-private-parts-of-other-libraries.md"


def expect(library: str, owner: object, *names: str) -> None:
    """Fail with the names that ``owner`` does not have."""
    missing = [name for name in names if not hasattr(owner, name)]
    kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    assert not missing, f"{library}: {kind} has no {', '.join(missing)} any more, see {PAGE}"


def expect_written(library: str, owner: Any, *names: str) -> None:
    """Fail with the names that the code of ``owner`` does not use: only an open connection has them."""
    code = inspect.getsource(owner)
    missing = [name for name in names if name not in code]
    assert not missing, f"{library}: {owner.__name__} has no {', '.join(missing)} any more, see {PAGE}"


def test_a_part_that_is_gone_is_named():
    """So that a failure of this file says what to look for."""
    with pytest.raises(AssertionError, match="any: object has no _gone any more"):
        expect("any", object(), "_gone", "__class__")


def test_sqlalchemy():
    from sqlalchemy import Connection, Pool, create_engine
    from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection

    expect("SQLAlchemy", Connection, "_commit_impl", "_execute_context")
    expect("SQLAlchemy", Pool, "_invalidate")
    assert {"_checkin"} <= inspect.signature(Pool._invalidate).parameters.keys(), f"Pool._invalidate, see {PAGE}"
    expect("SQLAlchemy", AsyncAdapt_asyncpg_connection, "_start_transaction")
    expect_written("SQLAlchemy", AsyncAdapt_asyncpg_connection, "self._transaction")
    engine = create_engine("sqlite://", isolation_level="SERIALIZABLE")
    expect("SQLAlchemy", engine.dialect, "_on_connect_isolation_level")
    assert engine.dialect._on_connect_isolation_level == "SERIALIZABLE"
    expect("SQLAlchemy", Connection, "connection")
    assert isinstance(Connection.connection, property), f"SQLAlchemy: Connection.connection is no property, see {PAGE}"
    with engine.connect() as connection:
        expect("SQLAlchemy", connection.dispatch, "before_cursor_execute", "after_cursor_execute")
    engine.dispose()


async def test_aiosqlite():
    import aiosqlite
    from aiosqlite import core

    expect("aiosqlite", core, "_STOP_RUNNING_SENTINEL")
    async with aiosqlite.connect(":memory:") as connection:
        expect("aiosqlite", connection, "_conn", "_connection", "_execute", "_running", "_tx")
        assert callable(connection._tx.put_nowait)


def test_pg8000():
    from pg8000.core import CoreConnection
    from pg8000.dbapi import Connection

    expect("pg8000", Connection, "_in_transaction")
    expect_written("pg8000", CoreConnection, "self._usock")


def test_pymysql():
    from pymysql.connections import Connection

    expect("PyMySQL", Connection(defer_connect=True), "_sock")


def test_mysql_connector():
    from mysql.connector.connection import MySQLConnection
    from mysql.connector.network import MySQLSocket

    expect("mysql-connector", MySQLConnection(), "_socket")
    expect_written("mysql-connector", MySQLSocket, "self.sock")


async def test_redis():
    from redis.asyncio import Connection, ConnectionPool
    from redis.asyncio.cluster import ClusterNode, RedisCluster
    from redis.asyncio.connection import DefaultParser
    from redis.exceptions import NoScriptError
    from redis.utils import HIREDIS_AVAILABLE

    expect("redis-py", ConnectionPool(), "_available_connections", "_in_use_connections")
    expect("redis-py", Connection(), "_parser", "_reader", "_writer")
    expect("redis-py", Connection()._parser, "_reader")
    assert HIREDIS_AVAILABLE
    assert type(DefaultParser.parse_error("NOSCRIPT No matching script.")) is NoScriptError
    expect("redis-py", ClusterNode("127.0.0.1", 1), "_connections", "_free")
    expect("redis-py", RedisCluster("127.0.0.1", 1), "_initialize")


async def test_asyncio():
    """uvloop has no ``_sock``, and needs none."""
    waited = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await waited

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    expect("asyncio", task, "_fut_waiter")
    assert task._fut_waiter is waited  # type: ignore[attr-defined]
    expect("asyncio", waited, "_callbacks")
    assert [getattr(callback, "__self__", None) for callback, _ in waited._callbacks or ()] in ([task], [])
    waited.set_result(None)
    await task

    left, right = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=left)
    expect("asyncio", writer.transport, "_sock")
    writer.close()
    await writer.wait_closed()
    right.close()


async def test_exit_stacks():
    async with AsyncExitStack() as stack:
        expect("contextlib", stack, "_exit_callbacks")
        stack.push_async_callback(asyncio.sleep, 0)
        assert [is_sync for is_sync, _ in stack._exit_callbacks] == [False], f"the order of a pair, see {PAGE}"  # type: ignore[attr-defined]


async def test_fastapi():
    from fastapi import Depends, FastAPI, routing
    from fastapi.dependencies import utils

    from idempotency._http.exit_stacks import _KEYS

    app, seen = FastAPI(), set[str]()

    @app.get("/", dependencies=[Depends(lambda: None)])
    async def handler(request: Request) -> None:
        seen.update(request.scope)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    await app(scope, receive, send)
    assert not {*_KEYS} - seen, f"FastAPI: the scope has no {', '.join({*_KEYS} - seen)} any more, see {PAGE}"
    expect_written("FastAPI", routing, "_sse_producer_cm")
    expect_written("FastAPI", utils, "fastapi_async_cleanup_scopes")


def test_routes_of_frameworks():
    from fastapi import APIRouter, routing
    from werkzeug.routing import Map, Rule

    expect("FastAPI", routing, "iter_route_contexts")
    expect("FastAPI", APIRouter(), "_low_priority_routes")
    rules = Map([Rule("/<int:id>")])
    [rule] = rules.iter_rules()
    expect("werkzeug", rule, "_parts", "_trace", "_converters")
    expect("werkzeug", rule._parts[-1], "static", "weight")


def test_flask_cors():
    """Its function is found by its module."""
    from flask import Flask
    from flask_cors import CORS

    app = Flask(__name__)
    CORS(app)

    [function] = app.after_request_funcs[None]
    assert function.__module__.partition(".")[0] == "flask_cors", f"Flask-CORS: after_request, see {PAGE}"


def test_multiprocessing():
    import multiprocessing

    process = multiprocessing.Process(kwargs={"config": 1})
    expect("multiprocessing", process, "_kwargs")
    assert process._kwargs == {"config": 1}


def test_starlette():
    from starlette.datastructures import State
    from starlette.requests import Request

    expect("Starlette", Request, "_get_form")
    expect_written("Starlette", Request, "self._body")
    expect("Starlette", State({"a": 1}), "_state")


async def test_aiokafka():
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

    consumer, producer = AIOKafkaConsumer(), AIOKafkaProducer()
    try:
        expect("aiokafka", consumer, "_auto_offset_reset", "_enable_auto_commit", "_group_id")
        expect("aiokafka", producer, "_closed", "_key_serializer", "_sender", "_txn_manager", "_value_serializer")
        expect("aiokafka", producer._sender, "_acks", "close")
    finally:
        await consumer.stop()
        await producer.stop()


@pytest.mark.parametrize("name", ["rabbit.Rabbit", "kafka.Kafka", "confluent.Kafka", "nats.Nats", "redis.Redis"])
async def test_faststream(name):
    module, _, broker = name.partition(".")
    subscriber = getattr(import_module(f"faststream.{module}"), f"{broker}Broker")().subscriber("orders")

    @subscriber
    async def handler(message: str) -> None: ...

    expect("FastStream", subscriber, "_broker_middlewares", "_no_reply", "_outer_config")
    expect("FastStream", subscriber._outer_config, "broker_codec", "fd_config", "prefix")
    expect("FastStream", subscriber._outer_config.fd_config, "_serializer")
    expect("FastStream", subscriber.calls[0].handler, "_original_call", "_publishers")


def test_faststream_on_confluent():
    from faststream.confluent.helpers.client import AsyncConfluentConsumer

    expect_written("FastStream", AsyncConfluentConsumer, "self._thread_pool")


def test_nats():
    from nats.aio.client import Client

    jetstream = Client().jetstream()
    expect("nats-py", jetstream, "_nc")
    expect("nats-py", jetstream._nc, "max_payload")


def test_celery():
    from celery import Celery
    from celery.app.task import Context, Task

    expect("Celery", Context, "_protected")
    expect("Celery", Task, "__trace__", "_dump_pydantic_arguments")
    app = Celery(set_as_current=False)

    @app.task
    def bill() -> None: ...

    expect("Celery", bill, "__header__")


def test_dramatiq():
    """dramatiq calls ``after_process_message`` of the object, so that it can be replaced there."""
    from dramatiq.brokers.stub import StubBroker
    from dramatiq.middleware import Callbacks, GroupCallbacks, Pipelines
    from dramatiq.rate_limits.backends import StubBackend
    from dramatiq.results import Results

    for kind in (Callbacks, GroupCallbacks, Pipelines, Results):
        expect("dramatiq", kind, "after_process_message")
    groups = GroupCallbacks(StubBackend())
    expect("dramatiq", groups, "barrier_ttl", "rate_limiter_backend")
    called: list[Any] = []
    groups.after_process_message = lambda broker, message, **_: called.append(message)  # type: ignore[method-assign]
    StubBroker(middleware=[groups]).emit_after("process_message", "message")
    assert called == ["message"], f"dramatiq: a replaced after_process_message is not called, see {PAGE}"


def test_taskiq():
    from taskiq_dependencies import graph

    expect("taskiq", graph, "FastapiDepends")

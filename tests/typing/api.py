"""The public API as a user's type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import assert_type

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from idempotency import IdempotencyMiddleware, Policy, Problem, Profile, current, open_store
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError
from idempotency.events import Event, EventKind
from idempotency.operation import Operation
from idempotency.stores import AnyStore
from idempotency.stores.base import Entry, Store, SyncStore
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore

careful = Policy(
    ttl=timedelta(days=7),
    lease=10,
    wait=2.5,
    required=True,
    methods={"POST", "PUT"},
    on_crash="hold",
    on_store_error="fail_closed",
    outcomes={404: "release", "5xx": "hold", TimeoutError: "hold"},
    fingerprint="json",
    max_request=1 << 20,
    max_response=0,
)
assert_type(careful.ttl, float)


async def body_of(request: Request) -> bytes:
    return await request.body()


async def account_of(request: Request) -> str:
    return str(request.state.account)


def tenant_of(request: Request) -> str | None:
    return request.headers.get("X-Tenant")


def count(event: Event) -> None:
    assert_type(event.kind, EventKind)


async def create_order(request: Request) -> Response:
    operation = current()
    assert_type(operation, Operation | None)
    if operation is None:
        return JSONResponse({}, 400)
    assert_type(operation.attempt, int)
    assert_type(operation.key, str)
    assert_type(operation.derive("charge"), str)
    if operation.lost:
        return JSONResponse({}, 503)
    operation.hold()
    operation.release()
    await operation.lost
    return JSONResponse({"attempt": operation.attempt}, 201)


def to_json(problem: Problem) -> dict[str, str]:
    assert_type(problem.key, str | None)
    return {"code": problem.code}


def to_xml(problem: Problem) -> tuple[int, dict[str, str], str]:
    return problem.status, {"Content-Type": "application/xml"}, "<error/>"


app = Starlette()
app.add_middleware(IdempotencyMiddleware, store="redis://localhost:6379")
app.add_middleware(
    IdempotencyMiddleware,
    store=open_store("postgresql+asyncpg://localhost/shop"),
    policy=Policy(fingerprint=body_of),
    policies={"POST /payments/{id}": careful, "/webhooks": None},
    scope=account_of,
    secret="from the environment",
    strict=True,
    on_event=count,
)
app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), scope=tenant_of)
app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), scope="authorization", unknown_credentials="refuse")
app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), scope=tenant_of, error=to_json, echo_key=True)
app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), error=to_xml, profile=Profile.acp)
app.add_middleware(IdempotencyMiddleware, store=MemoryStore(), profile=replace(Profile.stripe, policy=careful))
app.add_middleware(IdempotencyMiddleware, store=SQLStore.from_url("sqlite+aiosqlite:///orders.db"), scope=None)
app.add_middleware(IdempotencyMiddleware, store=RedisStore.from_url("redis://localhost"))

opened = open_store("memory://")
assert_type(opened, AnyStore)
asynchronous: Store = opened
blocking: SyncStore = opened


async def settle_by_hand() -> None:
    try:
        for entry in await opened.unresolved():
            assert_type(entry, Entry)
            assert_type(await opened.resolve(entry.id, "done", b""), bool)
        assert_type(await opened.purge(), int)
    except StoreError as error:
        assert_type(error.retryable, bool)
    finally:
        await opened.aclose()


problems: list[type[IdempotencyError]] = [ConfigurationError, StoreError]

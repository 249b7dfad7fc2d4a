"""Servers for the live tests. They are shared by the tests of a session, each under keys of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.asgi_servers import STORE_TIMEOUT, Bench, Live
from tests.kit.servers import PostgresServer, RedisServer, Server
from tests.kit.targets import Target


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of the kind, number of workers and store that the test is parametrized with (``over``)."""
    kind, workers, store = request.param
    target = Target(store, request.getfixturevalue(f"{store}_url"))
    asyncio.run(target.create())
    bench = Bench(tmp_path_factory.mktemp(f"{kind}-{workers}-{store}"), target)
    (bench.directory / "file").write_bytes(bytes(range(256)) * 8192)
    with Live(kind, workers, bench) as server:
        yield server
    target.forget()
    assert not server.complaints()


@pytest.fixture(scope="session")
def private_redis() -> Iterator[RedisServer]:
    """A Redis that a test may kill and freeze, and that has its data again when it is started again."""
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


@pytest.fixture(scope="session")
def private_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that a test may kill and freeze."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def frail(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Server]]:
    """A server of the kind the test is parametrized with, and the store's server it depends on."""
    kind, store = request.param
    server: Server = request.getfixturevalue(f"private_{store}")
    target = Target(store, server.url)
    asyncio.run(target.create())
    bench = Bench(tmp_path_factory.mktemp(f"frail-{kind}-{store}"), target, {"timeout": STORE_TIMEOUT})
    with Live(kind, 1, bench) as live:
        yield live, server
    assert not live.complaints()

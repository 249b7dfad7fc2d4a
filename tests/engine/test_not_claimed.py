"""A claim that the store has certainly not applied: nothing is released, and no stop waits for it."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency._engine import background
from idempotency._engine.runner import Runner
from idempotency._engine.runner_sync import SyncRunner
from idempotency._rules import Claim
from idempotency.errors import IdempotencyError, SchemaMissingError, StoreError, StoreRefusedError
from idempotency.stores.sql import SQLStore
from idempotency.testing import FaultyStore
from tests.kit import asgi_calls, wsgi_calls
from tests.kit.servers import with_driver
from tests.kit.targets import unique_name

CLAIM = Claim(scope="s", key="k", fingerprint=b"f", lease=30.0, ttl=60.0)


def raising(error: IdempotencyError) -> FaultyStore:
    """Make a store whose first claim raises ``error``."""

    def fail() -> None:
        raise error

    return FaultyStore().order("claim", fail)


@pytest.mark.parametrize("error", [SchemaMissingError("no table"), StoreRefusedError("too large")])
async def test_what_is_not_claimed_is_not_released(error: StoreError) -> None:
    """By tasks and by threads, the store is asked once; an error that says less is followed by a release."""
    store, unsure = raising(error), raising(StoreError("no answer"))

    for each in (store, unsure):
        with pytest.raises(StoreError):
            await Runner(each, ()).claim(CLAIM)
        await background.drain()

    assert store.calls == ["claim"]
    assert unsure.calls[:2] == ["claim", "release"]


@pytest.mark.parametrize("error", [SchemaMissingError("no table"), StoreRefusedError("too large")])
def test_what_is_not_claimed_is_not_released_by_threads(error: StoreError) -> None:
    """See above."""
    store, unsure = raising(error), raising(StoreError("no answer"))

    for each in (store, unsure):
        with pytest.raises(StoreError):
            SyncRunner(each, ()).claim(CLAIM)
        background.drain_sync()

    assert store.calls == ["claim"]
    assert unsure.calls[:2] == ["claim", "release"]


async def test_a_missing_table_does_not_delay_a_stop(postgres_url: str) -> None:
    """Of either middleware: a request is refused, and nothing is pending when the process ends."""
    awaited, table = create_async_engine(with_driver(postgres_url, "postgresql+asyncpg")), unique_name("missing")
    blocking = create_engine(with_driver(postgres_url, "postgresql+psycopg"))
    asgi = asgi_calls.protect(asgi_calls.Effects(), SQLStore(awaited, table=table))
    wsgi = wsgi_calls.protect(wsgi_calls.Effects(), SQLStore(blocking, table=table))

    replies = [(await asgi_calls.call(asgi, key="k")).status, wsgi_calls.call(wsgi, key="k").status]
    pending = [asgi._runner.writing, wsgi._runner._pending.writing]
    await awaited.dispose()
    blocking.dispose()

    assert replies == [503, 503]
    assert pending == [False, False]

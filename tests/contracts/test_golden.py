"""Golden files: what each version of a format has stored is read by this version, on each store, and nothing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, inspect
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.outbox import Message, Outbox, PollingRelay, Sent
from idempotency.stores import open_store
from idempotency.stores.encryption import Encryption
from tests.contracts import golden_files
from tests.kit.targets import Target

SQL = pytest.mark.stores("sqlite", "postgres", "mariadb")
LINES = "[('a', b'\\x00\\xff')]"
ANSWERS = {
    **{f"failure {number}": "ValueError" for number in range(3)},
    **{f"consumer {number}": number for number in range(3)},
    **{f"response {number}": [201, f"order {number}", str(number)] for number in range(3)},
    **{
        f"function {number}": {
            **{"number": f"{number}", "price": f"{number}.10", "at": f"2026-01-01 12:0{number}:00+00:00"},
            **{"paid": ["0", "1", "None"][number], "lines": LINES},
        }
        for number in range(3)
    },
    **{
        f"saga {number}": {
            **{"number": f"{number}", "price": f"{number}.50", "at": "2026-01-01 00:00:00+00:00"},
            **{"paid": f"seat {number}", "lines": "[]"},
        }
        for number in range(3)
    },
}


TOOLS = {f"tool {number}": f"refunded {number}" for number in range(3)}
NAMES = {
    "records-2.json": {"charge": 3, "refuse": 3, "billing": 3, "POST other": 3},
    "tools-1.json": {"": 3},
}
"""How many records of a file have which name, where it is not that of those from before names."""


def answers_of(file: str) -> dict[str, Any]:
    return TOOLS if file.startswith("tools") else ANSWERS


async def names_in(store: Any) -> dict[str, int]:
    """Count the records of each name."""
    return dict(Counter(entry.name for entry in await store.list_records()))


@pytest.fixture
async def engine(store_target: Target) -> AsyncIterator[Any]:
    """An engine on the database of the test, whose tables of this test are removed."""
    engine = create_async_engine(store_target.url)
    yield engine
    async with engine.begin() as connection:
        for name in await connection.run_sync(lambda each: inspect(each).get_table_names()):
            if name.startswith(store_target.name):
                await connection.exec_driver_sql(f"DROP TABLE {name}")
    await engine.dispose()


@SQL
@pytest.mark.parametrize("file", list(golden_files.WRITTEN))
async def test_records_in_sql_of_every_version(store_target: Target, engine: Any, file: str, tmp_path: Path) -> None:
    """Keys, fingerprints, results, failures, responses, deliveries and sagas, in clear and encrypted."""
    async with Opened(store_target, file) as store:
        await store.create_schema()
        await store.create_saga_schema()
        load(store_target, file)

        assert await golden_files.do_all(store, tmp_path / "ledger", file) == answers_of(file)
        assert await names_in(store) == NAMES.get(file, {"": 12})
    assert (tmp_path / "ledger").read_text() == ""


@pytest.mark.stores("redis")
@pytest.mark.parametrize("file", list(golden_files.WRITTEN))
async def test_records_in_redis_of_every_version(store_target: Target, file: str, tmp_path: Path) -> None:
    """The same, on Redis."""
    with redis.Redis.from_url(store_target.url) as client:
        golden_files.load_redis(client, golden_files.read(file)["redis"], store_target.name)
    async with Opened(store_target, file) as store:
        assert await golden_files.do_all(store, tmp_path / "ledger", file) == answers_of(file)
        assert await names_in(store) == NAMES.get(file, {"": 12})
    assert (tmp_path / "ledger").read_text() == ""


def load(target: Target, file: str) -> None:
    """Insert the rows of a golden file."""
    engine = create_engine(target.sync_url)
    with engine.begin() as connection:
        golden_files.load_sql(connection, golden_files.read(file)["sql"], target.name)
    engine.dispose()


class Opened:
    """A store on a target, with the key of the golden file."""

    def __init__(self, target: Target, file: str) -> None:
        encryption = Encryption(golden_files.KEY) if file.startswith("sealed") else None
        self._store: Any = open_store(target.url, encryption=encryption, **target.options)

    async def __aenter__(self) -> Any:
        return self._store

    async def __aexit__(self, *_: object) -> None:
        await self._store.aclose()


@SQL
async def test_messages_and_events_of_version_1(store_target: Target, engine: Any) -> None:
    """The relay publishes the rows of an outbox, and events are read in the newest version of their type."""
    outbox, streams = Outbox(f"{store_target.name}_outbox"), golden_files.streams(f"{store_target.name}_event")
    await outbox.create_schema(engine)
    await streams.create_schema(engine)
    load(store_target, "messages-1.json")
    published: list[Message] = []

    class Publisher:
        delivery_timeout = 5.0

        async def publish(self, messages: list[Message]) -> list[Sent]:
            published.extend(messages)
            return [Sent() for _ in messages]

        async def aclose(self) -> None: ...

    assert await PollingRelay(engine, Publisher(), outbox=outbox).drain() == 3  # type: ignore[arg-type]
    async with engine.connect() as connection:
        events = [each async for each in streams.read(connection, "account-7")]

    assert [(each.type, each.aggregate_id, each.payload) for each in published] == [
        ("Placed", "7", b'{"id":7}'),
        ("Placed", "7", b"\0\xff"),
        ("Placed", "7", None),
    ]
    assert published[0].headers["trace"] == "ä"
    assert [(each.version, each.type, each.data, dict(each.headers)) for each in events] == [
        (1, "Paid", golden_files.Paid(500), {"by": "a"}),
        (2, "Paid", golden_files.Paid(250), {}),
    ]

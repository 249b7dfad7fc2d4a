"""Drivers: each types rows in its own way, and one that changes what it carries is refused before it holds a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import psycopg2
import psycopg2.extensions
import pymysql
import pytest
from psycopg.adapt import Loader
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import idempotent
from idempotency._rules import Claim, Execute, Record, Replay, State, judge
from idempotency.errors import ConfigurationError
from idempotency.stores.sql import SQLStore
from idempotency.stores.sql._verbs import Found, read_record
from tests.kit.servers import with_driver
from tests.kit.targets import unique_name


class OddDialect(PGDialect_psycopg2):
    """A driver whose name nobody knows."""

    driver = "odd"
    supports_statement_cache = True


class OtherDialect(DefaultDialect):
    """A database of another kind."""

    name = "other"
    driver = "odd"
    supports_statement_cache = True


registry.register("postgresql.odd", __name__, "OddDialect")
registry.register("other.odd", __name__, "OtherDialect")


def new_claim(key: str = "k") -> Claim:
    return Claim(scope="s", key=key, fingerprint=b"f" * 32, lease=30.0, ttl=60.0)


@pytest.mark.parametrize(
    "row",
    [
        Found(1, 2, "t", b"f", 3, True, 10500, 6500, 9000, b"r"),
        Found(1, 2, "t", memoryview(b"f"), 3, 1, 10500, 6500, 9000, memoryview(b"r")),
        Found(1, 2, bytearray(b"t"), bytearray(b"f"), 3, b"\x01", 10500, 6500, 9000, bytearray(b"r")),
        Found(
            Decimal(1),
            Decimal(2),
            b"t",
            b"f",
            Decimal(3),
            Decimal(1),
            Decimal(10500),
            Decimal(6500),
            Decimal(9000),
            b"r",
        ),
        Found(1, 2, memoryview(b"t"), b"f", 3, memoryview(b"\x01"), 10500.0, 6500.0, 9000.0, b"r"),
    ],
)
def test_a_row_is_read_in_whatever_types_it_comes(row: Found) -> None:
    """Bytes, text, numbers and booleans are what they are in every type that a driver gives them in."""
    record = read_record(row)

    assert record == Record(
        token="t", fingerprint=b"f", state=State.DONE, attempt=3, lease_left=1.5, hold=True, result=b"r"
    )
    assert record.age == 2.5
    assert type(record.result) is bytes


@pytest.mark.parametrize("hold", [False, 0, b"\x00", bytearray(b"\x00"), memoryview(b"\x00"), Decimal(0)])
def test_no_is_no_in_every_type(hold: Any) -> None:
    """A flag that is not set is not taken for one that is, though it be some bytes."""
    assert read_record(Found(1, 1, "t", b"f", 1, hold, 10500, 6500, 9000, None)).hold is False


@pytest.mark.parametrize(
    "row",
    [
        Found(1, 2, "t", "text", 3, True, 10500, 6500, 9000, b"r"),
        Found(1, 2, 7, b"f", 3, True, 10500, 6500, 9000, b"r"),
        Found(1, 2, b"\xff", b"f", 3, True, 10500, 6500, 9000, b"r"),
        Found("one", 2, "t", b"f", 3, True, 10500, 6500, 9000, b"r"),
        Found(1, 9, "t", b"f", 3, True, 10500, 6500, 9000, b"r"),
        Found(1, 2, "t", b"f", 3, True, None, 6500, 9000, b"r"),
        Found(1, 2, "t", b"f", float("inf"), True, 10500, 6500, 9000, b"r"),
    ],
)
def test_a_row_that_makes_no_sense_is_unreadable(row: Found) -> None:
    """What is in the wrong column, or in none of the known states, is no record."""
    assert not read_record(row).readable


class AsText(Loader):
    def load(self, data: Any) -> str:
        return bytes(data).decode()


class AsFloat(Loader):
    def load(self, data: Any) -> float:
        return float(bytes(data))


def with_loader(url: str, name: str, loader: type[Loader]) -> Engine:
    """Make an engine whose driver reads a type in its own way."""
    engine = create_engine(with_driver(url, "postgresql+psycopg"))
    event.listen(engine, "connect", lambda connection, _: connection.adapters.register_loader(name, loader))
    return engine


def with_typecaster(url: str) -> Engine:
    """Make an engine whose driver gives bytes as the text that the server sent."""
    engine = create_engine(with_driver(url, "postgresql+psycopg2"))
    as_text = psycopg2.extensions.new_type((17,), "BYTEA_AS_TEXT", lambda value, _: value)
    event.listen(engine, "connect", lambda connection, _: psycopg2.extensions.register_type(as_text, connection))
    return engine


class Uncounting(psycopg2.extensions.cursor):
    """A cursor that does not know how many rows it hit."""

    rowcount = -1


REFUSED: dict[str, tuple[str, Callable[[str], Engine]]] = {
    "bytes as text": ("gives bytes", lambda url: with_loader(url, "bytea", AsText)),
    "numbers as floats": ("gives bytes", lambda url: with_loader(url, "int8", AsFloat)),
    "bytes as digits": ("gives bytes", with_typecaster),
    "rows not counted": (
        "count the rows",
        lambda url: create_engine(
            with_driver(url, "postgresql+odd"), connect_args={"cursor_factory": Uncounting}, use_native_hstore=False
        ),
    ),
}


@pytest.mark.parametrize("joined", [False, True], ids=["leased", "joined"])
@pytest.mark.parametrize(("words", "make"), REFUSED.values(), ids=REFUSED.keys())
def test_a_driver_that_changes_values_is_refused(
    postgres_url: str, words: str, make: Callable[[str], Engine], joined: bool
) -> None:
    """A driver that gives back other values than it was given, or counts no rows, is refused: nothing is claimed."""
    table = unique_name("records")
    engine = make(postgres_url)
    store = SQLStore(engine, table=table)
    store.create_schema_sync()
    runs: list[str] = []
    options = {"session": sessionmaker(engine)} if joined else {}

    @idempotent(store, key=lambda what: what, **options)
    def order(what: str) -> None:
        runs.append(what)

    for _ in range(2):
        with pytest.raises(ConfigurationError, match=words):
            order("tea")

    with engine.connect() as connection:
        assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0
    engine.dispose()
    assert not runs


def test_a_connection_that_counts_changed_rows_only_is_refused(mariadb_url: str) -> None:
    """An engine that connects by itself, without the flag that SQLAlchemy sets, is refused, and with it taken."""
    address = make_url(mariadb_url)

    def engine_of(flags: int) -> Engine:
        options: dict[str, Any] = {"host": address.host, "port": address.port, "user": address.username}
        options |= {"password": address.password or "", "database": address.database, "client_flag": flags}
        return create_engine("mysql+pymysql://", creator=lambda: pymysql.connect(**options))

    table = unique_name("records")
    wrong, right = engine_of(0), engine_of(pymysql.constants.CLIENT.FOUND_ROWS)
    SQLStore(right, table=table).create_schema_sync()

    with pytest.raises(ConfigurationError, match="FOUND_ROWS"):
        SQLStore(wrong, table=table).claim_sync(new_claim())

    claim = new_claim()
    assert judge(claim, SQLStore(right, table=table).claim_sync(claim)) == Execute(1)
    with right.connect() as connection:
        assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 1
    wrong.dispose()
    right.dispose()


async def test_an_asynchronous_driver_that_changes_values_is_refused(postgres_url: str) -> None:
    """So is one whose verbs are awaited."""
    engine = create_async_engine(with_driver(postgres_url, "postgresql+psycopg"))
    event.listen(engine.sync_engine, "connect", _bytes_as_text)
    store = SQLStore(engine, table=unique_name("records"))
    await store.create_schema()

    with pytest.raises(ConfigurationError, match=r"postgresql\+psycopg.*gives bytes"):
        await store.claim(new_claim())

    await store.aclose()
    await engine.dispose()


def _bytes_as_text(connection: Any, _: Any) -> None:
    connection.driver_connection.adapters.register_loader("bytea", AsText)


@contextmanager
def odd_engine(url: str, **options: Any) -> Iterator[Engine]:
    """Make an engine with a driver whose name nobody knows."""
    engine = create_engine(with_driver(url, "postgresql+odd"), **options)
    yield engine
    engine.dispose()


def test_a_driver_of_another_name_is_taken_if_it_can_be_trusted(postgres_url: str) -> None:
    """What is not on a list of drivers is tried, and then used, leased and joined."""
    with odd_engine(postgres_url) as engine:
        store = SQLStore(engine, table=unique_name("records"))
        store.create_schema_sync()
        claim = new_claim()
        store.claim_sync(claim)
        assert store.renew_sync(claim)
        assert store.complete_sync(claim, bytes(range(256)))

        @idempotent(store, key=lambda what: what, session=sessionmaker(engine))
        def order(what: str) -> str:
            return what

        assert order("tea") == order("tea") == "tea"
        assert judge(new_claim(), store.claim_sync(new_claim())) == Replay(bytes(range(256)))


AUTOCOMMITTING = {
    "unknown": ("postgres_url", "postgresql+odd"),
    "psycopg2": ("postgres_url", "postgresql+psycopg2"),
    "pg8000": ("postgres_url", "postgresql+pg8000"),
    "mysqlconnector": ("mariadb_url", "mysql+mysqlconnector"),
}


@pytest.mark.parametrize(("fixture", "driver"), AUTOCOMMITTING.values(), ids=AUTOCOMMITTING.keys())
def test_a_driver_that_commits_each_statement_is_refused_for_a_transaction(
    request: pytest.FixtureRequest, fixture: str, driver: str
) -> None:
    """A connection that was told to commit by itself, past SQLAlchemy, can hold no effect together with its record."""
    engine = create_engine(with_driver(request.getfixturevalue(fixture), driver))
    store = SQLStore(engine, table=unique_name("records"))
    store.create_schema_sync()
    engine.dispose()
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "autocommit", True))
    runs: list[str] = []

    @idempotent(store, key=lambda what: what, session=sessionmaker(engine))
    def order(what: str) -> None:
        runs.append(what)

    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        order("tea")

    engine.dispose()
    assert not runs


def test_a_driver_is_tried_once(postgres_url: str) -> None:
    """Trying a driver costs nothing after the first claim: each verb is one statement."""
    sent: list[str] = []

    class Counting(psycopg2.extensions.cursor):
        def execute(self, query: Any, values: Any = None) -> None:
            sent.append(query)
            super().execute(query, values)

    engine = create_engine(with_driver(postgres_url, "postgresql+psycopg2"), connect_args={"cursor_factory": Counting})
    store = SQLStore(engine, table=unique_name("records"))
    store.create_schema_sync()
    store.claim_sync(new_claim("first"))
    counts = []
    claim = new_claim("second")

    for verb in (
        lambda: store.claim_sync(claim),
        lambda: store.renew_sync(claim),
        lambda: store.complete_sync(claim, b"result"),
        lambda: store.claim_sync(new_claim("second")),
    ):
        sent.clear()
        verb()
        counts.append(len(sent))

    engine.dispose()
    assert counts == [1, 1, 1, 1]


def test_a_database_that_is_not_known_is_refused_at_construction() -> None:
    """An engine on a database for which there are no statements here is refused before anything connects."""
    engine = create_engine("other+odd://somewhere", module=SimpleNamespace(paramstyle="qmark"))

    with pytest.raises(ConfigurationError, match="not other"):
        SQLStore(engine)

"""How MariaDB gives events their places: after the commit, one at a time, whatever happens to those who give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError

from idempotency.errors import TransactionError
from idempotency.streams import ConflictError, Position, Streams
from tests.kit.ledger import Ledger
from tests.kit.servers import MariaDBServer, with_driver
from tests.streams.kit import TYPES, Deposited, shown

pytestmark = pytest.mark.stores("mariadb")

GIVES = "UPDATE"
"""How the statement begins that gives events their places."""


def append_sync(engine: Engine, streams: Streams, stream: str, *amounts: int, **options: Any) -> None:
    with engine.begin() as connection:
        streams.append_sync(connection, stream, [Deposited(amount) for amount in amounts], **options)


def all_of_sync(engine: Engine, streams: Streams, **options: Any) -> list[tuple[str, int]]:
    with engine.connect() as connection:
        return shown(list(streams.read_all_sync(connection, **options)))


def before_places_are_given(engine: Engine, work: Any) -> None:
    """Call ``work`` each time before the statement that gives places is sent by this engine."""

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(GIVES) and "FIND_IN_SET" in statement:
            work()

    event.listen(engine, "before_cursor_execute", look)


def test_one_at_a_time_gives_places_also_in_autocommit(sync_ledger: Ledger, sync_streams: Streams) -> None:
    """An engine that commits each statement by itself has the row of the table of places locked all the same."""
    locked: list[bool] = []

    def look() -> None:
        query = text(f"SELECT place FROM {sync_ledger.name}_ev_place WHERE id = 1 FOR UPDATE NOWAIT")
        try:
            with sync_ledger.sync_engine.connect() as other:
                other.execute(query)
            locked.append(False)
        except OperationalError:
            locked.append(True)

    append_sync(sync_ledger.sync_engine, sync_streams, "a", 1)
    reading = create_engine(sync_ledger.sync_engine.url, isolation_level="AUTOCOMMIT")
    before_places_are_given(reading, look)

    assert all_of_sync(reading, sync_streams) == [("a", 1)]
    assert locked == [True]
    reading.dispose()


def test_reading_uncommitted_places_is_refused(sync_ledger: Ledger, sync_streams: Streams) -> None:
    engine = sync_ledger.sync_engine.execution_options(isolation_level="READ UNCOMMITTED")
    with engine.connect() as connection, pytest.raises(TransactionError, match="take another level"):
        sync_streams.page_of_all(connection, Position(), 1)


def test_an_event_without_place_that_is_locked_is_read_later(sync_ledger: Ledger, sync_streams: Streams) -> None:
    """An open transaction appends to a stream that is new: readers wait, get what has a place, and do not fail."""
    engine = sync_ledger.sync_engine
    short = create_engine(engine.url, connect_args={"init_command": "SET SESSION innodb_lock_wait_timeout = 1"})
    append_sync(engine, sync_streams, "old", 1)
    assert all_of_sync(short, sync_streams) == [("old", 1)]
    append_sync(engine, sync_streams, "new", 1)
    with engine.begin() as late:
        sync_streams.append_sync(late, "new", [Deposited(2)])
        assert all_of_sync(short, sync_streams) == [("old", 1)]
    append_sync(engine, sync_streams, "old", 2)

    assert all_of_sync(short, sync_streams) == [("old", 1), ("new", 1), ("new", 2), ("old", 2)]
    short.dispose()


def test_a_snapshot_that_is_outdated_is_a_conflict_on_newer_servers(sync_ledger: Ledger, sync_streams: Streams) -> None:
    """Since MariaDB 11.8 innodb_snapshot_isolation is on: a place that was given meanwhile is a change of its event."""
    strict = create_engine(
        sync_ledger.sync_engine.url, connect_args={"init_command": "SET SESSION innodb_snapshot_isolation = ON"}
    )
    append_sync(strict, sync_streams, "a", 1)
    with strict.connect() as old:
        assert shown(list(sync_streams.read_sync(old, "a"))) == [("a", 1)]
        assert all_of_sync(strict, sync_streams) == [("a", 1)]
        with pytest.raises(ConflictError, match="begin yours again"):
            sync_streams.append_sync(old, "a", [Deposited(2)])
    append_sync(strict, sync_streams, "a", 2)

    assert all_of_sync(strict, sync_streams) == [("a", 1), ("a", 2)]
    strict.dispose()


@pytest.fixture
def server() -> Iterator[MariaDBServer]:
    """A server of its own, whose numbers of rows are not in the order of statements."""
    with MariaDBServer(innodb_autoinc_lock_mode="2") as server:
        yield server


@pytest.mark.processes
def test_a_crash_between_commit_and_place(server: MariaDBServer) -> None:
    """Events that are committed have no place, or one that is not committed, when the server is killed."""
    streams, url = Streams(TYPES), with_driver(server.url, "mysql+pymysql")
    engine, late = create_engine(url), create_engine(url)
    streams.create_schema_sync(engine)
    append_sync(engine, streams, "a", 1, 2)
    assert all_of_sync(engine, streams) == [("a", 1), ("a", 2)]
    with late.connect() as open_transaction:
        streams.append_sync(open_transaction, "lost", [Deposited(1)])
        append_sync(engine, streams, "b", 1, expected=0)
        append_sync(engine, streams, "a", 3, expected=2)
        # The places are given, and not committed.
        crashing = create_engine(url)
        event.listen(crashing, "commit", lambda _: server.kill())
        with pytest.raises(OperationalError):
            all_of_sync(crashing, streams)
        open_transaction.invalidate()
    for each in (engine, late, crashing):
        each.dispose()
    server.start()
    append_sync(engine, streams, "b", 2, expected=1)

    order = [("a", 1), ("a", 2), ("b", 1), ("a", 3), ("b", 2)]
    assert all_of_sync(engine, streams) == order
    with engine.connect() as connection:
        places = list(connection.execute(text("SELECT place FROM stream_event ORDER BY place")).scalars())
        assert places == [1, 2, 3, 4, 5]
    engine.dispose()

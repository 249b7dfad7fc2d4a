"""What PostgreSQL's numbers of transactions do to the order: prepared, counted on, replicated, after a crash."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from idempotency.errors import StoreError
from idempotency.streams import Position, Streams
from tests.kit.servers import NOBODY, PostgresServer, with_driver
from tests.streams.kit import TYPES, Deposited, shown

pytestmark = pytest.mark.processes

STREAMS = Streams(TYPES)


class Standby(PostgresServer):
    """A hot standby of another server, which applies what that one writes to its log."""

    def __init__(self, primary: PostgresServer) -> None:
        self._primary = primary
        super().__init__(max_prepared_transactions="5")

    def _prepare(self) -> None:
        if os.geteuid() == 0:
            os.chown(self.directory, NOBODY, NOBODY)
        self._programs = self._primary._programs
        command = [str(self._programs / "pg_basebackup"), "-D", str(self.directory / "data"), "-R", "-N", "-c", "fast"]
        address = ["-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres"]
        subprocess.run([*command, *address], cwd=self.directory, check=True, **self._identity())


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of its own, with no other transactions than those of a test."""
    settings = {"max_prepared_transactions": "5", "wal_level": "logical", "autovacuum": "off", "max_wal_senders": "5"}
    with PostgresServer(**settings) as server:
        yield server


@contextmanager
def engine_of(server: PostgresServer, database: str = "postgres", **options: Any) -> Iterator[Engine]:
    url = with_driver(server.url, "postgresql+psycopg").rpartition("/")[0]
    engine = create_engine(f"{url}/{database}", **options)
    try:
        yield engine
    finally:
        engine.dispose()


def append(engine: Engine, stream: str, *amounts: int, **options: Any) -> None:
    with engine.begin() as connection:
        STREAMS.append_sync(connection, stream, [Deposited(amount) for amount in amounts], **options)


def all_of(engine: Engine, after: Position = Position()) -> list[Any]:  # noqa: B008
    with engine.connect() as connection:
        return list(STREAMS.read_all_sync(connection, after=after))


def test_a_prepared_transaction_is_waited_for_also_after_a_crash(server: PostgresServer) -> None:
    """It has no session, and outlives the server; the events that it holds come after those that were read."""
    with engine_of(server) as engine:
        STREAMS.create_schema_sync(engine)
        append(engine, "before", 1)
        with engine.connect() as connection:
            STREAMS.append_sync(connection, "prepared", [Deposited(1)])
            connection.execute(text("PREPARE TRANSACTION 'nightly'"))
            connection.rollback()
        append(engine, "after", 1)
        first = all_of(engine)
    server.kill()
    server.start()
    with engine_of(server) as engine:
        append(engine, "after", 2)
        with engine.connect() as connection:
            delay = STREAMS.delayed_by_sync(connection)
        second = all_of(engine, first[-1].position)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("COMMIT PREPARED 'nightly'"))
        third = all_of(engine, first[-1].position)

    assert (shown(first), second) == ([("before", 1)], [])
    assert delay is not None
    assert (delay.pid, delay.name) == (None, "nightly")
    assert shown(third) == [("prepared", 1), ("after", 1), ("after", 2)]


def test_the_numbers_of_transactions_begin_again(server: PostgresServer) -> None:
    """Every 4,294,967,296 transactions a row's number begins anew; that of an event goes on in the next epoch."""
    with engine_of(server) as engine:
        STREAMS.create_schema_sync(engine)
        append(engine, "a", 1)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM FREEZE"))
            connection.execute(text("CHECKPOINT"))
    last = 2**32 - 20
    _stop(server)
    _reset(server, last)
    with engine_of(server) as engine:
        before = all_of(engine)
        for amount in range(2, 32):
            append(engine, "a", amount, expected=amount - 1)
        with engine.begin() as late:
            STREAMS.append_sync(late, "late", [Deposited(1)])
            append(engine, "a", 32, expected=31)
            found = all_of(engine, before[-1].position)
        found += all_of(engine, found[-1].position)

    assert shown(before) == [("a", 1)]
    assert shown(found) == [*(("a", version) for version in range(2, 32)), ("late", 1), ("a", 32)]
    assert found[0].position.place < 2**32 < found[-1].position.place


def _stop(server: PostgresServer) -> None:
    program = str(server._programs / "pg_ctl")
    command = [program, "stop", "-D", str(server.directory / "data"), "-m", "fast"]
    subprocess.run(command, cwd=server.directory, check=True, stdout=subprocess.DEVNULL, **server._identity())
    server.kill()


def _reset(server: PostgresServer, number: int) -> None:
    """Let the next transaction of a server that is stopped have this number."""
    data = server.directory / "data"
    segment = data / "pg_xact" / f"{number // (32 * 8192 * 4):04X}"
    segment.write_bytes(bytes(32 * 8192))
    segment.chmod(0o666)
    command = [str(server._programs / "pg_resetwal"), "-f", "-x", str(number), "-u", str(number - 10_000), str(data)]
    subprocess.run(command, cwd=server.directory, check=True, stdout=subprocess.DEVNULL, **server._identity())
    server.start()


def test_a_hot_standby_is_read_in_the_same_order(server: PostgresServer) -> None:
    """Positions of the primary hold there; a transaction that is open on the primary is waited for there too."""
    with engine_of(server) as primary, Standby(server) as standby, engine_of(standby) as replica:
        STREAMS.create_schema_sync(primary)
        append(primary, "a", 1)
        _apply(primary, replica)
        first = all_of(replica)
        with primary.begin() as late:
            STREAMS.append_sync(late, "late", [Deposited(1)])
            append(primary, "a", 2)
            _apply(primary, replica)
            second = all_of(replica, first[-1].position)
        _apply(primary, replica)
        third = all_of(replica, first[-1].position)
        with pytest.raises(DBAPIError, match="read-only transaction"):
            append(replica, "a", 3)
        of_primary = all_of(primary)

    assert (shown(first), second) == ([("a", 1)], [])
    assert shown(third) == [("late", 1), ("a", 2)]
    assert of_primary == [*first, *third]


def _apply(primary: Engine, replica: Engine) -> None:
    """Wait until the replica has applied what the primary has written so far."""
    with primary.connect() as one:
        end = one.execute(text("SELECT pg_current_wal_lsn()")).scalar_one()
    with replica.connect() as other:
        query = text("SELECT pg_last_wal_replay_lsn() >= CAST(:end AS pg_lsn)")
        while not other.execute(query, {"end": end}).scalar_one():
            time.sleep(0.02)


def test_a_table_that_is_filled_by_a_subscription_is_refused(server: PostgresServer) -> None:
    """There, transactions commit in another order than that of their numbers: a reader would pass over some."""
    with engine_of(server) as publisher:
        with publisher.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("CREATE DATABASE subscriber"))
        STREAMS.create_schema_sync(publisher)
        with engine_of(server, "subscriber") as subscriber:
            STREAMS.create_schema_sync(subscriber)
            with publisher.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("CREATE PUBLICATION events FOR TABLE stream_event"))
                connection.execute(text("SELECT pg_create_logical_replication_slot('events', 'pgoutput')"))
            address = f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres"
            with subscriber.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                options = "create_slot = false, slot_name = events, copy_data = false"
                subscribe = f"CREATE SUBSCRIPTION events CONNECTION '{address}' PUBLICATION events WITH ({options})"
                connection.execute(text(subscribe))
            with pytest.raises(StoreError, match="filled by a logical subscription"):
                all_of(subscriber)
            with pytest.raises(StoreError, match="filled by a logical subscription"):
                append(subscriber, "a", 1)
            with subscriber.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("DROP SUBSCRIPTION events"))
            append(subscriber, "a", 1)

            assert shown(all_of(subscriber)) == [("a", 1)]

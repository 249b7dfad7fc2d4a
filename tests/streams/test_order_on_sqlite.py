"""The order of a SQLite file in WAL mode, which several processes write and one vacuums."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, text

from idempotency.streams import Position, RecordedEvent, Streams
from tests.streams.kit import TYPES, Deposited, shown

WRITE = """
import sys
from dataclasses import dataclass
from sqlalchemy import create_engine
from idempotency.streams import Streams
@dataclass(frozen=True)
class Deposited:
    amount: int
engine, streams = create_engine(sys.argv[1], connect_args={"timeout": 60}), Streams([Deposited])
for number in range(20):
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA synchronous = OFF")
        streams.append_sync(connection, sys.argv[2], [Deposited(number), Deposited(number)])
        connection.rollback() if number % 4 == 0 else connection.commit()
    print(number, flush=True)
"""


def opened(url: str) -> tuple[Engine, Streams]:
    engine = create_engine(url, connect_args={"timeout": 60})
    event.listen(engine, "connect", lambda opened, _: opened.execute("PRAGMA synchronous = OFF"))
    return engine, Streams(TYPES)


def alone(engine: Engine, statement: str) -> None:
    """Run a statement outside of a transaction."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))


@pytest.mark.processes
def test_processes_write_while_the_file_is_vacuumed(tmp_path: Path) -> None:
    """VACUUM writes all rows anew, and the numbers of events stay; also that of the last one, once it is deleted."""
    url = f"sqlite:///{tmp_path}/events.sqlite3"
    engine, streams = opened(url)
    alone(engine, "PRAGMA journal_mode = WAL")
    streams.create_schema_sync(engine)
    command = [sys.executable, "-c", WRITE, url]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE) for name in "ab"]
    found: list[RecordedEvent] = []

    def read() -> list[RecordedEvent]:
        with engine.connect() as connection:
            return list(streams.read_all_sync(connection, after=(found[-1].position if found else None) or Position()))

    for writer in (*writers, *writers):
        assert writer.stdout is not None
        # It has written once more.
        assert writer.stdout.readline()
        alone(engine, "VACUUM")
        found += read()
    for writer in writers:
        writer.communicate()
    ends = [writer.returncode for writer in writers]
    found += read()
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM stream_event WHERE seq = (SELECT max(seq) FROM stream_event)"))
    alone(engine, "VACUUM")
    with engine.begin() as connection:
        streams.append_sync(connection, "c", [Deposited(1)])
    later = read()
    engine.dispose()

    assert ends == [0, 0]
    for name in "ab":
        assert [version for stream, version in shown(found) if stream == name] == list(range(1, 31))
    assert shown(later) == [("c", 1)]

"""Name the open transaction that delays those who read all events."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, text

# The transactions of all databases of a server share their numbers. What only reads has none, and delays nobody.
_OLDEST = text(
    """
    SELECT pid, name, seconds, statement_seconds FROM (
        SELECT pid, coalesce(nullif(application_name, ''), backend_type) AS name, age(backend_xid) AS age,
               CAST(extract(epoch FROM clock_timestamp() - xact_start) AS double precision) AS seconds,
               CAST(extract(epoch FROM clock_timestamp() - query_start) AS double precision) AS statement_seconds
        FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
        UNION ALL
        SELECT NULL, gid, age(transaction),
               CAST(extract(epoch FROM clock_timestamp() - prepared) AS double precision), NULL
        FROM pg_prepared_xacts
    ) AS writing ORDER BY age DESC LIMIT 1
    """
)
_CLEAR = text("SELECT pg_stat_clear_snapshot()")


class Delay(NamedTuple):
    """The oldest open transaction that has written: what is committed after it began is read when it has ended.

    ``pid`` is that of its server process, None for a prepared transaction. ``name`` is its ``application_name``, else
    what kind of process it is; of a prepared transaction, its identifier. ``seconds``: how long it has been open;
    ``statement_seconds``: since its last statement began. Both are None where the user may not see them.
    """

    pid: int | None
    name: str
    seconds: float | None
    statement_seconds: float | None

    def __str__(self) -> str:
        who = f"the prepared transaction {self.name}" if self.pid is None else f"process {self.pid} ({self.name})"
        since = "" if self.seconds is None else f", open for {self.seconds:.0f} s,"
        return f"{who}{since} delays those who read all events"


def find_delay(connection: Connection) -> Delay | None:
    """Return what delays readers; None if nothing does, as on every database but PostgreSQL."""
    if connection.dialect.name != "postgresql":
        return None
    # Within a transaction, what was seen once is shown again.
    connection.execute(_CLEAR)
    found = connection.execute(_OLDEST).one_or_none()
    return None if found is None else Delay(*found)

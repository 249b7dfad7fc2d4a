"""The statements of streams, and how each database keeps the order of events free of gaps.

A number that is drawn when an event is written is no order to read by: transactions commit in another order, and a
reader that has passed a number would never see an event that gets committed below it. So events are ordered by
``(place, seq)``, and read up to a bound that no open transaction can write below any more:

- PostgreSQL: ``place`` is the number of the transaction, or of the newest one that its snapshot knows, if that is
  higher: so an event comes after all that its statement could see. The statement that reads takes events below the
  oldest transaction that was open *in its own snapshot*: there is no second look, and no time-out.
- MariaDB and MySQL: ``place`` is given after the commit, by one at a time, who holds the row of the table of places.
  What has no place yet is not read.
- SQLite: one transaction writes at a time, so that ``seq`` itself is in the order of the commits.

``place`` on PostgreSQL begins at the number in the table of places, which :meth:`Streams.rebase` raises after a dump
was restored in a server whose transactions are numbered anew.
"""

from __future__ import annotations

from functools import cache, cached_property

from sqlalchemy import Connection, text

from idempotency._sql.clock import NOW_MS
from idempotency._sql.send import Compiled
from idempotency._sql.tables import MYSQL, full_name
from idempotency.streams._table import Tables

PLACES_AT_ONCE = 1000
"""MariaDB: how many events are given places in one transaction."""

_COLUMNS = "place, stream, version, id, type, type_version, data, headers, created_ms"
_READ = "place, seq, stream, version, {}, type, type_version, data, headers, created_ms"
_TYPES = {
    **{"id": "uuid", "type": "varchar", "type_version": "smallint", "data": "text", "headers": "text"},
    **{"stream": "varchar", "expected": "bigint"},
}


class Statements:
    """The statements for the tables of one connection, in the syntax of its driver."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self._dialect = connection.dialect
        self.name = connection.dialect.name
        self._events, self._snapshots, self._place = (
            full_name(connection, each).replace(":", "\\:") for each in tables.all
        )
        self._name = tables.events.name
        self.table, self.snapshots, self.place = (each.fullname for each in tables.all)
        self.append, self.own = cache(self._append), cache(self._own)
        postgresql = self.name == "postgresql"
        # A driver would make an object of each id, and that a text.
        self._read = _READ.format("CAST(id AS text)" if postgresql else "id")
        # PostgreSQL plans for a tenth of the rows where it does not know the number, and so by the index. Otherwise,
        # until it has statistics of the table, it would sort all that comes after a position, for each page.
        self._most = "(SELECT CAST(:most AS bigint))" if postgresql else ":most"
        self._has = (
            f"SELECT 1 FROM {self._events} WHERE stream = {self._bind('stream')} AND version = {self._bind('expected')}"
        )
        # PostgreSQL: what is added to the number of a transaction.
        self._added = f"(SELECT place FROM {self._place} WHERE id = 1)"

    def _compiled(self, sql: str) -> Compiled:
        return Compiled(text(sql), self._dialect)

    def _bind(self, name: str, number: object = "") -> str:
        """Return a parameter; PostgreSQL needs its type, which it cannot see where rows are selected."""
        kind = _TYPES.get(name)
        return f"CAST(:{name}{number} AS {kind})" if self.name == "postgresql" and kind else f":{name}{number}"

    def _append(self, count: int) -> Compiled:
        """Append ``count`` events after ``expected``, or none.

        It changes as many rows as were appended; several on PostgreSQL return that number instead. PostgreSQL appends
        the first of them, and the others if that was appended: a part of them would be no append, and an error would
        end the transaction. MariaDB looks for ``expected`` by :attr:`has`, before: an INSERT with a SELECT would lock
        the table's counter.
        """
        rows = [self._row(each, "" if count == 1 else each) for each in range(1, count + 1)]
        insert = f"INSERT INTO {self._events} ({_COLUMNS})"
        guard = f"({self._bind('expected')} = 0 OR EXISTS ({self._has}))"
        if self.name in MYSQL:
            return self._compiled(f"{insert} VALUES {', '.join(f'({row})' for row in rows)}")
        if self.name == "sqlite":
            return self._compiled(f"{insert} SELECT * FROM ({_union(rows)}) WHERE {guard}")
        first = f"{insert} SELECT {rows[0]} WHERE {guard} ON CONFLICT DO NOTHING"
        if count == 1:
            return self._compiled(first)
        others = f"SELECT others.* FROM ({_union(rows[1:])}) AS others, first ORDER BY 3"
        counted = "(SELECT count(*) FROM first) + (SELECT count(*) FROM rest)"
        return self._compiled(
            f"WITH first AS ({first} RETURNING 1), rest AS ({insert} {others} RETURNING 1) SELECT {counted}"
        )

    @cached_property
    def has(self) -> Compiled:
        """Look whether a stream has the version ``expected``."""
        return self._compiled(self._has)

    def _row(self, number: int, suffix: object) -> str:
        """Return the values of the event that is ``number`` after ``expected``; ``suffix`` ends its parameters."""
        place, version = self._new_place, f"{self._bind('expected')} + {number}"
        columns = ", ".join(self._bind(name, suffix) for name in ("id", "type", "type_version", "data", "headers"))
        return f"{place}, {self._bind('stream')}, {version}, {columns}, {NOW_MS[self.name]}"

    @property
    def _new_place(self) -> str:
        if self.name == "postgresql":
            newest = "txid_snapshot_xmax(txid_current_snapshot()) - 1"
            return f"{self._added} + GREATEST(txid_current(), {newest})"
        return "0" if self.name == "sqlite" else "NULL"

    @cached_property
    def version(self) -> Compiled:
        """Read the version of a stream."""
        return self._compiled(f"SELECT max(version) FROM {self._events} WHERE stream = :stream")

    @cached_property
    def newest_version(self) -> Compiled:
        """MariaDB: read the version that a stream has now; the snapshot of a transaction may show an older one."""
        locked = self._locked("version")
        return self._compiled(f"SELECT max(version) FROM {locked} WHERE stream = :stream LOCK IN SHARE MODE")

    @cached_property
    def lock_first(self) -> Compiled:
        """MariaDB: wait for those who append to a stream. Of two who both lock its last event, one would fail."""
        locked = self._locked("version")
        return self._compiled(f"SELECT seq FROM {locked} WHERE stream = :stream AND version = 1 FOR UPDATE")

    def _locked(self, index: str) -> str:
        """MariaDB: name the table and an index, without which a small table is scanned, and others are waited for."""
        return f"{self._events} FORCE INDEX ({self._name}_{index})"

    def _own(self, count: int, newest: bool) -> Compiled:
        """Read which of ``count`` events are there, by their ids, with their streams and versions.

        ``newest``: on MariaDB, also those that the snapshot of the transaction does not show, which takes locks.
        """
        ids = ", ".join(self._bind("id", number) for number in range(1, count + 1))
        locks = newest and self.name in MYSQL
        events, lock = (self._locked("id"), " LOCK IN SHARE MODE") if locks else (self._events, "")
        return self._compiled(f"SELECT stream, version FROM {events} WHERE id IN ({ids}){lock}")

    @cached_property
    def read(self) -> Compiled:
        """Read events of one stream, by version."""
        return self._compiled(
            f"SELECT {self._read} FROM {self._events} WHERE stream = :stream AND version > :after AND version <= :until"
            f" ORDER BY version LIMIT {self._most}"
        )

    @cached_property
    def read_all(self) -> Compiled:
        """Read events of all streams after a position, in the order in which they were committed."""
        if self.name == "postgresql":
            oldest = "txid_snapshot_xmin(txid_current_snapshot())"
            bound, order = f"(place, seq) > (:place, :seq) AND place < {self._added} + {oldest}", "place, seq"
        else:
            order = "seq" if self.name == "sqlite" else "place"
            bound = f"{order} > :{order}"
        return self._compiled(
            f"SELECT {self._read} FROM {self._events} WHERE {bound} ORDER BY {order} LIMIT {self._most}"
        )

    @cached_property
    def position(self) -> Compiled:
        """Read the place and number of one event."""
        return self._compiled(f"SELECT place, seq FROM {self._events} WHERE stream = :stream AND version = :version")

    @cached_property
    def last_place(self) -> Compiled:
        """MariaDB: read the last place that was given, and be the only one who gives places until the commit."""
        return self._compiled(f"SELECT place FROM {self._place} WHERE id = 1 FOR UPDATE")

    @cached_property
    def without_place(self) -> Compiled:
        """MariaDB: read which events are committed and have no place."""
        return self._compiled(f"SELECT seq FROM {self._events} WHERE place IS NULL ORDER BY seq LIMIT {PLACES_AT_ONCE}")

    def give_places(self, last: int, numbers: list[int]) -> str:
        """MariaDB: give places after ``last`` to the events of these numbers, in their order.

        A scan of the table would wait for those who append.
        """
        listed = ",".join(str(int(number)) for number in numbers)
        return (
            f"UPDATE {self._events} FORCE INDEX (PRIMARY) SET place = {int(last)} + FIND_IN_SET(seq, '{listed}')"
            f" WHERE seq IN ({listed})"
        )

    def raise_last_place(self, count: int) -> str:
        """MariaDB: note that ``count`` places were given."""
        return f"UPDATE {self._place} SET place = place + {int(count)} WHERE id = 1"

    @property
    def lock_events(self) -> str:
        """PostgreSQL: wait for those who append, and let others wait until the commit."""
        return f"LOCK TABLE {self._events.replace(chr(92) + ':', ':')} IN SHARE ROW EXCLUSIVE MODE"

    @cached_property
    def behind(self) -> Compiled:
        """PostgreSQL: read by how much the numbers of transactions are behind the places of events."""
        return self._compiled(
            f"SELECT (SELECT coalesce(max(place), 0) FROM {self._events}) + 1 - {self._added}"
            " - txid_snapshot_xmax(txid_current_snapshot())"
        )

    @cached_property
    def subscribed(self) -> Compiled:
        """PostgreSQL: look whether another server's events are replicated into the table."""
        name = self._events.replace("'", "''")
        return self._compiled(f"SELECT 1 FROM pg_subscription_rel WHERE srrelid = CAST('{name}' AS regclass)")

    @cached_property
    def rebase(self) -> Compiled:
        """PostgreSQL: raise what is added to the numbers of transactions."""
        return self._compiled(f"UPDATE {self._place} SET place = place + :more WHERE id = 1")

    @cached_property
    def snapshot(self) -> Compiled:
        """Read a snapshot, if it is not after ``until``, and whether the stream has its version."""
        return self._compiled(
            "SELECT version, type_version, data, EXISTS (SELECT 1 FROM"
            f" {self._events} AS event WHERE event.stream = :stream AND event.version = snapshot.version)"
            f" FROM {self._snapshots} AS snapshot WHERE stream = :stream AND type = :type AND version <= :until"
        )

    @cached_property
    def write_snapshot(self) -> Compiled:
        """Write a snapshot, unless there is a newer one."""
        insert = (
            f"INSERT INTO {self._snapshots} (stream, type, type_version, version, data)"
            " VALUES (:stream, :type, :type_version, :version, :data)"
        )
        if self.name in MYSQL:
            # In this order: each value is compared with the version before it is changed.
            newer = ", ".join(
                f"{name} = IF(VALUES(version) > version, VALUES({name}), {name})"
                for name in ("type_version", "data", "version")
            )
            return self._compiled(f"{insert} ON DUPLICATE KEY UPDATE {newer}")
        return self._compiled(
            f"{insert} ON CONFLICT (stream, type) DO UPDATE SET type_version = excluded.type_version,"
            f" version = excluded.version, data = excluded.data WHERE {self._snapshots}.version < excluded.version"
        )


def _union(rows: list[str]) -> str:
    return " UNION ALL ".join(f"SELECT {row}" for row in rows)

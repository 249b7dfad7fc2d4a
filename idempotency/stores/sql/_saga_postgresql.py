"""The journal of sagas on PostgreSQL: each request that writes is one statement.

One statement sees one snapshot. Where it has waited for the lock of a row, it changes the row as that is now, but still
sees the entries as they were. So where entries matter, the row is changed only as it was seen: ``xmin`` is another one
after each change. A statement that found another one has changed nothing, and is repeated with a new snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect

from idempotency.errors import StoreError
from idempotency.stores.sql._saga_statements import (
    CALLED,
    CHANGING,
    COLUMNS,
    ENTRIES,
    ENTRY_COLUMNS,
    EXPIRED,
    FREE,
    GOES_ON,
    NEW,
    NOTHING,
    SAGAS,
    STATE,
    TAKE,
    VALUES,
    Change,
    Changed,
    SagaStatements,
    Update,
)
from idempotency.stores.sql._saga_table import SagaTables

T = TypeVar("T")

_TRIES = 10
"""How often a statement is repeated when another one has changed the row in between."""

# A statement that is abandoned must not wait in the server for ever. The setting takes effect for a wait that begins
# after it. It ends with the transaction; in one of the caller, the last line restores it, which is evaluated last. What
# it was is read by a subquery, which OFFSET keeps apart, so that it is read first.
_BOUND = "bound AS MATERIALIZED (SELECT {before} set_config('lock_timeout', '{bound}', TRUE) AS applied {from_before})"
_OWN = {"before": "", "from_before": "", "restored": "TRUE"}
_OF_CALLER = {
    "before": "setting,",
    "from_before": "FROM (SELECT current_setting('lock_timeout') AS setting OFFSET 0) AS before",
    "restored": "(SELECT set_config('lock_timeout', setting, TRUE) FROM bound)",
}
_ROW = "(:name#, :progress#, :ord#, :attempt#, :body#)"
_AS_SEEN = "bound.applied IS NOT NULL AND r.xmin = seen.mark"

# Either ``taken`` or ``made`` has a row, or neither. A saga that is made has no entries, whatever was in its place.
_OPEN = f"""
WITH {_BOUND}, seen AS MATERIALIZED (
    SELECT r.*, {EXPIRED} AS expired, {FREE} AS free, r.xmin AS mark FROM {{sagas}} AS r WHERE r.id = :id
), taken AS (
    {TAKE} FROM bound, seen WHERE {_AS_SEEN} AND r.id = :id AND NOT seen.expired AND seen.free
    RETURNING r.*
), made AS (
    INSERT INTO {{sagas}} AS r ({COLUMNS}) SELECT {VALUES} FROM bound
    WHERE bound.applied IS NOT NULL AND :records AND NOT EXISTS (SELECT FROM seen WHERE NOT seen.expired)
    ON CONFLICT (id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in NEW)}
    WHERE r.xmin = (SELECT seen.mark FROM seen)
    RETURNING r.*
), without AS (
    DELETE FROM {{entries}} WHERE saga_id = :id AND EXISTS (SELECT FROM made)
)
{SAGAS} taken AS r
UNION ALL {SAGAS} made AS r
UNION ALL {SAGAS} seen AS r WHERE NOT r.expired AND NOT r.free
UNION ALL {ENTRIES} AND EXISTS (SELECT FROM taken)
UNION ALL SELECT 'changed', {NOTHING} FROM seen
WHERE NOT seen.expired AND seen.free AND NOT EXISTS (SELECT FROM taken)
UNION ALL SELECT 'restored', {NOTHING} WHERE {{restored}} IS NULL"""

# An entry that is both deleted and written is written only, and begins anew: no statement changes a row twice.
_WITHOUT = """, without AS (
    DELETE FROM {entries} AS e WHERE e.saga_id = :id AND EXISTS (SELECT FROM changed)
        AND e.name IN ({without}) AND COALESCE(e.name NOT IN ({names}), TRUE)
)"""
_WRITTEN = f""", written AS (
    INSERT INTO {{entries}} AS e ({ENTRY_COLUMNS})
    SELECT changed.id, new.*, {{at}}, {{at}} FROM changed, (VALUES {{rows}}) AS new
    ON CONFLICT (saga_id, name) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in CHANGING)},
        began_ms = CASE WHEN e.name IN ({{without}}) THEN excluded.began_ms ELSE e.began_ms END
)"""

# The entry is inserted under the lock of its row. Of several that are put at once one is inserted, and the statement of
# each other one does not see it, and is repeated.
_PUT = f"""
WITH {_BOUND}, there AS MATERIALIZED (
    SELECT {ENTRY_COLUMNS} FROM {{entries}} WHERE saga_id = :id AND name = :name0
), locked AS (
    SELECT r.id FROM bound, {{sagas}} AS r
    WHERE bound.applied IS NOT NULL AND {GOES_ON} AND NOT EXISTS (SELECT FROM there) FOR NO KEY UPDATE OF r
), put AS (
    INSERT INTO {{entries}} ({ENTRY_COLUMNS})
    SELECT locked.id, new.*, {{at}}, {{at}} FROM locked, (VALUES {{rows}}) AS new
    ON CONFLICT (saga_id, name) DO NOTHING RETURNING {ENTRY_COLUMNS}
), called AS (
    UPDATE {{sagas}} AS r SET {CALLED} WHERE r.id = :id AND EXISTS (SELECT FROM put)
)
SELECT r.version, {EXPIRED} AS expired, {GOES_ON} AS goes_on, e.name, e.progress, e.ord, e.attempt, e.body,
    {{at}} - e.changed_ms AS changed, {{at}} - e.began_ms AS began
FROM {{sagas}} AS r LEFT JOIN (SELECT * FROM put UNION ALL SELECT * FROM there) AS e ON TRUE WHERE r.id = :id"""

# Arrays, because subqueries may be planned as joins that read the whole tables. A row that is locked is purged by
# another process, or recorded anew.
_PURGE = """
WITH gone AS (
    DELETE FROM {sagas} WHERE id = ANY(ARRAY(
        SELECT id FROM {sagas} WHERE expires_ms <= (SELECT {now}) ORDER BY expires_ms LIMIT :limit
        FOR UPDATE SKIP LOCKED
    )) RETURNING id
), without AS (
    DELETE FROM {entries} WHERE saga_id = ANY(ARRAY(SELECT id FROM gone))
)
SELECT count(*) FROM gone"""


class OnPostgreSQL:
    """The requests that write, as one statement each. ``joined``: in a transaction of the caller."""

    def __init__(self, dialect: Dialect, tables: SagaTables, lock_wait: float, joined: bool) -> None:
        # A lock_timeout of 0 would mean to wait for ever.
        words = {"bound": f"{max(1, round(lock_wait * 1000))}ms", **(_OF_CALLER if joined else _OWN)}
        self.sql = SagaStatements(dialect, tables, row=_ROW, **words)

    def writing(self, _: Connection) -> AbstractContextManager[None]:
        """Do nothing: a statement is a transaction by itself."""
        return nullcontext()

    def open(self, connection: Connection, values: Mapping[str, Any]) -> Sequence[Any]:
        """Return the row of the saga as it is now, with its entries if it was there and is owned; or nothing."""
        return _repeated(
            lambda: self.sql.rows(connection, _OPEN, values),
            lambda found: found[0].kind == "changed" if found else values["records"],
        )

    def change(self, connection: Connection, change: Change) -> Changed:
        """Change a saga, unless the condition of the update is false."""
        entries, without = len(change.entries), len(change.without)
        template = _change(change.update, bool(entries), bool(without))
        values = {**change.values, **self.sql.written(change.entries), **self.sql.named(change.without, "without")}
        found = _repeated(
            lambda: self.sql.rows(connection, template, values, entries, without)[0],
            lambda found: found.fits and not found.changed,
        )
        return Changed(found.changed, None if found.version is None else found)

    def put(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        """Write an entry unless it is there; return it, with whether its saga goes on, None without a saga."""
        return _repeated(
            lambda: next(iter(self.sql.rows(connection, _PUT, values, 1)), None),
            lambda found: found is not None and found.goes_on and found.name is None,
        )

    def purge(self, connection: Connection, batch: int) -> int:
        """Delete up to ``batch`` sagas that have expired, with their entries, and return how many."""
        return int(self.sql.execute(connection, _PURGE, {"limit": batch}).scalar_one())


@lru_cache
def _change(update: Update, writes: bool, deletes: bool) -> str:
    as_seen = f", seen WHERE {_AS_SEEN}" if deletes else " WHERE bound.applied IS NOT NULL"
    return f"""
WITH {_BOUND}, seen AS MATERIALIZED (
    SELECT {STATE}, {update.condition} AS fits, r.xmin AS mark FROM {{sagas}} AS r WHERE r.id = :id
), changed AS (
    UPDATE {{sagas}} AS r SET {update.assignments} FROM bound{as_seen} AND {update.condition} RETURNING r.id, r.wakes
){_WITHOUT if deletes else ""}{_WRITTEN if writes else ""}
SELECT changed.id IS NOT NULL AS changed, changed.wakes, seen.version, seen.owned, seen.ours, seen.expired, seen.fits,
    {{restored}} AS restored
FROM (SELECT 1) AS one LEFT JOIN changed ON TRUE LEFT JOIN seen ON TRUE"""


def _repeated(send: Callable[[], T], lost: Callable[[T], bool]) -> T:
    for _ in range(_TRIES):
        found = send()
        if not lost(found):
            return found
    raise StoreError(f"the request lost against others {_TRIES} times in a row")

"""The verbs as functions of a connection: what each sends, and how it reads the answer.

The same functions serve the store's own connections, sync or async (inside SQLAlchemy's greenlet), and a connection
that is in a caller's transaction.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, CursorResult, Dialect, Row, Table, TextClause

from idempotency._durations import milliseconds, seconds
from idempotency._rules import FORMAT, Claim, Record, State
from idempotency._sql.sqlite import lowered_lock_wait
from idempotency.errors import StoreError, UnreadableError
from idempotency.stores._clock_guard import Asked, ClockGuard
from idempotency.stores._sealing import Sealing, opened_result, shown, shown_size
from idempotency.stores.base import Entry, ListedState
from idempotency.stores.sql._limits import check_size
from idempotency.stores.sql._operation_name import NO_NAMES, Names
from idempotency.stores.sql._statements import Statements
from idempotency.stores.sql._trust import has_names, try_driver
from idempotency.stores.sql._values import (
    as_bytes,
    as_flag,
    as_text,
    packed,
    storable,
    storable_name,
    storable_operation_name,
    stored,
    stored_name,
)

CLAIM_TRIES = 10
"""How often a claim is repeated when another one has changed the row in between."""


class Verbs:
    """The verbs over one table. ``dialect`` must have connected once; for ``lock_wait`` see :class:`Statements`.

    ``lowers_lock_wait``: around each statement that writes, the time for which SQLite waits for its lock is lowered to
    ``lock_wait``, and set back.
    ``trusted``: the driver was tried.
    ``in_flights`` and ``one_by_one``: see :class:`Statements`.
    ``writes_names``: claims write the name of their operation, if the table has columns for it.
    """

    def __init__(
        self,
        dialect: Dialect,
        table: Table,
        lock_wait: float,
        lowers_lock_wait: bool = False,
        writes_names: bool = False,
    ) -> None:
        self._make = partial(Statements, dialect, table, lock_wait)
        self._writes_names = writes_names
        self._has_names: bool | None = None
        self._use(NO_NAMES)
        self.lock_wait = lock_wait
        self._lowers_lock_wait = lowers_lock_wait
        self._table = table
        self._notifies = dialect.name == "postgresql"
        self.trusted = False
        self._purged_until = 0

    def _use(self, names: Names) -> None:
        self._sql = self._make(names)
        self.in_flights = self._sql.in_flights
        self.one_by_one = self._sql.one_by_one

    def _look_for_names(self, connection: Connection) -> None:
        self._has_names = has_names(connection, self._sql)
        if self._has_names:
            self._use(Names(shown=True, written=self._writes_names))

    def claim(self, connection: Connection, claim: Claim, guard: ClockGuard, sealing: Sealing | None) -> Record:
        """See :meth:`~idempotency.stores.base.Store.claim`."""
        if not self.trusted:
            try_driver(connection, self._sql)
            if self._writes_names:
                self._look_for_names(connection)
            self.trusted = True
        statement = self._sql.claim_watched if claim.watched else self._sql.claim
        asked = guard.ask(claim)
        values = claim_values(claim, asked, sealing)
        for _ in range(CLAIM_TRIES):
            row = self._claimed(connection, statement, values)
            if row is not None:
                return guard.read(asked, claim, read_record(row, claim.id, sealing), float(row.now_ms))
        raise StoreError(f"the claim lost against others {CLAIM_TRIES} times in a row")

    def _claimed(self, connection: Connection, statement: TextClause, values: dict[str, Any]) -> Row[Any] | None:
        if self._sql.claim_looks_first:
            row = self._execute(connection, self._sql.look, values).first()
            if row is not None and not row.free:
                return row
        result = self._execute(connection, statement, values)
        if self._sql.returns:
            return result.first()
        row = self._execute(connection, self._sql.look, values).first()
        return None if row is None or (row.free and row.token != values["token"]) else row

    def renew(self, connection: Connection, claim: Claim) -> bool:
        """See :meth:`~idempotency.stores.base.Store.renew`."""
        keep = None if claim.hold else milliseconds(claim.lease + claim.ttl)
        values = {"id": claim.id, "token": claim.token, "lease": milliseconds(claim.lease), "keep": keep}
        return self._execute(connection, self._sql.renew, values).rowcount > 0

    def complete(self, connection: Connection, claim: Claim, result: bytes | None, state: State) -> bool:
        """See :meth:`~idempotency.stores.base.Store.complete`."""
        check_size(connection, result)
        return self._ended(connection, self._sql.complete, claim, complete_values(claim, result, state))

    def release(self, connection: Connection, claim: Claim) -> bool:
        """See :meth:`~idempotency.stores.base.Store.release`."""
        return self._ended(connection, self._sql.release, claim, {"id": claim.id, "token": claim.token})

    def _ended(self, connection: Connection, statement: TextClause, claim: Claim, values: dict[str, Any]) -> bool:
        if not self._notifies:
            return self._execute(connection, statement, values).rowcount > 0
        return (
            self._execute(connection, statement, values | notification_values(claim, self._table)).first() is not None
        )

    def inspect(self, connection: Connection, record: bytes, sealing: Sealing | None) -> Entry | None:
        """See :meth:`~idempotency.stores.base.Housekeeping.inspect`."""
        if self._has_names is None:
            self._look_for_names(connection)
        row = self._execute(connection, self._sql.inspect, {"id": record}).first()
        return None if row is None else _entry(row, sealing)

    def unresolved(self, connection: Connection, limit: int, sealing: Sealing | None) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Housekeeping.unresolved`."""
        if not self._has_names:
            self._look_for_names(connection)
        return [_entry(row, sealing) for row in self._execute(connection, self._sql.unresolved, {"limit": limit})]

    def listed(
        self, connection: Connection, state: ListedState | None, name: str | None, limit: int, sealing: Sealing | None
    ) -> list[Entry]:
        """See :meth:`~idempotency.stores.base.Listing.list_records`."""
        if not self._has_names:
            self._look_for_names(connection)
        values = (
            {"limit": limit}
            if name is None
            else {"limit": limit, "operation_name": storable_operation_name(name) or ""}
        )
        rows = self._execute(connection, self._sql.listed(state, named=name is not None), values).all()
        found: list[Entry] = []
        for row in rows:
            with suppress(UnreadableError):
                found.append(_entry(row, sealing))
        return found

    def resolve(
        self,
        connection: Connection,
        record: bytes,
        outcome: Literal["done", "release"],
        result: bytes | None,
        ttl: float,
    ) -> bool:
        """See :meth:`~idempotency.stores.base.Housekeeping.resolve`."""
        if outcome == "release":
            return self._execute(connection, self._sql.resolve_release, {"id": record}).rowcount > 0
        check_size(connection, result)
        values = {
            "id": record,
            "result": result,
            "token": os.urandom(16).hex(),
            "keep": milliseconds(seconds("ttl", ttl)),
        }
        return self._execute(connection, self._sql.resolve_done, values).rowcount > 0

    def forget(self, connection: Connection, record: bytes) -> bool:
        """Delete a record, unless its owner is running."""
        return self._execute(connection, self._sql.forget, {"id": record}).rowcount > 0

    def purge(self, connection: Connection, batch: int) -> int:
        """See :meth:`~idempotency.stores.base.Housekeeping.purge`."""
        if not self._sql.purge_resumes:
            return self._execute(connection, self._sql.purge, {"limit": batch}).rowcount
        has_places = self._execute(connection, self._sql.has_places, {"relation": self._sql.relation}).scalar()
        purge = self._sql.purge if has_places else self._sql.purge_by_id
        after, self._purged_until = self._purged_until, 0
        purged = self._purged(connection, purge, batch, after)
        if after and len(purged) < batch:
            purged += self._purged(connection, purge, batch - len(purged), 0)
        if len(purged) == batch:
            self._purged_until = max(purged, default=0)
        return len(purged)

    def _purged(self, connection: Connection, purge: TextClause, batch: int, after: int) -> list[int]:
        return list(self._execute(connection, purge, {"limit": batch, "after": after}).scalars())

    def check(self, connection: Connection) -> None:
        """Read every column of no row, which fails unless the server answers and the table has the columns."""
        self._execute(connection, self._sql.check, {}).all()

    def _execute(self, connection: Connection, statement: TextClause, values: dict[str, Any]) -> CursorResult[Any]:
        if self._sql.packs:
            values = packed(values)
        if not self._lowers_lock_wait or statement.text.startswith("SELECT"):
            return connection.execute(statement, values)
        with lowered_lock_wait(connection, self.lock_wait):
            return connection.execute(statement, values)


def claim_values(claim: Claim, asked: Asked, sealing: Sealing | None) -> dict[str, Any]:
    """Return the parameters of the statements that claim."""
    if sealing is None:
        scope, key = storable(claim.scope), storable(claim.key)
    else:
        scope, key = map(storable_name, sealing.names(claim))
    return {
        "id": claim.id,
        "scope": scope,
        "key": key,
        "token": claim.token,
        "fingerprint": claim.fingerprint,
        "hold": claim.hold,
        "watched": claim.watched,
        "operation_name": storable_operation_name(claim.name),
        "latest": asked.latest,
        "lease": milliseconds(claim.lease),
        "keep": None if claim.hold else milliseconds(claim.lease + claim.ttl),
    }


def complete_values(claim: Claim, result: bytes | None, state: State) -> dict[str, Any]:
    """Return the parameters of the statement that completes."""
    keep = None if state is State.UNKNOWN else milliseconds(claim.ttl)
    return {"id": claim.id, "token": claim.token, "state": int(state), "result": result, "keep": keep}


def notification_values(claim: Claim, table: Table) -> dict[str, Any]:
    """Return the parameters of the notification that the statements which end a claim send to its watchers."""
    return {"channel": table.name, "payload": claim.id.hex()}


class Found(NamedTuple):
    """A row as the statements ``claim`` and ``look`` return it, from a cursor that has no names of columns."""

    version: Any
    state: Any
    token: Any
    fingerprint: Any
    attempt: Any
    hold: Any
    lease_until_ms: Any
    created_ms: Any
    now_ms: Any
    result: Any
    free: Any = None


def read_record(row: Row[Any] | Found, record_id: bytes = b"", sealing: Sealing | None = None) -> Record:
    """Read the row of this id; a damaged one, or one that cannot be decrypted, is ``Record.unreadable()``."""
    # SQLite stores anything in any column, and a row may have been written by hand: every value is checked.
    try:
        version, now = int(row.version), float(row.now_ms)
        if version > FORMAT:
            return Record.unreadable(version)
        record = Record(
            token=as_text(row.token),
            fingerprint=as_bytes(row.fingerprint),
            state=State(row.state),
            attempt=int(row.attempt),
            lease_left=(float(row.lease_until_ms) - now) / 1000,
            hold=as_flag(row.hold),
            result=opened_result(sealing, record_id, None if row.result is None else as_bytes(row.result)),
            version=version,
            age=max(0.0, now - float(row.created_ms)) / 1000,
        )
    except (TypeError, ValueError, OverflowError, UnreadableError):
        return Record.unreadable()
    return record if record.version >= 1 and record.attempt >= 1 else Record.unreadable()


def _entry(row: Row[Any], sealing: Sealing | None) -> Entry:
    try:
        record, stored_scope = bytes(row.id), stored_name(row.scope)
        scope, key = shown(sealing, record, stored_scope, stored_name(row.key))
        return Entry(
            id=record,
            scope=scope,
            key=key,
            state=State(row.state),
            attempt=int(row.attempt),
            hold=as_flag(row.hold),
            age=float(row.age) / 1000,
            lease_left=max(float(row.lease_left), -float(row.age)) / 1000,
            expires_in=None if row.expires_in is None else float(row.expires_in) / 1000,
            result_size=shown_size(stored_scope, None if row.result_size is None else int(row.result_size)),
            version=int(row.version),
            name="" if row.operation_name is None else stored(row.operation_name),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UnreadableError(f"the record {bytes(row.id).hex()[:12]} is damaged") from error

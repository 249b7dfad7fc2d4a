"""The audit in a SQL database: a table beside that of the records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Connection, Table, delete, func, insert, literal_column, select, update
from sqlalchemy.exc import DBAPIError

from idempotency._sql.clock import NOW_MS
from idempotency._sql.driver import lock_wait_limit
from idempotency._sql.failures import MadeBy, describe_failure, is_repeatable, lacks_table, unusable
from idempotency._sql.sqlite import lowered_lock_wait
from idempotency._sql.tables import create_tables
from idempotency.errors import IdempotencyError
from idempotency.stores._auditing import AUDITED, Action
from idempotency.stores.sql._database import Work
from idempotency.stores.sql._values import in_ascii, stored

T = TypeVar("T")

AUDIT = MadeBy(
    "idempotency schema create",
    "SQLStore.create_schema() or create_schema_sync()",
    "idempotency.stores.sql.audit_table",
)


class Audit:
    """The statements over the table of the audit, each as a function of a connection."""

    def __init__(self, table: Table, timeout: float) -> None:
        self.table = table
        self._lock_wait = lock_wait_limit(timeout)

    def write_down(self, connection: Connection, action: Action) -> None:
        """Insert an action, and delete the oldest of too many."""
        row = self.table.c
        values = {
            "id": action.id,
            "began_ms": _now(connection),
            "operator": in_ascii(action.operator),
            "action": in_ascii(action.name),
            "thing": in_ascii(action.thing),
            "reason": in_ascii(action.reason),
        }
        with self._writing(connection):
            if connection.dialect.name == "sqlite":
                create_tables(connection, self.table)
            connection.execute(insert(self.table).values(values))
            last: int = connection.execute(select(func.max(row.seq))).scalar_one()
            connection.execute(delete(self.table).where(row.seq <= last - AUDITED))

    def write_outcome(self, connection: Connection, id: str, outcome: str) -> None:
        """Write the outcome of an action."""
        changed = update(self.table).where(self.table.c.id == id).values(outcome=in_ascii(outcome))
        with self._writing(connection):
            connection.execute(changed)

    def actions(self, connection: Connection, limit: int) -> list[Action]:
        """Read the last actions."""
        row = self.table.c
        age = (_now(connection) - row.began_ms).label("age_ms")
        query = select(row.id, row.operator, row.action, row.thing, row.reason, row.outcome, age)
        try:
            with self._describing(connection):
                found = connection.execute(query.order_by(row.seq.desc()).limit(limit)).all()
        except DBAPIError as error:
            # There, the table is created with the first action.
            if connection.dialect.name == "sqlite" and lacks_table(error):
                return []
            raise
        return [_action(each) for each in found]

    @contextmanager
    def _writing(self, connection: Connection) -> Iterator[None]:
        with self._describing(connection):
            if connection.dialect.name != "sqlite":
                yield
                return
            with lowered_lock_wait(connection, self._lock_wait):
                yield

    @contextmanager
    def _describing(self, connection: Connection) -> Iterator[None]:
        """Raise what fails within as a StoreError about this table, unless it may succeed if repeated."""
        try:
            yield
        except IdempotencyError:
            raise
        except Exception as error:  # a driver whose connection dies may raise anything
            absent = connection.dialect.name == "sqlite" and lacks_table(error)
            if absent or is_repeatable(error) or unusable(error):
                raise
            schema = connection.schema_for_object(self.table)
            name = self.table.name if schema is None else f"{schema}.{self.table.name}"
            failure = describe_failure(error, connection.engine.url, name, AUDIT)
            raise failure from getattr(error, "orig", None) or error


class AuditInSQL:
    """The audit of a :class:`~idempotency.stores.sql.SQLStore`, which sets the attributes."""

    _audit: Audit

    async def _run(self, work: Work[T], transaction: bool = False) -> T:
        raise NotImplementedError

    async def write_down(self, action: Action, /) -> None:
        """See :meth:`idempotency.stores.base.Auditing.write_down`. On SQLite its table is created at the first use."""
        await self._run(lambda _, connection: self._audit.write_down(connection, action), transaction=True)

    async def write_outcome(self, id: str, outcome: str, /) -> None:
        """See :meth:`idempotency.stores.base.Auditing.write_outcome`."""
        await self._run(lambda _, connection: self._audit.write_outcome(connection, id, outcome))

    async def actions(self, limit: int = 100) -> list[Action]:
        """See :meth:`idempotency.stores.base.Auditing.actions`."""
        return await self._run(lambda _, connection: self._audit.actions(connection, limit))


def _now(connection: Connection) -> Any:
    return literal_column(NOW_MS[connection.dialect.name], BigInteger)


def _action(row: Any) -> Action:
    return Action(
        id=row.id,
        operator=stored(row.operator),
        name=stored(row.action),
        thing=stored(row.thing),
        reason=stored(row.reason),
        outcome=None if row.outcome is None else stored(row.outcome),
        age=max(0, row.age_ms) / 1000,
    )

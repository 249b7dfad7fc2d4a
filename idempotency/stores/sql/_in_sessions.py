"""The verbs of the SQL store in a transaction of the caller: a session's, for asyncio and for threads."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idempotency._rules import Claim, Record, State
from idempotency._sagas.journal import Open, Write
from idempotency._sql.bounded import InFlight, Watchdog
from idempotency._sql.failures import replacing
from idempotency._sql.send import pooled
from idempotency._sql.session_failures import connecting
from idempotency._sql.sessions import is_autocommit
from idempotency.errors import StoreError, TransactionError
from idempotency.stores._clock_guard import ClockGuard
from idempotency.stores._sealing import Sealing, sealed_result
from idempotency.stores.sql._joined import JoinedVerbs
from idempotency.stores.sql._sagas import SagaVerbs
from idempotency.stores.sql._table import check_same_schema, schema_by

_CLAIMED_IN = "idempotency: the schema of the claim"
"""A key of ``session.info``: the schema in which this session itself has claimed. Else the store's engine has."""

_AUTOCOMMIT = "the session is in AUTOCOMMIT: it has no transaction in which a step commits together with its effect"

_CUT_OFF_WAIT = 0.25
"""Seconds within which a driver notices that its connection is cut off."""


class InSessions:
    """What a store does in the transactions of sessions on its database; the store sets the attributes."""

    watchdog: Watchdog
    _table: Table
    _timeout: float
    _sealing: Sealing | None
    _clock_guard: ClockGuard
    _joined: JoinedVerbs | None
    _sagas: SagaVerbs

    @property
    def writes_names(self) -> bool:
        """Return whether the names of operations are written."""
        raise NotImplementedError

    @property
    def _schema(self) -> str | None:
        """Return the schema in which the store's own engine finds the table."""
        raise NotImplementedError

    def check_same_table(self, options: Mapping[str, Any]) -> None:
        """Raise ConfigurationError unless sessions with these execution options use the same table as the store."""
        check_same_schema(self._table, self._schema, schema_by(options, self._table))

    async def claim_in(self, session: AsyncSession, claim: Claim, *, wait: float) -> Record | None:
        """Claim in the transaction of ``session``, which must be on this store's database; commit nothing.

        Where another transaction holds the row uncommitted, this waits for it for up to ``wait`` seconds (MariaDB and
        MySQL: whole seconds, rounded up; SQLite: for any other writer of the database). None: that transaction still
        holds the row. After None or an error, the caller's transaction can only be rolled back. Raises
        :class:`~idempotency.errors.StoreError`, also where a transaction that begins anew can succeed. The connection
        is cut off if the server does not answer within ``wait`` and the store's ``timeout``.
        """
        statement, limit = InFlight(), math.ceil(wait) + self._timeout
        # The connection is cut off first, which the driver notices at once. Then the task is cancelled: a driver ends a
        # cancelled statement by asking the server to, and waits for the answer, unless there is no connection.
        cut = asyncio.get_running_loop().call_later(limit, statement.cut_off)
        try:
            async with asyncio.timeout(limit + _CUT_OFF_WAIT):
                return await session.run_sync(self._claim_in, claim, wait, statement)
        except TimeoutError as error:
            raise StoreError(f"the claim was not answered within {limit:g} s: is the database running?") from error
        finally:
            cut.cancel()

    def claim_in_sync(self, session: Session, claim: Claim, *, wait: float) -> Record | None:
        """See :meth:`claim_in`."""
        statement = InFlight()
        with self.watchdog.watch(math.ceil(wait) + self._timeout, statement.cut_off):
            return self._claim_in(session, claim, wait, statement)

    def _claim_in(self, session: Session, claim: Claim, wait: float, statement: InFlight) -> Record | None:
        joined = self._joined_verbs(session)
        with joined.describing_failures():
            connection = session.connection()
            session.info[_CLAIMED_IN] = connection.schema_for_object(self._table)
            statement.driver, statement.connection = connection.dialect.driver, pooled(connection)
            return joined.claim_in(connection, claim, wait, self._sealing)

    async def look_in(self, session: AsyncSession, claim: Claim) -> Record | None:
        """Return the committed record, if it is not free for ``claim`` and can be read without a wait."""
        return await session.run_sync(self.look_in_sync, claim)

    def look_in_sync(self, session: Session, claim: Claim) -> Record | None:
        """See :meth:`look_in`."""
        try:
            return self._joined_verbs(session).look(session.connection(), claim, self._sealing)
        except (StoreError, DBAPIError):
            # The claim comes next, and raises what is wrong.
            return None

    async def complete_in(
        self, session: AsyncSession, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """Record the end in the transaction of ``session``, which must be on this store's database; commit nothing."""
        return await session.run_sync(lambda sync_session: self.complete_in_sync(sync_session, claim, result, state))

    def complete_in_sync(
        self, session: Session, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """See :meth:`complete_in`."""
        connection, sealed = session.connection(), sealed_result(self._sealing, claim.id, result)
        here = connection.schema_for_object(self._table)
        check_same_schema(self._table, session.info.get(_CLAIMED_IN, self._schema), here)
        with replacing(connection):
            return self._joined_verbs(session).complete(connection, claim, sealed, state)

    async def journal_in(self, session: AsyncSession, request: Write | Open, /) -> Any:
        """Write entries of a saga, or record one, in the transaction of ``session``, on this store's database.

        The row of the saga is locked until that transaction ends: others that write it wait, also to renew its lease.
        Raises :class:`~idempotency.errors.TransactionError` where each statement is committed by itself.
        """
        return await session.run_sync(self.journal_in_sync, request)

    def journal_in_sync(self, session: Session, request: Write | Open, /) -> Any:
        """See :meth:`journal_in`."""
        joined = self._joined_verbs(session)
        with joined.describing_failures():
            connection = session.connection()
            if is_autocommit(connection):
                raise TransactionError(_AUTOCOMMIT)
            check_same_schema(self._table, self._schema, connection.schema_for_object(self._table))
            with replacing(connection):
                return self._sagas.answer_in(connection, request, self._sealing)

    def _joined_verbs(self, session: Session) -> JoinedVerbs:
        if self._joined is None:
            with connecting(session):
                engine = session.connection().engine
            self._joined = JoinedVerbs(
                engine, self._table, self._timeout, self._clock_guard, writes_names=self.writes_names
            )
        return self._joined

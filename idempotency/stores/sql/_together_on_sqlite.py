"""Send claims, and completions, together on SQLite: each flight is one switch to aiosqlite's thread, one transaction.

A flight executes the statements that its calls would execute alone. SQLite waits for the disk at each commit, and one
thread switch takes longer than ten statements.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.util import greenlet_spawn

from idempotency._rules import Claim, Record
from idempotency._sql.bounded import InFlight
from idempotency._sql.failures import describe_failure, refuses_data, waited_for_lock
from idempotency._sql.send import Compiled, as_sqlalchemy_error, pooled
from idempotency._sql.sqlite import in_its_thread, is_cut_off, writing
from idempotency.errors import StoreError
from idempotency.stores._clock_guard import Asked, ClockGuard
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._database import Database
from idempotency.stores.sql._verbs import Found, Verbs, claim_values, read_record

Values = dict[str, Any]
Answers = dict[int, Any]
"""The answers that are certain, by the number of the call: those of a transaction are, once it is committed."""


class _Opened:
    """The driver's connection ``opened``, in its own thread. ``driver``: the one of aiosqlite to which it belongs."""

    def __init__(self, opened: sqlite3.Connection, driver: Any, verbs: Verbs) -> None:
        assert verbs.one_by_one is not None
        self._opened = opened
        self._sql = verbs.one_by_one
        self._writing = partial(writing, opened, verbs.lock_wait, partial(is_cut_off, driver))

    def look(self, values: Values) -> Found | None:
        row = self._execute(self._sql.look, values).fetchone()
        return None if row is None else Found(*row)

    def write(self, calls: dict[int, Values], send: Callable[[Values], Any]) -> Answers:
        """Send calls in one transaction, and return what ``send`` returns; None for those whose data is refused."""
        sent: Answers = {}
        with self._writing():
            for number, values in calls.items():
                try:
                    sent[number] = send(values)
                except Exception as error:  # values that the driver cannot encode raise others than its own
                    # SQLite undoes the statement alone, unless a trigger or a constraint asks for more.
                    if not self._opened.in_transaction or not refuses_data(error):
                        raise
                    sent[number] = None
        return sent

    def claim(self, values: Values) -> Found | None:
        rows = self._execute(self._sql.claim, values).fetchall()
        if rows:
            return Found(*rows[0])
        # Another writer has taken the record since it was looked for.
        row = self.look(values)
        return None if row is None or row.free else row

    def complete(self, values: Values) -> bool:
        return self._execute(self._sql.complete, values).rowcount > 0

    def _execute(self, statement: Compiled, values: Values) -> sqlite3.Cursor:
        return self._opened.execute(statement.sql, statement.parameters(values))


class OnSQLite:
    """How the flights of one store send their calls on SQLite."""

    def __init__(self, database: Database, guard: ClockGuard, sealing: Sealing | None) -> None:
        self._database = database
        self._guard = guard
        self._sealing = sealing

    async def claims(self, claims: Sequence[Claim], statement: InFlight) -> Sequence[Record | Exception | None]:
        """Claim. A flight in which every record is another's writes nothing, and waits for no lock."""
        asked = [self._guard.ask(claim) for claim in claims]
        values = [claim_values(claim, each, self._sealing) for claim, each in zip(claims, asked, strict=True)]

        def work(opened: _Opened, answers: Answers) -> None:
            found = {number: opened.look(each) for number, each in enumerate(values)}
            answers |= {number: row for number, row in found.items() if row is not None and not row.free}
            free = {number: each for number, each in enumerate(values) if number not in answers}
            if free:
                answers |= opened.write(free, opened.claim)

        answers = await self._fly(len(claims), work, statement)
        return [self._read(*each) for each in zip(claims, asked, answers, strict=True)]

    def _read(self, claim: Claim, asked: Asked, answer: Found | Exception | None) -> Record | Exception | None:
        if not isinstance(answer, Found):
            return answer
        return self._guard.read(asked, claim, read_record(answer, claim.id, self._sealing), float(answer.now_ms))

    async def completions(self, calls: Sequence[Values], statement: InFlight) -> Sequence[bool | Exception | None]:
        """Complete."""

        def work(opened: _Opened, answers: Answers) -> None:
            answers |= opened.write(dict(enumerate(calls)), opened.complete)

        return await self._fly(len(calls), work, statement)

    async def _fly(self, count: int, work: Callable[[_Opened, Answers], None], statement: InFlight) -> list[Any]:
        """Return an answer for each call. Raises an error where none of them took effect."""
        self._database.still_together()

        def perform(verbs: Verbs, connection: Connection) -> list[Any]:
            answers: Answers = {}
            driver: Any = pooled(connection).driver_connection
            try:
                in_its_thread(connection, lambda opened: work(_Opened(opened, driver, verbs), answers))
            except Exception as error:
                failure = as_sqlalchemy_error(connection, "", error)
                if not waited_for_lock(failure):
                    raise failure from error
                # Each of the rest has waited for as long as it would alone.
                described = str(describe_failure(failure, connection.engine.url, self._database.name))
                return [answers[number] if number in answers else StoreError(described) for number in range(count)]
            return [answers[number] for number in range(count)]

        return await greenlet_spawn(self._database.perform, perform, statement)

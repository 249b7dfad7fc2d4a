"""Send claims, and completions, together: each kind in flights of its own.

What a flight gives back is sent alone, as everything is where flights are not possible. Three kinds of call are never
in a flight: those of a record of which a call is being sent alone, because its row may be locked; claims that ask to be
watched; and completions with a large result.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from sqlalchemy.util import greenlet_spawn

from idempotency._rules import Claim, Record, State
from idempotency._sql.bounded import Abandoned, InFlight
from idempotency._sql.failures import refuses_one
from idempotency._synchronization import Deadline
from idempotency.stores._clock_guard import Asked, ClockGuard
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._database import Database
from idempotency.stores.sql._flights import Flights, Limits
from idempotency.stores.sql._together_on_sqlite import OnSQLite
from idempotency.stores.sql._verbs import Found, claim_values, complete_values, read_record

T = TypeVar("T")
Call = TypeVar("Call")

Alone = Callable[[float], Awaitable[T]]
"""A function that sends one call alone, for at most the given seconds."""

_WAIT = "25ms"
"""How long a flight waits for a lock: for longer than most commits take. Several completions do not wait."""

_WAIT_AGAIN = "5ms"
"""How long each half of a flight waits, where the whole has waited in vain: such a lock may remain for long."""

_LARGEST = 64 * 1024
"""Bytes of the largest result in a flight."""

_CLAIMED = ("id", "scope", "key", "token", "fingerprint", "hold", "latest", "lease", "keep")
_COMPLETED = ("id", "token", "state", "result", "keep")

Values = dict[str, Any]
"""The parameters of one call."""


class Together:
    """The claims and completions of one store in one event loop.

    ``slots``: how many statements may be under way at once. ``timeout``: seconds for each call.
    """

    def __init__(
        self,
        database: Database,
        slots: asyncio.Semaphore,
        *,
        timeout: float,
        abandoned: Abandoned,
        guard: ClockGuard,
        sealing: Sealing | None,
    ) -> None:
        self._database = database
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        limits = Limits(slots, timeout, abandoned)
        way: OnSQLite | _OnPostgreSQL
        way = (OnSQLite if database.engine.dialect.name == "sqlite" else _OnPostgreSQL)(database, guard, sealing)
        self._claims: Flights[Claim, Record] = Flights(way.claims, _is_owned_by_another, limits)
        self._completions: Flights[Values, bool] = Flights(way.completions, lambda *_: False, limits)
        # A call that was given back may wait for a lock. So such calls do not take all of the slots, and those of one
        # record do not take more than one.
        self._alone_slots = asyncio.Semaphore(max(1, database.max_parallel - 2))
        self._alone: Counter[bytes] = Counter()
        self._record_locks: defaultdict[bytes, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def claim(self, claim: Claim, alone: Alone[Record]) -> Record:
        """Claim, in a flight where that is possible. Raises TimeoutError, and what ``alone`` raises."""
        if claim.watched or self._database.together is None:
            return await alone(self._timeout)
        return await self._send(self._claims, claim.id, claim, len(claim.scope) + len(claim.key), alone)

    async def complete(self, claim: Claim, result: bytes | None, state: State, alone: Alone[bool]) -> bool:
        """Complete, in a flight where that is possible. ``result`` is sealed. See :meth:`claim` for what is raised."""
        size = 0 if result is None else len(result)
        if size > _LARGEST or self._database.together is None:
            return await alone(self._timeout)
        return await self._send(self._completions, claim.id, complete_values(claim, result, state), size, alone)

    async def _send(self, flights: Flights[Call, T], record: bytes, call: Call, size: int, alone: Alone[T]) -> T:
        loop = self._loop
        deadline = loop.time() + self._timeout
        if record not in self._alone:
            answer = await flights.send(record, call, size)
            if answer is not None:
                return answer
        self._alone[record] += 1
        try:
            async with AsyncExitStack() as entered:
                with Deadline(loop, deadline - loop.time()):
                    await entered.enter_async_context(self._record_locks[record])
                    await entered.enter_async_context(self._alone_slots)
                return await alone(max(0.0, deadline - loop.time()))
        finally:
            self._alone[record] -= 1
            if not self._alone[record]:
                del self._alone[record], self._record_locks[record]


class _OnPostgreSQL:
    """How the flights of one store send their calls on PostgreSQL: a flight is one statement."""

    def __init__(self, database: Database, guard: ClockGuard, sealing: Sealing | None) -> None:
        self._database = database
        self._guard = guard
        self._sealing = sealing

    async def claims(self, claims: Sequence[Claim], statement: InFlight) -> Sequence[Record | None]:
        """Claim."""
        found = await self._find(claims, statement, _WAIT)
        # Where neither a row was found nor one was made, another transaction has made it meanwhile.
        missed = [claim for claim in claims if claim.id not in found]
        if missed:
            found |= await self._find(missed, statement, _WAIT)
        return [found.get(claim.id) for claim in claims]

    async def _find(self, claims: Sequence[Claim], statement: InFlight, wait: str) -> dict[bytes, Record | None]:
        """Send claims, and return what was found under each id: None where the claim must be sent alone."""
        if len(claims) == 1:
            return await self._find_one(claims[0], statement, wait)
        asked = [self._guard.ask(claim) for claim in claims]
        values = [claim_values(claim, each, self._sealing) for claim, each in zip(claims, asked, strict=True)]
        try:
            settings = {"wait": wait, "commit": _synchronous_commit(claims)}
            rows = await self._fetch("claims", _arrays(_CLAIMED, values) | settings, statement)
        except Exception as error:
            if not refuses_one(error):
                raise
            half = len(claims) // 2
            found = await self._find(claims[:half], statement, _WAIT_AGAIN)
            return found | await self._find(claims[half:], statement, _WAIT_AGAIN)
        rows_found = {bytes(row[0]): Found(*row[1:]) for row in rows}
        return {
            claim.id: None if row.free else self._read(claim, each, row)
            for claim, each in zip(claims, asked, strict=True)
            if (row := rows_found.get(claim.id)) is not None
        }

    async def _find_one(self, claim: Claim, statement: InFlight, wait: str) -> dict[bytes, Record | None]:
        asked = self._guard.ask(claim)
        settings = {"wait": wait, "commit": _synchronous_commit([claim])}
        try:
            rows = await self._fetch("claim", claim_values(claim, asked, self._sealing) | settings, statement)
        except Exception as error:
            if not refuses_one(error):
                raise
            return {claim.id: None}
        row = next(iter(rows), None)
        return {} if row is None else {claim.id: self._read(claim, asked, Found(*row))}

    def _read(self, claim: Claim, asked: Asked, row: Found) -> Record:
        if row.version is None:
            # There was no record: the claim has made it.
            record = Record(token=claim.token, fingerprint=claim.fingerprint, lease_left=claim.lease, hold=claim.hold)
        else:
            record = read_record(row, claim.id, self._sealing)
        return self._guard.read(asked, claim, record, float(row.now_ms))

    async def completions(self, calls: Sequence[Values], statement: InFlight) -> Sequence[bool | None]:
        """Complete."""
        ended = await self._end(calls, statement)
        return [True if call["id"] in ended else None for call in calls]

    async def _end(self, calls: Sequence[Values], statement: InFlight) -> set[bytes]:
        """Send completions, and return the ids of those that were recorded."""
        channel = self._database.table.name
        try:
            if len(calls) == 1:
                payload = {"channel": channel, "payload": calls[0]["id"].hex(), "wait": _WAIT}
                rows = await self._fetch("completion", calls[0] | payload, statement)
                return {calls[0]["id"] for _ in rows}
            values = {**_arrays(_COMPLETED, calls), "channel": channel}
            return {bytes(row[0]) for row in await self._fetch("completions", values, statement)}
        except Exception as error:
            if not refuses_one(error):
                raise
            if len(calls) == 1:
                return set()
            half = len(calls) // 2
            return await self._end(calls[:half], statement) | await self._end(calls[half:], statement)

    async def _fetch(self, verb: str, values: Values, statement: InFlight) -> Iterable[Sequence[Any]]:
        return await greenlet_spawn(self._database.fetch, verb, values, statement)


def _is_owned_by_another(record: Record, claim: Claim) -> bool:
    """Return whether a record, as another claim found or made it, is what ``claim`` would find too."""
    if not record.readable:
        return False
    return record.state is not State.RUNNING or (record.lease_left > 0 and record.token != claim.token)


def _synchronous_commit(claims: Sequence[Claim]) -> str | None:
    """Return how the claims are committed; None: as the connection is set.

    An owner that holds its key must not run where its claim may be lost: it asks that nothing runs twice.
    """
    return "off" if all(claim.transactional and not claim.hold for claim in claims) else None


def _arrays(names: Iterable[str], calls: Sequence[Values]) -> Values:
    return {f"{name}s": [call[name] for call in calls] for name in names}

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
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, Protocol, TypeVar

from sqlalchemy.util import greenlet_spawn

from idempotency._rules import Claim, Record, State
from idempotency._sql.bounded import Abandoned, InFlight
from idempotency._sql.failures import refuses_one
from idempotency._synchronization import Deadline
from idempotency.stores._clock_guard import Asked, ClockGuard
from idempotency.stores._sealing import Sealing
from idempotency.stores.sql._database import Database, Work
from idempotency.stores.sql._flights import Flights, Limits
from idempotency.stores.sql._operation_name import COLUMN
from idempotency.stores.sql._statements import CLAIMED_TOGETHER, COMPLETED_TOGETHER, SENT_AS_ARRAY
from idempotency.stores.sql._together_on_sqlite import OnSQLite
from idempotency.stores.sql._values import array_text
from idempotency.stores.sql._verbs import Found, claim_values, complete_values, read_record

T = TypeVar("T")
Call = TypeVar("Call")

_WAIT = "25ms"
"""How long a flight waits for a lock: for longer than most commits take. Several completions do not wait."""

_WAIT_AGAIN = "5ms"
"""How long each half of a flight waits, where the whole has waited in vain: such a lock may remain for long."""

_LARGEST = 64 * 1024
"""Bytes of the largest result in a flight."""

Values = dict[str, Any]
"""The parameters of one call."""


class Run(Protocol):
    """Perform one work on the table, for at most ``timeout`` seconds; without, for those of the store."""

    def __call__(self, work: Work[T], /, *, timeout: float = ...) -> Awaitable[T]: ...


class Together:
    """The claims and completions of one store in one event loop.

    ``run`` sends one call alone. ``slots``: how many statements may be under way at once. ``timeout``: seconds for each
    call.
    """

    def __init__(
        self,
        database: Database,
        run: Run,
        slots: asyncio.Semaphore,
        *,
        timeout: float,
        abandoned: Abandoned,
        guard: ClockGuard,
        sealing: Sealing | None,
    ) -> None:
        self._database = database
        self._run = run
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

    async def claim(self, claim: Claim, work: Work[Record]) -> Record:
        """Claim, in a flight where that is possible; ``work`` claims alone."""
        if claim.watched or not self._flies(self._claims):
            return await self._run(work)
        return await self._send(self._claims, claim.id, claim, len(claim.scope) + len(claim.key), work)

    async def complete(self, claim: Claim, result: bytes | None, state: State, work: Work[bool]) -> bool:
        """Complete, in a flight where that is possible; ``work`` completes alone. ``result`` is sealed."""
        size = 0 if result is None else len(result)
        if size > _LARGEST or not self._flies(self._completions):
            return await self._run(work)
        return await self._send(self._completions, claim.id, complete_values(claim, result, state), size, work)

    def _flies(self, flights: Flights[Any, Any]) -> bool:
        # It takes longer to ask the database than to do all else for a call. So a call that joins others does not ask:
        # each flight asks again before it is sent.
        return flights.is_awaited or self._database.together is not None

    async def _send(self, flights: Flights[Call, T], record: bytes, call: Call, size: int, work: Work[T]) -> T:
        loop = self._loop
        deadline = loop.time() + self._timeout
        try:
            if record not in self._alone:
                answer = await flights.send(record, call, size)
                if answer is not None:
                    return answer
            return await self._send_alone(record, work, deadline)
        except TimeoutError as error:
            raise self._database.no_answer() from error

    async def _send_alone(self, record: bytes, work: Work[T], deadline: float) -> T:
        loop = self._loop
        self._alone[record] += 1
        try:
            async with AsyncExitStack() as entered:
                with Deadline(loop, deadline - loop.time()):
                    await entered.enter_async_context(self._record_locks[record])
                    await entered.enter_async_context(self._alone_slots)
                return await self._run(work, timeout=max(0.0, deadline - loop.time()))
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
        send = partial(self._claim, statement)
        found = await _by_halves(send, claims, attrgetter("id"))
        # Where neither a row was found nor one was made, another transaction has made it meanwhile.
        missed = [claim for claim in claims if claim.id not in found]
        if missed:
            found |= await _by_halves(send, missed, attrgetter("id"))
        return [found.get(claim.id) for claim in claims]

    async def _claim(self, statement: InFlight, claims: Sequence[Claim], wait: str) -> dict[bytes, Record | None]:
        """Send claims, and return what was found under each id: None where the claim must be sent alone."""
        # The guard asks the same for all claims with one lease.
        asked = {lease: self._guard.ask(claim) for lease, claim in {claim.lease: claim for claim in claims}.items()}
        values = [claim_values(claim, asked[claim.lease], self._sealing) for claim in claims]
        settings = {"wait": wait, "commit": _synchronous_commit(claims)}
        if len(claims) == 1:
            rows = await self._fetch("claim", values[0] | settings, statement)
            found = {claim.id: Found(*row) for claim, row in zip(claims, rows, strict=False)}
        else:
            columns = _arrays((*CLAIMED_TOGETHER, COLUMN), values)
            rows = await self._fetch("claims", columns | settings, statement)
            found = {bytes(row[0]): Found(*row[1:]) for row in rows}
        return {
            claim.id: None if row.free else self._read(claim, asked[claim.lease], row)
            for claim in claims
            if (row := found.get(claim.id)) is not None
        }

    def _read(self, claim: Claim, asked: Asked, row: Found) -> Record:
        if row.version is None:
            # There was no record: the claim has made it.
            record = Record(token=claim.token, fingerprint=claim.fingerprint, lease_left=claim.lease, hold=claim.hold)
        else:
            record = read_record(row, claim.id, self._sealing)
        return self._guard.read(asked, claim, record, float(row.now_ms))

    async def completions(self, calls: Sequence[Values], statement: InFlight) -> Sequence[bool | None]:
        """Complete."""
        ended = await _by_halves(partial(self._complete, statement), calls, itemgetter("id"))
        return [ended.get(call["id"]) for call in calls]

    async def _complete(self, statement: InFlight, calls: Sequence[Values], wait: str) -> dict[bytes, bool | None]:
        """Send completions, and return True for the ids of those that were recorded."""
        settings = {"channel": self._database.table.name}
        if len(calls) == 1:
            settings |= {"payload": calls[0]["id"].hex(), "wait": wait}
            rows = await self._fetch("completion", calls[0] | settings, statement)
            return {call["id"]: True for call, _ in zip(calls, rows, strict=False)}
        rows = await self._fetch("completions", _arrays(COMPLETED_TOGETHER, calls) | settings, statement)
        return {bytes(row[0]): True for row in rows}

    async def _fetch(self, verb: str, values: Values, statement: InFlight) -> Sequence[Sequence[Any]]:
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
    columns = {f"{name}s": [call[name] for call in calls] for name in names}
    return {name: column if name == SENT_AS_ARRAY else array_text(column) for name, column in columns.items()}


async def _by_halves(
    send: Callable[[Sequence[Call], str], Awaitable[dict[bytes, T | None]]],
    calls: Sequence[Call],
    record: Callable[[Call], bytes],
    wait: str = _WAIT,
) -> dict[bytes, T | None]:
    """Send calls, and return what answers them, by their records; None for a call that is refused by itself.

    Where one of several is refused, each half is sent by itself.
    """
    try:
        return await send(calls, wait)
    except Exception as error:
        if not refuses_one(error):
            raise
    if len(calls) == 1:
        return {record(calls[0]): None}
    half = len(calls) // 2
    found = await _by_halves(send, calls[:half], record, _WAIT_AGAIN)
    return found | await _by_halves(send, calls[half:], record, _WAIT_AGAIN)

"""Sagas in the memory of one process."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from typing import Any, TypeVar, cast

from idempotency._sagas.journal import (
    Amend,
    Browse,
    Due,
    Entry,
    Leave,
    Look,
    Open,
    Phase,
    Purge,
    Put,
    Request,
    Row,
    Saga,
    Wake,
    Write,
)
from idempotency.stores._saga_sealing import opened_entry, opened_saga, readable, sealed, shown
from idempotency.stores._sealing import Sealing

R = TypeVar("R")

_DROPPED_PER_OPEN = 32


@dataclass(slots=True)
class _Stored:
    """A saga; its times are those of the clock. ``owned``: its token is that of a run that has not ended."""

    request: Open
    created: float
    due: float
    token: str = ""
    owned: bool = False
    phase: Phase = Phase.FORWARD
    attempt: int = 0
    crashes: int = 0
    wakes: int = 0
    reason: bytes = b""
    result: bytes | None = None
    expires: float = inf
    entries: dict[str, tuple[Entry, float, float]] = field(default_factory=dict)


class JournalInMemory:
    """The journal of a :class:`~idempotency.stores.memory.MemoryStore`, for any number of threads."""

    def __init__(self, clock: Callable[[], float], sealing: Sealing | None) -> None:
        self._sagas = _Sagas(clock, sealing)

    async def journal(self, request: Request[R], /) -> R:
        """See :meth:`idempotency._sagas.journal.Journaling.journal`."""
        return self._sagas.answer(request)

    def journal_sync(self, request: Request[R], /) -> R:
        """See :meth:`journal`."""
        return self._sagas.answer(request)


class _Sagas:
    """Every saga of a store, and when it answers what."""

    def __init__(self, clock: Callable[[], float], sealing: Sealing | None) -> None:
        self._clock = clock
        self._sealing = sealing
        self._lock = threading.Lock()
        self._sagas: dict[bytes, _Stored] = {}
        self._expiries: list[tuple[float, bytes]] = []

    def answer(self, request: Request[R]) -> R:
        """Answer a request."""
        written = sealed(self._sealing, request)
        with self._lock:
            return cast(R, self._answer(written, self._clock()))

    def _answer(self, request: Request[Any], now: float) -> object:
        match request:
            case Open():
                return self._open(request, now)
            case Write():
                return self._write(request, now)
            case Leave():
                return self._leave(request, now)
            case Put():
                return self._put(request, now)
            case Wake():
                return self._wake(request, now)
            case Amend():
                return self._amend(request, now)
            case Look():
                saga = self._live(request.id, now)
                return None if saga is None else self._whole(saga, now)
            case Due():
                return self._due(request, now)
            case Browse():
                return self._browse(request, now)
            case Purge():
                return self._drop_expired(now, request.batch)
            case _:
                raise AssertionError(request)

    def _open(self, request: Open, now: float) -> Saga | None:
        saga = self._live(request.id, now)
        if saga is None:
            if request.input is None:
                return None
            self._drop_expired(now, _DROPPED_PER_OPEN)
            saga = self._sagas[request.id] = _Stored(request, now, now + request.lease)
            if request.lease:
                saga.token, saga.owned, saga.attempt = request.token, True, 1
            return opened_saga(self._sealing, Saga(_row(saga, now)))
        same = request.input is None or request.fingerprint == saga.request.fingerprint
        again = saga.owned and saga.token == request.token
        if not request.lease or saga.phase.ended or not same or not (again or saga.due <= now):
            return opened_saga(self._sealing, Saga(_row(saga, now)))
        if not again:
            saga.attempt += 1
            saga.crashes += saga.owned
            saga.token, saga.owned = request.token, True
        saga.due = now + request.lease
        return self._whole(saga, now)

    def _write(self, request: Write, now: float) -> int | None:
        saga = self._live(request.id, now)
        if saga is None or not saga.owned or saga.token != request.token:
            return None
        saga.due = now + request.lease
        saga.crashes = 0 if request.progress else saga.crashes
        _change(saga, request.phase, request.result, request.entries, now)
        return saga.wakes

    def _leave(self, request: Leave, now: float) -> bool:
        saga = self._live(request.id, now)
        if saga is None or saga.token != request.token:
            return False
        if saga.owned:
            saga.owned = False
            saga.crashes = 0
            saga.reason = request.reason
            _change(saga, request.phase, request.result, request.entries, now)
            if request.phase is not None and request.phase.ended:
                saga.due, saga.expires = inf, now + request.ttl
                heapq.heappush(self._expiries, (saga.expires, request.id))
            elif saga.wakes != request.wakes:
                saga.due = now
            else:
                saga.due = inf if request.due is None else now + request.due
        return True

    def _put(self, request: Put, now: float) -> Entry | None:
        saga = self._live(request.id, now)
        if saga is None or saga.phase.ended:
            return None
        if request.entry.name not in saga.entries:
            _record(saga, (request.entry,), now)
            _call(saga, now)
        return opened_entry(self._sealing, request.id, _read(saga.entries[request.entry.name], now))

    def _wake(self, request: Wake, now: float) -> bool:
        saga = self._live(request.id, now)
        if saga is None or saga.phase.ended:
            return False
        if not saga.owned or saga.due <= now:
            saga.crashes = 0
        _call(saga, now)
        return True

    def _amend(self, request: Amend, now: float) -> bool:
        saga = self._live(request.id, now)
        if saga is None or saga.phase.ended or (saga.owned and saga.due > now):
            return False
        if request.attempt is not None and not _is_as_seen(saga, request.attempt, request.token):
            return False
        for name in request.without:
            saga.entries.pop(name, None)
        saga.owned, saga.token, saga.crashes = False, "", 0
        _change(saga, request.phase, request.result, request.entries, now)
        _call(saga, now)
        return True

    def _due(self, request: Due, now: float) -> list[Row]:
        found = [
            saga
            for saga in self._all(now)
            if saga.due <= now and (not request.names or saga.request.name in request.names)
        ]
        rows = (_row(saga, now) for saga in sorted(found, key=lambda each: each.due))
        return list(islice(readable(self._sealing, rows), request.limit))

    def _browse(self, request: Browse, now: float) -> list[Row]:
        found = [
            saga
            for saga in self._all(now)
            if (request.name is None or saga.request.name == request.name)
            and (request.ended or not saga.phase.ended)
            and (not request.stuck or (saga.due == inf and not saga.phase.ended))
        ]
        oldest = heapq.nsmallest(request.limit, found, key=lambda each: each.created)
        return [shown(self._sealing, _row(saga, now)) for saga in oldest]

    def _drop_expired(self, now: float, limit: int) -> int:
        dropped = 0
        while dropped < limit and self._expiries and self._expiries[0][0] <= now:
            expires, record = heapq.heappop(self._expiries)
            saga = self._sagas.get(record)
            if saga is not None and saga.expires == expires:
                del self._sagas[record]
                dropped += 1
        return dropped

    def _whole(self, saga: _Stored, now: float) -> Saga:
        return opened_saga(self._sealing, Saga(_row(saga, now), _entries(saga, now)))

    def _all(self, now: float) -> list[_Stored]:
        return [saga for saga in self._sagas.values() if saga.expires > now]

    def _live(self, record: bytes, now: float) -> _Stored | None:
        saga = self._sagas.get(record)
        return None if saga is None or saga.expires <= now else saga


def _change(saga: _Stored, phase: Phase | None, result: bytes | None, entries: Iterable[Entry], now: float) -> None:
    saga.phase = saga.phase if phase is None else phase
    saga.result = saga.result if result is None else result
    _record(saga, entries, now)


def _record(saga: _Stored, entries: Iterable[Entry], now: float) -> None:
    for entry in entries:
        began = saga.entries[entry.name][1] if entry.name in saga.entries else now
        saga.entries[entry.name] = entry, began, now


def _is_as_seen(saga: _Stored, attempt: int, token: str) -> bool:
    # Where an amendment is repeated, since its answer was lost, it has emptied the token itself.
    return saga.attempt == attempt and (not saga.token or (saga.token if saga.owned else "") == token)


def _call(saga: _Stored, now: float) -> None:
    saga.wakes += 1
    if not saga.owned:
        saga.due = min(saga.due, now)


def _read(stored: tuple[Entry, float, float], now: float) -> Entry:
    entry, began, changed = stored
    return replace(entry, began=now - began, changed=now - changed)


def _entries(saga: _Stored, now: float) -> tuple[Entry, ...]:
    return tuple(_read(stored, now) for stored in saga.entries.values())


def _row(saga: _Stored, now: float) -> Row:
    opened = saga.request
    return Row(
        id=opened.id,
        name=opened.name,
        key=opened.key,
        phase=saga.phase,
        token=saga.token if saga.owned else "",
        fingerprint=opened.fingerprint,
        input=opened.input or b"",
        attempt=saga.attempt,
        crashes=saga.crashes,
        wakes=saga.wakes,
        reason=saga.reason,
        result=saga.result,
        due_in=None if saga.due == inf else saga.due - now,
        deadline_in=None if opened.deadline is None else saga.created + opened.deadline - now,
        age=now - saga.created,
    )

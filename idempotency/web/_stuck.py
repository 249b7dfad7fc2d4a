"""What is stuck, and why: the rows of the page, from records, sagas, the outbox and its slots."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from idempotency._cli.records import keeps_sagas
from idempotency._cli.words import duration
from idempotency._rules import State
from idempotency.errors import StoreError, UnreadableError
from idempotency.saga import SagaOperations, SagaView
from idempotency.stores.base import Entry, ResolvingByParts, supports
from idempotency.web._words import Clock, kind_of, short, size, without_keys

if TYPE_CHECKING:
    from idempotency.outbox import OutboxEntry, OutboxOperations, OutboxStats
    from idempotency.outbox._slot import SlotState

Kind = Literal["request", "message", "function", "tool", "record", "saga", "step", "undo", "outbox", "slot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RECORDS: tuple[Kind, ...] = ("request", "message", "function", "tool", "record")
SAGAS: tuple[Kind, ...] = ("saga", "step", "undo")
STATES = ("unknown", "running", "waiting", "undoing", "stuck", "blocked", "dead", "unread", "lost")

PAGE = 50
"""Rows of a page."""

PAGES = 20
"""The most pages: what is beyond is found by a filter."""

COUNTED = 200
"""How many rows of a kind are counted."""

SECONDS = 0.15
"""For how long records are looked for in a store that has no index of those whose outcome is unknown."""

_NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for. ``page`` counts from 1. ``after``: where to look on among records."""

    kind: str = ""
    state: str = ""
    operator: bool = False
    page: int = 1
    after: str = ""

    @property
    def most(self) -> int:
        """How many rows of each source may be on this page or before it, and one that says whether there are more."""
        return self.page * PAGE + 1

    def includes(self, row: Row) -> bool:
        """Return whether a row is asked for."""
        kind, state = self.kind in ("", row.kind), self.state in ("", row.state)
        return kind and state and (not self.operator or row.next == _NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that is stuck or waits. ``waits``: for what. ``next``: what happens by itself; ``none``: nothing.

    ``path``: where it is shown, below the page.
    """

    kind: Kind
    id: str
    path: str
    name: str
    state: str
    waits: str
    attempts: int | None
    error: str
    age: float | None
    next: str


@dataclass(slots=True)
class Found:
    """What one source has found. ``unattended``: how many rows have the next action none. ``more``: or more."""

    rows: list[Row] = field(default_factory=list)
    unattended: int = 0
    more: bool = False
    slot_bytes: int | None = None
    after: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """The page: its rows, the numbers above them, and what could not be read."""

    rows: Sequence[Row]
    oldest: float | None
    unattended: str
    has_outbox: bool
    slot_bytes: int | None
    notes: Sequence[str]
    after: str
    has_next: bool


class Sources:
    """Where the rows come from: a store, and an outbox if there is one."""

    def __init__(self, store: Any, outbox: OutboxOperations | None) -> None:
        self._store = store
        self._outbox = outbox
        self._keeps_sagas = False

    async def read(self, wanted: Wanted, clock: Clock) -> Stuck:
        """Read all sources at the same time, and merge their rows, the oldest first."""
        sources = [self._records(wanted, clock), self._all_sagas(wanted, clock), self._messages(wanted, clock)]
        names = ("records", "sagas", "outbox")
        found = await asyncio.gather(*map(_read, names, sources))
        rows = [row for each in found for row in each.rows if wanted.includes(row)]
        rows.sort(key=lambda row: -1.0 if row.age is None else row.age, reverse=True)
        more = "+" if any(each.more for each in found) else ""
        return Stuck(
            rows=rows[(wanted.page - 1) * PAGE : wanted.page * PAGE],
            oldest=max((row.age for row in rows if row.age is not None), default=None),
            unattended=f"{sum(each.unattended for each in found)}{more}",
            has_outbox=self._outbox is not None,
            slot_bytes=found[2].slot_bytes,
            notes=[each.note for each in found if each.note],
            after=found[0].after,
            has_next=len(rows) > wanted.page * PAGE and wanted.page < PAGES,
        )

    async def _records(self, wanted: Wanted, clock: Clock) -> Found:
        found = Found()
        limit = max(wanted.most, COUNTED)
        if supports(self._store, ResolvingByParts):
            entries, found.after = await self._store.unresolved_part(limit, wanted.after, SECONDS)
        else:
            entries = await self._store.unresolved(limit)
        found.rows = [_of_record(entry, clock) for entry in entries]
        found.unattended, found.more = len(entries), len(entries) == limit or bool(found.after)
        return found

    async def _all_sagas(self, wanted: Wanted, clock: Clock) -> Found:
        self._keeps_sagas = self._keeps_sagas or await keeps_sagas(self._store)
        if not self._keeps_sagas:
            return Found()
        limit, sagas = max(wanted.most, COUNTED), SagaOperations(self._store)
        stuck = await sagas.sagas(state="stuck", limit=limit)
        views = {view.id: view for view in stuck}
        if not wanted.operator and wanted.state != "stuck" and wanted.kind in ("", *SAGAS):
            views |= {view.id: view for view in await sagas.sagas(limit=wanted.most)}
        rows = [_of_saga(view, clock) for view in views.values()]
        return Found(rows=rows, unattended=len(stuck), more=len(stuck) == limit)

    async def _messages(self, wanted: Wanted, clock: Clock) -> Found:
        if self._outbox is None:
            return Found()
        limit = wanted.most
        stats = await self._outbox.stats()
        blocked = await self._outbox.blocked(limit=limit) if stats.blocked else []
        dead = await self._outbox.messages(dead=True, limit=limit) if stats.dead else []
        slots = await self._outbox.slots()
        rows = [*_of_blocked(blocked, clock), *(_of_dead(message) for message in dead)]
        rows += [_of_slot(name, state) for name, state in slots.items() if state.lost or not state.active]
        rows += _of_relays(stats)
        unattended = stats.dead + sum(row.next == _NONE and row.state != "dead" for row in rows)
        retained = [state.retained for state in slots.values() if state.retained is not None]
        return Found(rows=rows, unattended=unattended, slot_bytes=sum(retained) if slots else None)


async def _read(name: str, source: Awaitable[Found]) -> Found:
    try:
        return await source
    except (StoreError, UnreadableError) as error:
        return Found(note=f"{name}: {error}")


def _of_record(entry: Entry, clock: Clock) -> Row:
    kind, name = kind_of(entry)
    why = "whether its effect happened is not known"
    if entry.state is State.RUNNING:
        why = f"its owner has vanished: its lease ended {clock.at(entry.lease_left)}"
    return _row(
        kind=kind,
        id=entry.id.hex(),
        path=f"record/{entry.id.hex()}",
        name=name,
        state="unknown",
        waits=f"operator: {why}",
        attempts=entry.attempt,
        age=entry.age,
    )


def _of_saga(saga: SagaView, clock: Clock) -> Row:
    kind: Kind = "saga"
    if saga.state == "undoing" or saga.step.startswith("undo:"):
        kind = "undo"
    elif saga.state == "stuck" and saga.step:
        kind = "step"
    return _row(
        kind=kind,
        id=saga.id,
        path=f"saga/{saga.id}",
        name=f"{saga.name}, {saga.step}" if saga.step else saga.name,
        state=saga.state,
        waits=saga_waits(saga, clock),
        attempts=saga.attempts,
        error=saga.error,
        age=saga.age,
        next=f"{saga.next} {clock.due(saga.next_in)}" if saga.next_in is not None else _NONE,
    )


def saga_waits(saga: SagaView, clock: Clock) -> str:
    """Return in words what a saga waits for."""
    reason = without_keys(saga.reason)
    if saga.next_in is None:
        return f"operator: {reason}" if saga.state == "stuck" else "nothing: it has ended"
    if saga.owner and saga.next_in > 0:
        return f"lease of {saga.owner} for {duration(saga.next_in)}"
    if saga.owner or saga.next_in <= 0:
        return f"a sweeper: {reason}"
    return reason


def _of_blocked(messages: Sequence[OutboxEntry], clock: Clock) -> list[Row]:
    rows: list[Row] = []
    first: dict[str, OutboxEntry] = {}
    for message in messages:
        before = first.setdefault(message.key, message)
        retried = f"retry {clock.due(message.due_in or 0.0)}"
        behind = f"key blocked by outbox row {short(before.id)}"
        rows.append(
            _of_message(
                message,
                waits=retried if before is message else behind,
                next=retried if before is message else f"publish, after {short(before.id)}",
            )
        )
    return rows


def _of_dead(message: OutboxEntry) -> Row:
    return _of_message(message, waits="operator: it was given up")


def _of_message(message: OutboxEntry, **values: Any) -> Row:
    return _row(
        kind="outbox",
        id=message.id,
        path=f"message/{message.id}",
        name=f"{message.type}, of {message.aggregate_type}",
        state=message.state,
        attempts=message.attempts,
        error=error_class(message.reason),
        age=message.age,
        **values,
    )


def _of_relays(stats: OutboxStats) -> list[Row]:
    waiting = stats.due + stats.blocked
    if stats.relays or not waiting:
        return []
    what = f"operator: no relay runs, and {waiting} message{'s' if waiting > 1 else ''} wait: start idempotency relay"
    return [_row(kind="outbox", id="relay", path="", name="relay", state="stuck", waits=what, age=stats.oldest_age)]


def _of_slot(name: str, slot: SlotState) -> Row:
    waits = (
        f"operator: it is lost, {slot.lost}" if slot.lost else "a relay that reads it: start idempotency relay --log"
    )
    retained = "" if slot.retained is None else f"; {size(slot.retained)} of log are retained"
    state = "lost" if slot.lost else "unread"
    return _row(kind="slot", id=name, path=f"slot/{name}", name=name, state=state, waits=f"{waits}{retained}")


def error_class(reason: str | None) -> str:
    """Return the class of an error that a reason names; the rest of it may quote the message."""
    words = (reason or "").replace(":", " ").split()
    return next((word for word in words if word.endswith(("Error", "Exception")) and word.isidentifier()), "")


def _row(**values: Any) -> Row:
    row: dict[str, Any] = {"attempts": None, "error": "", "age": None, "next": _NONE, **values}
    row["id"] = short(row["id"])
    return Row(**row)

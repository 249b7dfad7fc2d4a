"""A record of a key: shown, resolved, or forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from idempotency._cli.records import deliveries, find, forget_counts
from idempotency._cli.words import duration, state
from idempotency._rules import State
from idempotency.stores.base import Entry, Forgetting, Inspecting, Resolving, require
from idempotency.web._things import Offer, Thing, changed
from idempotency.web._words import Clock, ago, hidden, kind_of


class Records:
    """The records of a store."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._inspecting = require(store, Inspecting, "the page")
        self._resolving = require(store, Resolving, "the page")
        self._forgetting = require(store, Forgetting, "the page")

    async def ids(self, start: str) -> list[str]:
        """Return the ids that begin with these digits, at most two."""
        return [entry.id.hex() for entry in await find(self._store, start, 2)]

    async def look(self, id: str, clock: Clock) -> Thing | None:
        """Return the record of an id."""
        entry = await self._inspecting.inspect(bytes.fromhex(id)) if len(id) == 64 else None
        if entry is None:
            return None
        counted = {name: str(number) for name, number in (await deliveries(self._store, entry)).items()}
        facts = _facts(entry, clock) | counted
        offers = [*self._resolutions(entry), *self._forget(entry)]
        return Thing(kind="record", id=id, facts=facts, offers=offers, secrets={"key": entry.key, "scope": entry.scope})

    def _resolutions(self, entry: Entry) -> Iterator[Offer]:
        if not entry.unresolved or entry.counts is not None:
            return
        outcomes: dict[str, tuple[Literal["done", "release"], str]] = {
            "resolve done": ("done", "The effect happened. Duplicates get the answer that it is done."),
            "resolve not done": ("release", "The effect did not happen. The next request with the key runs."),
        }
        for name, (outcome, words) in outcomes.items():

            async def act(_: str, __: object, outcome: Literal["done", "release"] = outcome) -> str:
                resolved = await self._resolving.resolve(entry.id, outcome)
                return await self._without_counts(entry, changed(resolved, "done" if outcome == "done" else "released"))

            yield Offer(name=name, help=words, act=act, seen=_seen(entry), age=entry.age)

    def _forget(self, entry: Entry) -> Iterator[Offer]:
        async def act(*_: object) -> str:
            gone = await self._forgetting.forget(entry.id)
            return await self._without_counts(entry, changed(gone, "forgotten"))

        if entry.state is not State.RUNNING or entry.lease_left <= 0:
            words = "Delete the record. The next request with the key runs again."
            yield Offer(name="forget", help=words, act=act, seen=_seen(entry), age=entry.age)

    async def _without_counts(self, entry: Entry, outcome: str) -> str:
        if await forget_counts(self._store, entry):
            return outcome
        return f"{outcome}; if it is a message, the counts of its deliveries remain until they expire"


def _seen(entry: Entry) -> str:
    return f"{state(entry)}, attempt {entry.attempt}"


def _facts(entry: Entry, clock: Clock) -> dict[str, str]:
    kind, name = kind_of(entry)
    ends = f"ends {clock.at(entry.lease_left)}" if entry.lease_left > 0 else f"ended {clock.at(entry.lease_left)}"
    return {
        "kind": kind,
        "name": name or "not known",
        "state": state(entry),
        "waits for": _waits(entry),
        "key": hidden(entry.key),
        "attempt": str(entry.attempt),
        "first claim": f"{clock.at(-entry.age)}, {ago(entry.age)}",
        "lease": ends if entry.state is State.RUNNING else "over",
        "on crash": "hold" if entry.hold else "rerun",
        "expires": "never" if entry.expires_in is None else clock.at(entry.expires_in),
        "result": "none" if entry.result_size is None else f"{entry.result_size} bytes",
        "next": "none" if entry.unresolved else "the next request with the key runs" if entry.lapsed else "none needed",
        "format": str(entry.version),
    }


def _waits(entry: Entry) -> str:
    if entry.unresolved:
        return "operator: whether its effect happened is not known"
    if entry.lapsed:
        return "the next request with its key"
    if entry.state is State.RUNNING and entry.counts is None:
        return f"its owner, whose lease goes on for {duration(entry.lease_left)}"
    return "nothing"

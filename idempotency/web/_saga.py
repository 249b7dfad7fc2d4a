"""A saga: shown with its steps, and what an operator may decide about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from idempotency._cli.records import keeps_sagas
from idempotency.saga import SagaDetail, SagaFact, SagaOperations
from idempotency.web._stuck import saga_waits
from idempotency.web._things import Offer, Part, Thing, changed, json_in
from idempotency.web._words import Clock, ago, hidden, without_keys

_OPEN = ("unknown", "failing")
_COLUMNS = ("fact", "state", "attempt", "began", "error", "note")


class Sagas:
    """The sagas of a store."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @property
    def _operations(self) -> SagaOperations:
        return SagaOperations(self._store)

    async def ids(self, start: str) -> list[str]:
        """Return the ids that begin with these digits, at most two."""
        if not await keeps_sagas(self._store):
            return []
        return [view.id for view in await self._operations.find(start, limit=2) if view.id.startswith(start)]

    async def look(self, id: str, clock: Clock) -> Thing | None:
        """Return the saga of an id."""
        if len(id) != 64 or not await keeps_sagas(self._store):
            return None
        found = [view for view in await self._operations.find(id, limit=1) if view.id == id]
        saga = await self._operations.inspect(found[0].name, found[0].key) if found else None
        if saga is None:
            return None
        rows = [_row(fact) for fact in saga.facts]
        return Thing(
            kind="saga",
            id=id,
            facts=_facts(saga, clock),
            offers=list(self._offers(saga)),
            secrets={"key": saga.key},
            part=Part(title="What it has done", columns=_COLUMNS, rows=rows) if rows else None,
        )

    def _offers(self, saga: SagaDetail) -> Iterator[Offer]:
        if saga.state in ("done", "undone"):
            return
        # What an operator changes is fenced: while a process runs the saga, most of it is refused.
        if not _is_run(saga):
            yield self._retry(saga)
            yield from self._resolutions(saga)
        yield from self._signals(saga)
        if _can_be_undone(saga):
            if not _is_run(saga):
                yield self._compensate(saga)
            yield self._cancel(saga)

    def _retry(self, saga: SagaDetail) -> Offer:
        async def act(*_: object) -> str:
            await self._operations.retry(saga.name, saga.key)
            return "it goes on now"

        return Offer(name="retry now", help="Let it go on at once. A sweeper of the application runs it.", act=act)

    def _resolutions(self, saga: SagaDetail) -> Iterator[Offer]:
        for fact in saga.facts:
            if fact.kind == "step" and (fact.state in _OPEN or (fact.state == "failed" and _failure_is_open(saga))):
                yield self._resolve(saga, fact, "done", "Its effect happened. The saga goes on with this result.")
                yield self._resolve(saga, fact, "not-done", "Its effect did not happen. The step is done again.")
            if fact.kind == "undo" and fact.state in (*_OPEN, "waiting"):
                yield self._resolve(saga, fact, "done", "It is undone. The undo is not tried again.")

    def _resolve(self, saga: SagaDetail, fact: SagaFact, outcome: Any, words: str) -> Offer:
        step = f"undo:{fact.name}" if fact.kind == "undo" else fact.name

        async def act(operator: str, form: Mapping[str, str]) -> str:
            result = json_in(form, "result") if inputs else None
            await self._operations.resolve(saga.name, saga.key, step, outcome, result, by=operator)
            return f"{step} is {outcome.replace('-', ' ')}, and the saga goes on now"

        takes_result = outcome == "done" and fact.kind == "step"
        inputs = {"result": "Result of the step, as JSON; empty: null"} if takes_result else {}
        # A step that is run again begins with its first attempt, in another run of the saga.
        seen = f"{fact.state}, attempt {fact.attempts}, in run {saga.attempts}"
        name = f"resolve {outcome.replace('-', ' ')}"
        return Offer(name=name, target=step, help=words, act=act, inputs=inputs, seen=seen)

    def _signals(self, saga: SagaDetail) -> Iterator[Offer]:
        for name in dict.fromkeys(fact.name for fact in saga.facts if (fact.kind, fact.state) == ("wait", "waiting")):

            async def act(operator: str, form: Mapping[str, str], name: str = name) -> str:
                value, about = json_in(form, "value"), json_in(form, "about")
                given = await self._operations.signal(saga.name, saga.key, name, value, by=operator, about=about)
                return changed(given, "it has the signal")

            inputs = {"value": "Value, as JSON; empty: null", "about": "What is approved, as JSON, if it asks about it"}
            yield Offer(
                name="signal", target=name, help="Give it the signal for which it waits.", act=act, inputs=inputs
            )

    def _compensate(self, saga: SagaDetail) -> Offer:
        async def act(*_: object) -> str:
            await self._operations.compensate(saga.name, saga.key)
            return "it has failed, and is undone from now on"

        words = "Fail it, and undo what it has done, without running its function."
        seen = f"{saga.state} at {saga.step}, in run {saga.attempts}"
        return Offer(name="compensate", help=words, act=act, seen=seen)

    def _cancel(self, saga: SagaDetail) -> Offer:
        async def act(operator: str, _: object) -> str:
            await self._operations.cancel(saga.name, saga.key, by=operator)
            return "it is cancelled at its next step"

        return Offer(name="cancel", help="Let its function fail at its next step, and undo what it has done.", act=act)


def _is_run(saga: SagaDetail) -> bool:
    return bool(saga.owner) and (saga.next_in or 0.0) > 0


def _is_undone(saga: SagaDetail) -> bool:
    return saga.state == "undoing" or any(fact.kind == "undo" for fact in saga.facts)


def _failure_is_open(saga: SagaDetail) -> bool:
    return _is_undone(saga) or any(_is_pivot(fact) and fact.state == "done" for fact in saga.facts)


def _can_be_undone(saga: SagaDetail) -> bool:
    pivots = [fact.state for fact in saga.facts if _is_pivot(fact)]
    return not _is_undone(saga) and not {"done", "unknown", "failing", "running"}.intersection(pivots)


def _is_pivot(fact: SagaFact) -> bool:
    return fact.kind == "step" and "pivot" in fact.note.split(", ")


def _facts(saga: SagaDetail, clock: Clock) -> dict[str, str]:
    following = "none" if saga.next_in is None else f"{saga.next} {clock.due(saga.next_in)}"
    return {
        "kind": "saga",
        "name": saga.name,
        "state": saga.state,
        "waits for": saga_waits(saga, clock),
        "step": saga.step or "none",
        "key": hidden(saga.key),
        "attempts": f"{saga.attempts}, of which {saga.crashes} ended without a word"
        if saga.crashes
        else str(saga.attempts),
        "last error": saga.error or "none",
        "recorded": f"{clock.at(-saga.age)}, {ago(saga.age)}",
        "owner": saga.owner or "none",
        "next": following,
        "deadline": "none" if saga.deadline_in is None else clock.at(saga.deadline_in),
        "input": f"{saga.input_size} bytes",
        "result": "none" if saga.result_size is None else f"{saga.result_size} bytes",
    }


def _row(fact: SagaFact) -> list[str]:
    to_come = fact.kind == "undo" and fact.state == "waiting"
    name = f"{fact.kind} {fact.name}".strip()
    began = "not yet" if to_come else ago(fact.began)
    return [name, fact.state, str(fact.attempts), began, fact.error, without_keys(fact.note)]

"""One trial of a saga: its process is killed at one label, the next one is killed too, a third one ends it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from dataclasses import dataclass, fields
from itertools import count, pairwise
from pathlib import Path

from counts import Counts
from processes import run
from saga_stage import STEPS, Noted, Place, Plan, Stage

from idempotency.saga._view import SagaState
from idempotency.testing._instrument import instrument
from idempotency.testing._points import arm, watch


@dataclass(frozen=True)
class Found(Counts):
    """What is wrong at the end; nothing is where all are zero but the last two, which ``docs/sagas.md`` has.

    ``lost``: an effect that is not there, of a saga that is done. ``doubled``: one that is there twice, and must not.
    ``left``: one that is not undone, of a saga that has failed. ``stuck``: the saga has not ended. ``overlapped``: one
    that a process has had while another one had the one before it, of steps that are joined.
    ``repeated``: a leased effect that was there twice. ``late``: one of a process that was paused in the middle of its
    write for longer than its lease, after another process had undone it.
    """

    ALLOWED = 2

    lost: int = 0
    doubled: int = 0
    left: int = 0
    stuck: int = 0
    overlapped: int = 0
    repeated: int = 0
    late: int = 0


COLUMNS = tuple(field.name for field in fields(Found))


def try_label(place: Place, plan: Plan, label: str | None, again: int, labels: str) -> Found:
    """Run one trial. Without a label nothing is killed. ``again``: at which point the second process is killed."""
    asyncio.run(_prepare(place))
    ended = run(_run_until, place, plan, label, labels)
    if ended != (0 if label is None else -signal.SIGKILL):
        return Found(stuck=1)
    if label is not None:
        run(_run_until_point, place, plan, again)
    ended = run(_run_until, place, plan, None, None)
    return Found(stuck=1) if ended != 0 else asyncio.run(_compare(place, plan))


async def _prepare(place: Place) -> None:
    stage = Stage(place)
    await stage.prepare()
    await stage.close()


def _run_until(place: Place, plan: Plan, label: str | None, labels: str | None) -> None:
    instrument()
    passed: list[str] = []
    if label is None:
        watch(passed.append)
    else:
        arm(label)
    asyncio.run(_run(place, plan))
    if labels is not None:
        # A pool rolls back what it is given back: nothing has happened since the label before.
        Path(labels).write_text(json.dumps([each for each in passed if " ROLLBACK" not in each]))


def _run_until_point(place: Place, plan: Plan, number: int) -> None:
    instrument()
    passes = count(1)

    def passed(_: str) -> None:
        if next(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(passed)
    asyncio.run(_run(place, plan))


async def _run(place: Place, plan: Plan) -> None:
    stage = Stage(place)
    await stage.run(plan)
    await stage.close()


async def _compare(place: Place, plan: Plan) -> Found:
    stage = Stage(place)
    state, noted = await stage.found(plan)
    await stage.close()
    return compare(plan, state, noted)


def compare(plan: Plan, state: SagaState | None, noted: list[Noted]) -> Found:
    """Compare what the ledger has with what the plan says."""
    if state != ("undone" if plan.fails else "done"):
        return Found(stuck=1)
    done = Counter(each.step for each in noted if each.amount == 1)
    undone = Counter(each.step for each in noted if each.amount == -1)
    names = STEPS[: plan.fails - 1] if plan.fails else STEPS
    inner = ("inner one", "inner two") if plan.waits == "child" else ()
    expected = {*names, *inner}
    twice = sum(done[name] > 1 for name in expected) + sum(name not in expected for name in done)
    late = Counter() if plan.joined or not plan.fails else _late(noted)
    balances = [done[name] - undone[name] - late[name] for name in names]
    return Found(
        lost=sum(done[name] == 0 for name in expected),
        doubled=(twice if plan.joined else 0) + sum(balance < 0 for balance in balances),
        left=sum(balance > 0 for balance in balances) if plan.fails else sum(undone.values()),
        overlapped=_overlapping(noted) if plan.joined else 0,
        repeated=0 if plan.joined else twice,
        late=late.total(),
    )


def _late(noted: list[Noted]) -> Counter[str]:
    """Count the effects of each step that began before its undo, and came after it, by another process."""
    undos = {each.step: each for each in sorted(noted, key=lambda each: each.ended) if each.amount == -1}
    return Counter(
        each.step
        for each in noted
        if each.amount == 1
        and (undo := undos.get(each.step)) is not None
        and (each.owner != undo.owner and each.began < undo.began and each.ended > undo.ended)
    )


def _overlapping(noted: list[Noted]) -> int:
    ordered = sorted((each for each in noted if each.amount), key=lambda each: each.began)
    return sum(first.owner != second.owner and first.ended > second.began for first, second in pairwise(ordered))

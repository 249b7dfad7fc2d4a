"""The process that runs a scenario's processes: it imports the scenario once, and forks one process per task.

It never runs the scenario itself, so the processes it forks inherit no event loop, thread or connection.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from idempotency.errors import OutcomeUnknownError
from idempotency.testing._child import Child, write
from idempotency.testing._instrument import instrument
from idempotency.testing._points import arm, watch

RETRY_PAUSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be tested. ``patience`` and ``pause`` are seconds; with a ``pause``, owners are stopped instead."""

    scenario: str
    args: list[str]
    only: list[str]
    jobs: int
    patience: float
    pause: float | None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The effects of one key whose owner was ended at ``label``.

    ``fault``: why no delivery succeeded. ``missed``: why nothing is proven at this label.
    """

    label: str
    found: int = 0
    held: bool = False
    fault: str = ""
    missed: str = ""


class Proof:
    """One job, in the process that forks."""

    def __init__(self, job: Job, make: Callable[..., Any]) -> None:
        self._job = job
        self._make = make
        self._run = uuid.uuid4().hex[:8]

    def list_labels(self) -> list[str]:
        """Deliver once undisturbed, and return the labels in the order in which they were passed."""

        def deliver(write: Callable[[object], None]) -> None:
            labels: list[str] = []
            with asyncio.Runner() as runner:
                scenario = self._made()
                watch(labels.append)
                _call(runner, scenario.deliver, f"{self._run}-undisturbed")
                watch(lambda _: None)
            write(labels)

        if self._answer(self._prepare) is None:
            raise RuntimeError("the scenario cannot be prepared: its error is printed above")
        labels: list[str] | None = self._answer(deliver)
        if labels is None:
            raise RuntimeError("the scenario fails undisturbed: its error is printed above")
        found = self._count(f"{self._run}-undisturbed")
        if found != 1:
            raise RuntimeError(f"the scenario has {found} effects undisturbed, and must have 1")
        return labels

    def _prepare(self, write: Callable[[object], None]) -> None:
        with asyncio.Runner() as runner:
            scenario = self._made()
            if hasattr(scenario, "prepare"):
                _call(runner, scenario.prepare)
        write(True)

    def try_label(self, number: int, label: str) -> Trial:
        """End an owner at ``label``, deliver again until that succeeds, and read the ledger."""
        key = f"{self._run}-{number}"
        paused = self._job.pause is not None
        owner = self._owner(label, key, signal.SIGSTOP if paused else signal.SIGKILL)
        status = owner.wait(os.WUNTRACED)
        stopped = os.WIFSTOPPED(status)
        if stopped:
            self._answer(lambda write: write(self._settle(key, self._job.pause or 0.0)))
            os.kill(owner.pid, signal.SIGCONT)
            status = owner.wait()
        answers = owner.answers()
        ended = stopped if paused else os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not ended or answers[:1] != [label]:
            return Trial(
                label=label,
                missed=f"the owner did not end there (wait status {status}): {answers}; what is done once "
                "for all keys, such as making a table, belongs in prepare()",
            )
        settled = self._answer(lambda write: write(self._settle(key, self._job.patience)))
        if settled is None:
            settled = {"held": False, "fault": "a delivery came to no end"}
        found = self._count(key)
        if found is None:
            return Trial(label=label, missed="the ledger could not be read")
        return Trial(label=label, found=found, **settled)

    def _owner(self, label: str, key: str, number: signal.Signals) -> Child:
        def deliver(write: Callable[[object], None]) -> None:
            with asyncio.Runner() as runner:
                scenario = self._made()
                arm(label, number, announce=lambda: write(label))
                try:
                    _call(runner, scenario.deliver, key)
                except Exception as error:
                    write(_describe(error))

        return Child(deliver, self._limit)

    def _settle(self, key: str, patience: float) -> dict[str, object]:
        with asyncio.Runner() as runner:
            scenario = self._made()
            held, fault, end = False, "", time.monotonic() + patience
            while True:
                try:
                    _call(runner, scenario.deliver, key)
                    # The sender may have crashed after this delivery too, and sent it once more.
                    _call(runner, scenario.deliver, key)
                    return {"held": held, "fault": ""}
                except OutcomeUnknownError as error:
                    if held or not hasattr(scenario, "resolve"):
                        return {"held": True, "fault": _describe(error)}
                    held = True
                    _call(runner, scenario.resolve, key)
                except Exception as error:
                    fault = _describe(error)
                if time.monotonic() > end:
                    return {"held": held, "fault": fault}
                runner.run(asyncio.sleep(RETRY_PAUSE))

    def _count(self, key: str) -> int | None:
        def count(write: Callable[[object], None]) -> None:
            with asyncio.Runner() as runner:
                write(_call(runner, self._made().count, key))

        found: int | None = self._answer(count)
        return found

    def _answer(self, work: Callable[[Callable[[object], None]], None]) -> Any:
        child = Child(work, self._limit)
        answers = child.answers()
        child.wait()
        return answers[0] if answers else None

    @property
    def _limit(self) -> float:
        return 2 * self._job.patience + (self._job.pause or 0.0)

    def _made(self) -> Any:
        return self._make(*self._job.args)

    def run(self, labels: list[str], write: Callable[[object], None]) -> None:
        """Try every label, ``jobs`` at a time, each in a process of its own that forks the processes of its trial."""
        waiting = [(number, label) for number, label in enumerate(labels) if label in (self._job.only or labels)]
        running: dict[int, tuple[str, Child]] = {}
        while waiting or running:
            while waiting and len(running) < self._job.jobs:
                number, label = waiting.pop(0)
                child = Child(_trial(self, number, label), 10 * self._limit)
                running[child.pid] = label, child
            pid, status = os.wait()
            label, child = running.pop(pid)
            answers = child.answers() or [asdict(Trial(label=label, missed=f"its trial failed: wait status {status}"))]
            write(answers[0])


def _trial(proof: Proof, number: int, label: str) -> Callable[[Callable[[object], None]], None]:
    return lambda write: write(asdict(proof.try_label(number, label)))


def _call(runner: asyncio.Runner, function: Callable[..., Any], *args: Any) -> Any:
    result = function(*args)
    return runner.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def find(scenario: str) -> Callable[..., Any]:
    """Import what ``module:attr`` names."""
    module, _, name = scenario.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    make: Callable[..., Any] = found
    return make


def main() -> None:
    """Read a job from stdin; write to stdout the list of its labels, and then one trial per line, as JSON."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a scenario prints is not an answer
    job = Job(**json.load(sys.stdin))
    make = find(job.scenario)
    instrument()
    if threading.active_count() > 1:
        sys.exit(f"importing {job.scenario} starts threads, which a forked process would lack: start them in deliver()")
    proof = Proof(job, make)
    try:
        labels = proof.list_labels()
    except RuntimeError as error:
        sys.exit(str(error))
    write(answers, labels)
    proof.run(labels, lambda answer: write(answers, answer))

"""Code that changes while sagas run, row by row of the table: a process of the old version is killed in a step.

A process of the new version goes on with the saga then. Both versions are in ``tests/saga/versions``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.kit.paths import ROOT
from tests.kit.targets import Target
from tests.saga.versions.effects import Job

pytestmark = [pytest.mark.processes, pytest.mark.stores("sqlite")]

ON_A_SERVER_TOO = pytest.mark.stores("sqlite", "postgres")

DONE = {"result": "last done"}


@pytest.fixture(scope="module")
def forking() -> Iterator[subprocess.Popen[str]]:
    """A process with both versions imported, which forks one for each job."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.saga.versions"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


class Processes:
    """Processes of both versions on one database."""

    def __init__(self, forking: subprocess.Popen[str], target: Target, ledger: Path) -> None:
        self._forking = forking
        self._target = target
        self._ledger = ledger
        self._seen = 0

    def kill_old(self, saga: str, *, killed_in: str = "last", **arguments: Any) -> None:
        """Run a saga by the old version until its process is killed in a step; what it did counts no more."""
        assert self._answer(version="before", saga=saga, killed_in=killed_in, arguments=arguments) == {"killed": True}
        self.done()

    def old(self, saga: str, **job: Any) -> Any:
        """Go on by the old version; return the answer."""
        return self._answer(version="before", saga=saga, **job)

    def new(self, saga: str, **job: Any) -> Any:
        """Go on by the new version; return the answer."""
        return self._answer(version="after", saga=saga, **job)

    def done(self) -> list[str]:
        """Return what was done since this was asked last."""
        lines = self._ledger.read_text().splitlines() if self._ledger.exists() else []
        since, self._seen = self._seen, len(lines)
        return lines[since:]

    def _answer(self, **job: Any) -> Any:
        whole = Job(url=self._target.url, table=self._target.name, ledger=str(self._ledger), **job)
        assert self._forking.stdin is not None
        assert self._forking.stdout is not None
        self._forking.stdin.write(json.dumps(asdict(whole)) + "\n")
        self._forking.stdin.flush()
        return json.loads(self._forking.stdout.readline())


@pytest.fixture
def processes(forking: subprocess.Popen[str], store_target: Target, tmp_path: Path) -> Processes:
    """Processes on the database of this test."""
    return Processes(forking, store_target, tmp_path / "ledger")


def test_a_step_is_added(processes: Processes) -> None:
    """It is done when a run comes to it, also if later steps were done before."""
    processes.kill_old("book")

    assert processes.new("step_added") == DONE
    assert processes.done() == ["added", "last"]


@ON_A_SERVER_TOO
def test_a_step_is_removed(processes: Processes) -> None:
    """What it has done stays, and is undone if the saga fails."""
    processes.kill_old("book")

    assert processes.new("step_removed", fails="last")["error"] == "SagaFailedError"
    assert processes.done() == ["last", "undo b"]


def test_steps_change_places(processes: Processes) -> None:
    processes.kill_old("book")

    assert processes.new("steps_swapped") == DONE
    assert processes.done() == ["last"]


def test_a_step_is_renamed(processes: Processes) -> None:
    """It is another step then: the old one is removed, and the new one is done."""
    processes.kill_old("book")

    assert processes.new("step_renamed", fails="last")["error"] == "SagaFailedError"
    assert processes.done() == ["b2", "last", "undo b2", "undo b"]


def test_the_arguments_of_a_step_change(processes: Processes) -> None:
    """It is refused. Once the code is put right, and an operator lets the saga go on, it does."""
    processes.kill_old("book")

    refused = processes.new("other_arguments")
    assert refused["error"] == "ConfigurationError"
    assert "the step 'a' was begun with other arguments: give it another name" in refused["text"]
    assert processes.new("book")["error"] == "SagaStuckError"
    assert processes.done() == []
    processes.new("book", call="retry")
    assert processes.new("book") == DONE
    assert processes.done() == ["last"]


def test_a_step_gets_a_parameter_with_a_default(processes: Processes) -> None:
    processes.kill_old("book")

    assert processes.new("step_with_more") == DONE
    assert processes.done() == ["last"]


def test_the_saga_gets_a_parameter_with_a_default(processes: Processes) -> None:
    """One that runs goes on with it, and the same call is the same call."""
    processes.kill_old("trip", to="Rome")

    assert processes.new("trip_with_seats", arguments={"to": "Rome"}) == DONE
    assert processes.new("trip_with_seats", arguments={"to": "Rome", "seats": 1}) == DONE
    assert processes.new("trip_with_seats", call="resume") == DONE
    assert processes.done() == ["last"]


def test_the_saga_gets_a_parameter_without_a_default(processes: Processes) -> None:
    """What is recorded has no value for it: the saga is stuck."""
    processes.kill_old("trip", to="Rome")

    refused = processes.new("trip_with_date", call="resume")
    assert refused["error"] == "UnreadableError"
    assert "its parameters have changed; a new one needs a default" in refused["text"]
    assert processes.new("trip_with_seats", call="resume")["error"] == "SagaStuckError"
    assert processes.done() == []


def test_the_saga_loses_a_parameter(processes: Processes) -> None:
    """Also a call without it is the same call, if it had its default."""
    processes.kill_old("trip", to="Rome")

    assert processes.new("trip_without_coupon", arguments={"to": "Rome"}) == DONE
    assert processes.done() == ["last"]


def test_a_default_changes(processes: Processes) -> None:
    """A saga goes on with the value that was the default when it was called first."""
    processes.kill_old("pay")

    assert processes.new("pay_in_dollars") == DONE
    assert processes.done() == ["EUR", "last"]


def test_the_saga_is_renamed(processes: Processes) -> None:
    """It is another saga then. Keep one of the old name until those that run have ended."""
    processes.kill_old("book")

    assert processes.new("other_name", call="resume")["text"] == "There is no saga other of this key."
    assert processes.new("other_name", call="sweep") == {"result": 0}
    assert processes.new("book", call="sweep") == {"result": 1}
    assert processes.done() == ["last"]


@pytest.mark.parametrize(("options", "undone"), [({}, "undo b"), ({"replaces": "b"}, "other undo b")])
def test_the_undo_of_a_step_changes(processes: Processes, options: dict[str, str], undone: str) -> None:
    """A step that is done keeps the undo that was recorded with it; ``undos=`` replaces it."""
    processes.kill_old("book")

    assert processes.new("other_undo", options=options, fails="last")["error"] == "SagaFailedError"
    assert processes.done() == ["last", undone]


def test_a_step_becomes_the_pivot(processes: Processes) -> None:
    """For a saga that did the step before, it is none: it can still be undone."""
    processes.kill_old("book")

    assert processes.new("pivot", fails="last")["error"] == "SagaFailedError"
    assert processes.done() == ["last", "undo b"]


def test_the_function_of_a_step_changes_what_it_returns(processes: Processes) -> None:
    """A recorded result that the new annotation cannot read is no result of another type: the saga is stuck."""
    processes.kill_old("book")

    refused = processes.new("other_result")
    assert "the recorded result of the step 'a' is not what its function returns" in refused["text"]
    assert processes.new("other_result")["error"] == "SagaStuckError"
    assert processes.done() == []


@ON_A_SERVER_TOO
def test_changed_code_is_seen_by_sagas_that_come_there_first(processes: Processes) -> None:
    """One that was killed past it goes on by the old code in each run, and one that was killed before, by the new."""
    processes.kill_old("book", killed_in="last")
    assert processes.new("patched_code", killed_in="last") == {"killed": True}
    assert processes.new("patched_code") == DONE
    assert processes.done() == ["last", "last"]


def test_changed_code_is_seen_by_a_saga_that_was_killed_before_it(processes: Processes) -> None:
    processes.kill_old("book", killed_in="a")

    assert processes.new("patched_code", killed_in="b") == {"killed": True}
    assert processes.new("patched_code") == DONE
    assert processes.done() == ["a", "by the new code", "b", "by the new code", "b", "last"]


def test_an_old_saga_that_waits_past_the_changed_place_goes_on_by_the_old_code(processes: Processes) -> None:
    """Its process was killed after the signal came."""
    assert processes.old("waiting")["error"] == "SagaPendingError"
    assert processes.old("waiting", call="signal") == {"result": True}
    processes.kill_old("waiting")

    assert processes.new("patched_wait") == DONE
    assert processes.done() == ["last"]

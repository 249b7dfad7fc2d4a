"""The proofs of sagas, small: kills at some labels, and what is seen as wrong in a ledger."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

pytestmark = pytest.mark.processes


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of scripts/_prove by its name."""
    monkeypatch.setenv("PYTHONPATH", "")
    return script_modules(monkeypatch, SCRIPTS / "_prove")


def test_the_labels_of_a_saga_on_sqlite(
    prove: Any, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed twice, before and after a step is committed: it is done once all the same."""
    saga = prove("saga")
    monkeypatch.setattr(saga, "JOBS", 2)
    monkeypatch.setattr(saga, "QUICK", ("success",))
    monkeypatch.setattr(saga, "places", lambda _: nullcontext([saga.Place("SQLite", sqlite_url, sqlite_url, True)]))
    monkeypatch.setattr(saga, "chosen", lambda labels, *_: [each for each in labels if each.startswith("effect")][:2])

    assert saga.run(quick=True)

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:9] == ["success", "SQLite", "2", "0", "0", "0", "0", "0", "0"]
    assert lines[-1].endswith(": each saga is done or undone, none lost, doubled or stuck")


def of(prove: Any, *rows: tuple[str, int, int, float, float]) -> list[Any]:
    """Return a ledger: step, amount, owner, and when it began and ended."""
    return [prove("saga_stage").Noted(*row) for row in rows]


def done(prove: Any, *but: str) -> list[Any]:
    """Return the ledger of a saga that one process has done, but for some steps."""
    steps = enumerate(prove("saga_stage").STEPS)
    return of(prove, *((step, 1, 7, float(time), time + 0.5) for time, step in steps if step not in but))


def test_nothing_is_wrong_with_a_saga_that_is_done_or_undone(prove: Any) -> None:
    """The third step fails: the two before it are undone, also by another process."""
    trial, plan = prove("saga_trial"), prove("saga_stage").Plan
    undone = of(
        prove,
        ("flight", 1, 7, 0.0, 0.1),
        ("hotel", 1, 8, 0.2, 0.3),
        ("hotel", -1, 8, 0.4, 0.5),
        ("flight", -1, 9, 0.6, 0.7),
    )

    assert trial.compare(plan("k", True), "done", done(prove)) == trial.Found()
    assert trial.compare(plan("k", True, fails=3), "undone", undone) == trial.Found()
    assert trial.Found().ok


@pytest.mark.parametrize("state", [None, "running", "waiting", "undoing", "undone"])
def test_a_saga_that_is_not_done_is_stuck(prove: Any, state: str | None) -> None:
    """Whatever its ledger says."""
    trial, plan = prove("saga_trial"), prove("saga_stage").Plan

    found = trial.compare(plan("k", True), state, done(prove))

    assert found == trial.Found(stuck=1)
    assert not found.ok


def test_effects_that_are_lost_doubled_and_not_undone_are_counted(prove: Any) -> None:
    """A doubled effect is a fault where it is joined; leased, it is a repetition that is allowed."""
    trial, plan = prove("saga_trial"), prove("saga_stage").Plan
    twice = done(prove, "mail") + of(prove, ("hotel", 1, 7, 8.0, 8.5))

    joined = trial.compare(plan("k", True), "done", twice)
    leased = trial.compare(plan("k", False), "done", twice)
    not_undone = trial.compare(plan("k", True, fails=2), "undone", of(prove, ("flight", 1, 7, 0.0, 0.1)))
    undone_twice = of(prove, ("flight", 1, 7, 0.0, 0.1), ("flight", -1, 7, 0.2, 0.3), ("flight", -1, 7, 0.4, 0.5))

    assert joined == trial.Found(lost=1, doubled=1)
    assert leased == trial.Found(lost=1, repeated=1)
    assert not_undone == trial.Found(left=1)
    assert trial.compare(plan("k", True, fails=2), "undone", undone_twice) == trial.Found(doubled=1)
    assert not any(found.ok for found in (joined, leased, not_undone))
    assert trial.Found(repeated=1).ok


def test_an_effect_that_a_paused_process_has_after_its_undo_is_counted_apart(prove: Any) -> None:
    """No lease prevents it, where the process is paused in the middle of its write. One that began later is left."""
    trial, plan = prove("saga_trial"), prove("saga_stage").Plan
    undone = of(prove, ("flight", 1, 8, 3.0, 3.5), ("flight", -1, 8, 3.6, 3.7))

    def compared(*more: Any, joined: bool = False) -> Any:
        return trial.compare(plan("k", joined, fails=2), "undone", of(prove, *more) + undone)

    assert compared(("flight", 1, 7, 0.0, 4.5)) == trial.Found(repeated=1, late=1)
    assert compared(("flight", 1, 7, 3.65, 4.5)) == trial.Found(repeated=1, left=1)
    assert compared(("flight", 1, 8, 0.0, 4.5)) == trial.Found(repeated=1, left=1)
    assert compared(("flight", 1, 7, 0.0, 1.0)) == trial.Found(repeated=1, left=1)
    assert compared(("flight", 1, 7, 0.0, 4.5), joined=True) == trial.Found(doubled=1, left=1, overlapped=1)
    assert trial.Found(repeated=1, late=1).ok


def test_two_processes_that_run_a_saga_at_once_are_seen(prove: Any) -> None:
    """The second one begins a step while the first one has not ended its own; leased, that is allowed."""
    trial, plan = prove("saga_trial"), prove("saga_stage").Plan
    late = done(prove, "flight") + of(prove, ("flight", 1, 8, 0.0, 1.2))

    assert trial.compare(plan("k", True), "done", late) == trial.Found(overlapped=1)
    assert not trial.Found(overlapped=1).ok
    assert trial.compare(plan("k", False), "done", late) == trial.Found()

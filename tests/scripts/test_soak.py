"""The soak test's own eyes: it counts what is wrong, excuses what is promised, and ends what it started."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest

from tests.kit.paths import ROOT, SCRIPTS


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package scripts/_soak be imported."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def module(name: str) -> Any:
    return importlib.import_module(f"_soak.{name}")


class History:
    """The ledger of one operation, written by hand: the chaos is over at 10 s."""

    def __init__(self, mode: str, shape: str = "execute") -> None:
        self.key = f"postgresql-{mode}-0-0"
        self.operation = module("plan").Operation(
            key=self.key, mode=mode, shape=shape, fails="", seconds=0.0, patience=1.0, leaves=None, clients=1
        )
        self.answers: list[Any] = []
        self.effects: list[tuple[str, str]] = []
        self.trace: list[dict[str, Any]] = []
        self.struck: list[Any] = []

    def answered(self, at: float, code: str, run: str = "", status: int = 200, worker: int = 0) -> History:
        self.answers.append(module("clients").Answer(at - 0.1, at, worker, status, code, run))
        return self

    def committed(self, run: str) -> History:
        self.effects.append((self.key, run))
        return self

    def wrote(self, at: float, what: str, run: str, derived: str = "one") -> History:
        line = {"at": at, "asked": at, "worker": 0, "what": what, "key": self.key, "run": run, "derived": derived}
        self.trace.append(line)
        return self

    def suffered(self, kind: str, worker: int | None, begin: float, end: float) -> History:
        self.struck.append(module("places").Struck(kind, worker, begin, end))
        return self

    def ledger(self) -> Any:
        book = module("clients").Book({self.key: self.operation}, {self.key: self.answers})
        return module("verdict").Ledger(book, self.effects, self.trace, self.struck, deadline=14.0)

    @property
    def faults(self) -> list[str]:
        return [fault.kind for fault in self.ledger().judge().faults]


def test_a_sound_operation_has_no_fault() -> None:
    """One effect, whose run the answer names."""
    history = History("transactional").answered(1, "in-progress").answered(2, "ok", "a-1").committed("a-1")

    assert history.faults == []


def test_a_success_without_its_effect_is_lost() -> None:
    """The effect of another run does not stand for it."""
    history = History("joined").answered(2, "ok", "a-1").committed("a-2")

    assert history.faults == ["lost"]


@pytest.mark.parametrize("mode", ["transactional", "joined", "joined-sync", "consumer"])
def test_two_effects_of_one_transactional_operation_are_doubled(mode: str) -> None:
    """No chaos excuses them."""
    history = History(mode).answered(2, "ok", "a-1").committed("a-1").committed("a-2")

    assert history.suffered("kill the worker", 0, 0, 1).faults == ["doubled"]


def test_an_effect_that_was_rolled_back_on_purpose_is_doubled() -> None:
    """A refusal promises no effect at all."""
    assert History("transactional", "refuse").answered(2, "refused").committed("a-1 undone").faults == ["doubled"]


def test_an_operation_without_an_answer_two_leases_after_the_chaos_is_stuck() -> None:
    """A retryable answer is none, and a late one comes too late."""
    assert History("joined").answered(13, "in-progress").faults == ["stuck"]
    assert History("joined").answered(15.1, "ok", "a-1").committed("a-1").faults == ["stuck"]


def repeated(mode: str = "leased") -> History:
    history = History(mode, "plain").answered(5, "ok", "a-2")
    for at, run in ((1, "a-1"), (4, "a-2")):
        history.wrote(at, "began", run).wrote(at + 0.1, "effect", run)
    return history


def test_a_leased_effect_that_nothing_excuses_is_doubled() -> None:
    """The lease is renewed every third of it, so what was shorter than that is no excuse, nor is another's chaos."""
    assert repeated().faults == ["doubled"]
    assert repeated().suffered("freeze the way", 0, 2, 2.5).faults == ["doubled"]
    assert repeated().suffered("kill the worker", 1, 2, 3).faults == ["doubled"]
    assert repeated().suffered("kill the worker", 0, 4.5, 5).faults == ["doubled"]


@pytest.mark.parametrize(
    "chaos",
    [("kill the worker", 0, 2, 3), ("pause the worker", 0, 1.05, 3), ("freeze the store", None, 2, 3.5)],
)
def test_a_leased_effect_is_repeated_at_least_once(chaos: tuple[Any, ...]) -> None:
    """A dead owner, and one that was kept from the store, may be followed by another: counted apart, and no fault."""
    history = repeated().suffered(*chaos)

    assert history.faults == []
    assert history.ledger().judge().repeats == {"leased": 1}


def test_a_held_effect_is_never_repeated() -> None:
    """At most once: what excuses a rerun does not excuse a hold."""
    assert repeated("hold").suffered("kill the worker", 0, 2, 3).faults == ["doubled"]


def test_runs_that_derive_different_keys_are_doubled() -> None:
    """The key for a provider is the same on every attempt."""
    history = repeated().suffered("kill the worker", 0, 2, 3)
    history.trace[-1]["derived"] = "another"

    assert history.faults == ["doubled"]


def test_answers_that_are_not_documented_are_unexpected() -> None:
    """A 500 that the handler did not raise, and an unknown outcome where nothing is held."""
    history = History("transactional").answered(2, "ok", "a-1").committed("a-1")

    assert history.answered(3, "not the application's", status=500).faults == ["unexpected answers"]
    assert History("joined").answered(2, "outcome-unknown", status=409).faults == ["unexpected answers"]
    assert History("hold", "plain").answered(2, "outcome-unknown", status=409).faults == []


def test_a_run_after_an_unknown_outcome_is_unexpected() -> None:
    """What is held is not run again until somebody resolves it; a handler that raised gave the key back."""
    history = History("hold", "plain").answered(2, "outcome-unknown", status=409)
    history.wrote(3, "began", "a-1").wrote(3, "effect", "a-1").answered(4, "ok", "a-1")

    assert history.faults == ["unexpected answers"]
    assert history.wrote(1, "raised", "a-0").faults == []


@pytest.mark.parametrize(("worker", "faults"), [(0, ["unexpected answers"]), (1, [])])
def test_a_claim_that_was_lost_in_another_process_is_an_unknown_outcome_until_it_is_released(
    worker: int, faults: list[str]
) -> None:
    """The process that lost the answer to its claim knows that nothing runs under it; others do not."""
    history = History("hold", "plain").answered(1, "store-unavailable", status=503, worker=worker)
    history.answered(2, "outcome-unknown", status=409)
    history.wrote(3, "began", "a-1").wrote(3, "effect", "a-1").answered(4, "ok", "a-1")

    assert history.faults == faults


def test_what_a_worker_writes_is_counted_by_kind() -> None:
    """A traceback is one text, what belongs to a graceful stop is expected, and names and numbers do not tell apart."""
    stop = "ERROR:    Cancel 3 running task(s), timeout graceful shutdown exceeded\n"
    never = (
        "Task exception was never retrieved\n"
        "future: <Task finished name='Task-{0}' exception=StoreError('no answer')>\n"
        "Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n'
        "idempotency.errors.StoreError: no answer\n"
    )

    texts = module("verdict").outbursts(stop + never.format(7) + never.format(8))

    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert texts[0].startswith("Task exception was never retrieved\nfuture: <Task finished name='Task-*'")


def test_a_fault_is_printed_with_its_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers, effects and the chaos around them are in the order in which they happened."""
    ledger = repeated().suffered("lose replies", 0, 3, 3.5).ledger()

    total = module("__main__").report(ledger, ledger.judge(), "postgresql")

    out = capsys.readouterr().out
    assert (total["operations"], total["doubled"], total["lost"]) == (1, 1, 0)
    assert "postgresql-leased-0-0: Operation(" in out
    assert "  doubled: 2 effects: a-1, a-2\n" in out
    moments = ["run a-1 effect", "lose replies 0, for 0.50 s", "run a-2 effect", "answered 200 ok a-2"]
    assert [out.index(moment) for moment in moments] == sorted(out.index(moment) for moment in moments)


def test_one_seed_draws_one_plan() -> None:
    """Chaos, drivers and operations are those of the seed, and all chaos ends in time."""
    plan = module("plan")

    def drawn(seed: int) -> list[Any]:
        operations = plan.draw_operations(seed, "mariadb", "joined", 1)
        return [
            plan.draw_events(seed, "mariadb", 60),
            plan.draw_drivers(seed, "mariadb"),
            [next(operations) for _ in range(50)],
        ]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert all(event.at + event.seconds <= 60.01 for event in drawn(7)[0])


def soak(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(SCRIPTS), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "_soak", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_short_run_counts_its_operations_and_succeeds() -> None:
    """A line for each mode, one for the store, and the sum with the seed."""
    process = soak("--store", "sqlite", "--seconds", "3", "--seed", "3")
    out, _ = process.communicate(timeout=100)

    lines = out.splitlines()
    modes = ["transactional", "leased", "hold", "joined", "joined-sync", "consumer", "all"]
    assert [line.split()[1] for line in lines if " lost, " in line or " kills, " in line][:-1] == modes, out
    assert lines[-1].startswith("total: ")
    assert lines[-1].endswith(", seed 3")
    assert " 0 lost, 0 doubled, 0 stuck, 0 leaked connections, " in lines[-1]
    assert process.returncode == 0


def test_an_interrupt_ends_everything_it_started() -> None:
    """Ctrl-C leaves no worker and no server behind, and says so by the status 130."""
    run = soak("--store", "redis", "--seconds", "60", "--seed", "3")
    assert run.stdout is not None
    assert "seed 3" in run.stdout.readline()
    assert run.stdout.readline().startswith("redis")
    started = psutil.Process(run.pid).children(recursive=True)

    run.send_signal(signal.SIGINT)
    run.communicate(timeout=30)

    assert started
    _, alive = psutil.wait_procs(started, timeout=10)
    assert (run.returncode, alive) == (130, [])

"""The crash kit: it finds what is broken, and says so of nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from idempotency.errors import ConfigurationError
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import _points, assert_once, crash_everywhere, crash_point
from idempotency.testing._instrument import name_of
from tests.kit import crash_scenarios as scenarios
from tests.kit.paths import EXAMPLES, ROOT

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("scenario", [scenarios.Once, scenarios.OnceAsync])
def test_a_sound_scenario_is_reported_sound(tmp_path: Path, scenario: type[scenarios.Files]) -> None:
    """One effect at every label, sync and async, and a line that says so."""
    report = crash_everywhere(scenario, str(tmp_path))

    assert report.labels == ("begin", "after-effect")
    assert (report.expected, report.found) == (2, 2)
    assert report.ok
    assert str(report) == (
        f"tests.kit.crash_scenarios:{scenario.__name__}: "
        "2 labels killed, 2 effects expected, 2 found, 0 lost, 0 doubled, 0 stuck"
    )


def test_an_effect_before_its_record_is_doubled(tmp_path: Path) -> None:
    """Killed between effect and record, the effect happens again, and the report names the place."""
    report = crash_everywhere(scenarios.Doubled, str(tmp_path))

    assert report.labels == ("begin", "between", "end")
    assert report.doubled == ("between",)
    assert (report.lost, report.stuck, report.missed) == ((), (), ())
    assert (report.expected, report.found) == (3, 4)
    assert not report.ok
    assert "\n  doubled: between" in str(report)


@pytest.mark.measured
def test_the_verbs_of_any_store_are_labels(tmp_path: Path) -> None:
    """A class with the verbs of a store needs no registration: each verb is two labels."""
    report = crash_everywhere(scenarios.Stored, str(tmp_path), recorded="after complete")

    assert report.labels == ("before claim", "after claim", "before complete", "after complete")
    assert report.repeated == ("before complete",)
    assert report.ok


def test_a_record_before_its_effect_loses_it(tmp_path: Path) -> None:
    """Killed between record and effect, the effect never happens, and the report names the place."""
    report = crash_everywhere(scenarios.Lost, str(tmp_path))

    assert report.lost == ("between",)
    assert (report.doubled, report.stuck, report.missed) == ((), (), ())
    assert (report.expected, report.found) == (3, 2)
    assert not report.ok


def test_a_lock_that_nobody_takes_over_is_stuck(tmp_path: Path) -> None:
    """A key that is not settled within the patience is stuck, whether or not its effect happened."""
    report = crash_everywhere(scenarios.Locked, str(tmp_path), patience=0.3)

    assert report.stuck == ("locked", "between")
    assert (report.lost, report.doubled) == ((), ())
    assert report.notes[0].startswith("locked: FileExistsError: ")
    assert not report.ok


@pytest.mark.measured
def test_a_held_key_is_resolved_and_named(tmp_path: Path) -> None:
    """OutcomeUnknownError calls for resolve(), after which the key settles; the labels are listed as held."""
    report = crash_everywhere(scenarios.Held, str(tmp_path))

    assert report.held == ("locked", "between")
    assert (report.expected, report.found) == (3, 3)
    assert report.ok


def test_doubles_are_allowed_before_the_record_only(tmp_path: Path) -> None:
    """What may be repeated is counted apart, up to the label from which it is recorded."""
    allowed = crash_everywhere(scenarios.Doubled, str(tmp_path), recorded="end")
    too_early = crash_everywhere(scenarios.Doubled, str(tmp_path), recorded="between")

    assert (allowed.repeated, allowed.doubled, allowed.ok) == (("between",), (), True)
    assert (too_early.repeated, too_early.doubled, too_early.ok) == ((), ("between",), False)


def test_a_label_that_is_not_passed_again_proves_nothing(tmp_path: Path) -> None:
    """A scenario whose labels are others in every run is not ok, and is not taken for proven."""
    report = crash_everywhere(scenarios.Unsteady, str(tmp_path))

    assert report.missed == report.labels
    assert not report.ok
    assert "the owner did not end there (wait status 0)" in str(report)


def test_a_second_pass_is_a_label_of_its_own(tmp_path: Path) -> None:
    """A point in a loop is killed at each of its passes."""
    report = crash_everywhere(scenarios.Loop, str(tmp_path))

    assert report.labels == ("pass", "pass #2")
    assert report.ok


def test_a_delivery_that_hangs_ends(tmp_path: Path) -> None:
    """A process that never returns is ended by the clock, and its key is stuck."""
    report = crash_everywhere(scenarios.Hanging, str(tmp_path), patience=0.5)

    assert report.stuck == ("locked",)
    assert report.notes == ("locked: a delivery came to no end",)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [(scenarios.Failing, "ValueError: out of stock"), (scenarios.Twice, "the scenario has 2 effects undisturbed")],
)
def test_an_unsound_scenario_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], scenario: type[scenarios.Files], reason: str
) -> None:
    """What does not have exactly one effect undisturbed can prove nothing."""
    with pytest.raises(ConfigurationError, match=f"{scenario.__name__} cannot be proven"):
        crash_everywhere(scenario, str(tmp_path))

    assert reason in capfd.readouterr().err


def test_a_scenario_that_cannot_be_prepared_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without its tables nothing can be proven, and the error says what failed."""
    with pytest.raises(ConfigurationError, match="OnceAsync cannot be proven"):
        crash_everywhere(scenarios.OnceAsync, str(tmp_path / "absent"))

    assert "FileNotFoundError" in capfd.readouterr().err


def test_a_module_that_starts_threads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A forked process would lack them, and could wait for them for ever."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "threaded.py").write_text(
        dedent(
            """
            import threading, time
            from tests.kit.crash_scenarios import Once
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            """
        )
    )

    with pytest.raises(ConfigurationError, match="cannot be proven"):
        crash_everywhere("threaded:Once", str(tmp_path))

    assert "importing threaded:Once starts threads" in capfd.readouterr().err


def test_the_example_proves_itself(tmp_path: Path) -> None:
    """A script may hold its own scenario."""
    example = EXAMPLES / "prove_orders.py"

    run = subprocess.run([sys.executable, str(example)], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)

    assert run.returncode == 0
    assert run.stdout.endswith("effects expected, 13 found, 0 lost, 0 doubled, 0 stuck\n")


def test_a_scenario_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    """A class inside a function is not there for another process."""

    class Local(scenarios.Once):
        pass

    with pytest.raises(ConfigurationError, match="at the top of a module"):
        crash_everywhere(Local, str(tmp_path))


def test_one_label_can_be_tried_alone(tmp_path: Path) -> None:
    """What was found broken can be looked into without the rest."""
    report = crash_everywhere(scenarios.Doubled, str(tmp_path), only=["between"], recorded="end")

    assert (report.labels, report.repeated, report.found) == (("between",), ("between",), 2)


def test_recorded_must_be_a_label(tmp_path: Path) -> None:
    """A misspelt label would allow nothing, or everything."""
    with pytest.raises(ConfigurationError, match="'recorded'. are none of the labels"):
        crash_everywhere(scenarios.Doubled, str(tmp_path), recorded="recorded")


def test_assert_once_raises_the_report(tmp_path: Path) -> None:
    """The failed assertion is the report."""
    assert assert_once(scenarios.Once, str(tmp_path)).ok

    with pytest.raises(AssertionError, match="1 doubled, 0 stuck\n  doubled: between"):
        assert_once("tests.kit.crash_scenarios:Doubled", str(tmp_path))


def test_the_caller_is_left_alone(tmp_path: Path) -> None:
    """Points are put into the processes that die, not into the one that asks."""
    crash_everywhere(scenarios.Once, str(tmp_path))

    crash_point("begin")
    assert not hasattr(RedisStore.claim, "__wrapped__")
    assert not hasattr(SQLStore.claim, "__wrapped__")


def test_a_server_can_be_armed_by_its_environment() -> None:
    """IDEMPOTENCY_CRASH_AT kills a process that somebody else started, at the pass it names."""
    program = dedent(
        """
        from idempotency.testing import crash_point
        for number in range(3):
            crash_point("charged")
            print(number, flush=True)
        """
    )

    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "IDEMPOTENCY_CRASH_AT": "charged #2"},
        stdout=subprocess.PIPE,
        check=False,
    )

    assert run.returncode == -signal.SIGKILL
    assert run.stdout == b"0\n"


def test_the_plugin_gives_the_assertion_and_shows_its_report(tmp_path: Path) -> None:
    """A failed test of a user shows where the effect was doubled."""
    (tmp_path / "test_theirs.py").write_text(
        dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})

            def test_sound(assert_once, tmp_path):
                assert assert_once("tests.kit.crash_scenarios:Once", str(tmp_path)).ok

            def test_broken(assert_once, tmp_path):
                assert_once("tests.kit.crash_scenarios:Doubled", str(tmp_path))
            """
        )
    )

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "idempotency.testing.plugin", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert "1 failed, 1 passed" in run.stdout
    assert "AssertionError: tests.kit.crash_scenarios:Doubled: 3 labels killed" in run.stdout
    assert "doubled: between" in run.stdout


@pytest.mark.measured
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("INSERT INTO orders (id) VALUES (1)", "INSERT orders"),
        ('insert into "orders" (id) values (1) ON CONFLICT (id) DO UPDATE SET id = 2', "INSERT orders"),
        ("UPDATE `orders` SET item = 'tea'", "UPDATE orders"),
        ("DELETE FROM orders WHERE id = 1", "DELETE orders"),
        ("SELECT item\nFROM orders FOR UPDATE", "SELECT orders"),
        ("WITH seen AS (SELECT 1 FROM records), won AS (INSERT INTO records SELECT 1) SELECT 1", "INSERT records"),
        ("CREATE TABLE IF NOT EXISTS orders (id INTEGER)", "CREATE TABLE orders"),
        ("SAVEPOINT sa_savepoint_1", "SAVEPOINT sa_savepoint_1"),
        ("SELECT 1", "SELECT 1"),
    ],
)
def test_statements_are_named_by_verb_and_table(statement: str, name: str) -> None:
    """A label is readable, and the same whatever the values and the driver's own syntax."""
    assert name_of(statement) == name


@pytest.mark.measured
def test_a_verb_that_calls_itself_has_its_points_once() -> None:
    """As a verb of a subclass does, or an awaited one that calls its blocking twin."""
    passed: list[str] = []
    _points.watch(passed.append)
    try:
        with _points.step("complete"), _points.step("complete"), _points.step("COMMIT"):
            pass
    finally:
        _points._passed = None

    assert passed == [
        "before complete",
        "complete > before COMMIT",
        "complete > after COMMIT",
        "after complete",
    ]

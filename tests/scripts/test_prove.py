"""The matrix of scripts/prove, small: every label killed, and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from idempotency.testing import assert_once, crash_everywhere
from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

PROVE = SCRIPTS / "_prove"
# Several of these run at a time, each with four processes.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def prove(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module scripts/_prove/prove.py, whose scenarios can be imported."""
    return script_modules(monkeypatch, PROVE)("prove")


HANDLED = ("before INSERT prove_effect", "after INSERT prove_effect", "effect")
COMMITTED = ("before UPDATE prove_record", "after UPDATE prove_record", "before COMMIT", "after COMMIT")
CHECKED_IN = ("before ROLLBACK", "after ROLLBACK")
CLAIMED_BY_STATEMENT = (
    "before claim",
    "claim > before INSERT prove_record",
    "claim > after INSERT prove_record",
    "claim > before ROLLBACK",
    "claim > after ROLLBACK",
    "after claim",
)
"""On PostgreSQL, where a verb is one statement that commits itself. The pool rolls back what it is given back."""

VERB_COMMITTED = ("claim > before COMMIT", "claim > after COMMIT")


def test_transactional_http_on_postgresql(postgres_url: str) -> None:
    """Claim, effect, response and record, and first whether there is a pooler: killed at each of 17 labels."""
    report = assert_once("scenarios:TransactionalHTTP", postgres_url)

    claimed = (CLAIMED_BY_STATEMENT[0], *VERB_COMMITTED, *CLAIMED_BY_STATEMENT[1:])
    assert report.labels == (*claimed, *HANDLED, *COMMITTED, *CHECKED_IN)
    assert (report.expected, report.found) == (17, 17)


def test_transactional_http_on_mariadb(mariadb_url: str) -> None:
    """As on PostgreSQL, where a verb has a COMMIT of its own, and nobody asks for a pooler: 17 labels."""
    report = assert_once("scenarios:TransactionalHTTP", mariadb_url)

    claimed = (*CLAIMED_BY_STATEMENT[:3], *VERB_COMMITTED, *CLAIMED_BY_STATEMENT[3:])
    assert report.labels == (*claimed, *HANDLED, *COMMITTED, *CHECKED_IN)
    assert (report.expected, report.found) == (17, 17)


def test_transactional_http_on_sqlite(sqlite_url: str) -> None:
    """As on MariaDB, and a first claim looks for its table and for the record: 25 labels."""
    report = assert_once("scenarios:TransactionalHTTP", sqlite_url)

    assert report.labels[-9:] == (*HANDLED, *COMMITTED, *CHECKED_IN)
    assert "claim > after CREATE TABLE prove_record" in report.labels
    assert "claim > after SELECT prove_record" in report.labels
    assert (len(report.labels), report.found) == (25, 25)


@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url", "sqlite_url"])
def test_transactional_http_with_synchronous_sessions(request: pytest.FixtureRequest, database: str) -> None:
    """The same statements in the same order, in threads: the labels of the asynchronous twin of each database."""
    report = assert_once("scenarios:TransactionalHTTPSync", request.getfixturevalue(database))

    assert report.labels[-9:] == (*HANDLED, *COMMITTED, *CHECKED_IN)
    assert report.labels[0] == "before claim"
    assert (report.expected, report.found) == (len(report.labels), len(report.labels))


LABELS = {"postgres_url": 11, "mariadb_url": 11, "sqlite_url": 13}
# Both halves of the engine on each database: a consumer and a function differ above it.
JOINED = [
    ("JoinedConsumer", "postgres_url"),
    ("JoinedFunction", "mariadb_url"),
    ("JoinedConsumer", "sqlite_url"),
    ("JoinedFunctionSync", "postgres_url"),
    ("JoinedConsumerSync", "mariadb_url"),
    ("JoinedFunctionSync", "sqlite_url"),
]


@pytest.mark.parametrize(("scenario", "database"), JOINED)
def test_joined(request: pytest.FixtureRequest, scenario: str, database: str) -> None:
    """Record and effect are inserted and updated in one transaction with one COMMIT, whichever way it is called."""
    report = assert_once(f"scenarios:{scenario}", request.getfixturevalue(database))

    besides = ("ROLLBACK", "PRAGMA", "SELECT")
    steps = [label for label in report.labels if not any(word in label for word in besides)]
    inserted = ["before INSERT prove_record", "after INSERT prove_record"]
    assert steps == [*inserted, *HANDLED, *COMMITTED]
    assert (len(report.labels), report.found) == (LABELS[database], LABELS[database])


def test_a_rerun_on_redis_repeats_between_effect_and_record(redis_url: str) -> None:
    """At least once: an effect that happened, and was not recorded, happens again, and at no other label."""
    report = crash_everywhere("scenarios:LeasedRedis", redis_url, recorded="after complete")

    assert report.labels == ("before claim", "after claim", "effect", "before complete", "after complete")
    assert report.repeated == ("effect", "before complete")
    assert (report.ok, report.held, report.found) == (True, (), 7)


def test_a_rerun_on_postgresql_repeats_between_effect_and_record(postgres_url: str) -> None:
    """As on Redis, from the COMMIT of the effect until the statement that records it was applied."""
    recorded = "complete > after UPDATE prove_record"

    report = crash_everywhere("scenarios:LeasedSQL", postgres_url, recorded=recorded)

    window = ("after COMMIT", *CHECKED_IN, "effect", "before complete", "complete > before UPDATE prove_record")
    assert report.repeated == window
    assert (report.ok, report.held, len(report.labels), report.found) == (True, (), 21, 27)


def test_a_hold_on_redis_repeats_nothing(redis_url: str) -> None:
    """At most once: from the claim until the record the outcome is unknown, and settles when it is resolved."""
    report = assert_once("scenarios:HeldRedis", redis_url)

    assert report.held == ("after claim", "effect", "before complete")
    assert (report.repeated, report.found) == ((), 5)


def test_a_hold_on_postgresql_repeats_nothing(postgres_url: str) -> None:
    """As on Redis, from the statement that claims until the one that records."""
    report = assert_once("scenarios:HeldSQL", postgres_url)

    held = report.labels[4:17]
    assert (held[0], held[-1]) == ("claim > after INSERT prove_record", "complete > before UPDATE prove_record")
    assert report.held == held
    assert (report.repeated, len(report.labels), report.found) == ((), 21, 21)


def test_the_script_prints_a_line_per_mode_and_succeeds(
    sqlite_url: str, prove: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its table has the counts, its last line the sum, and its exit status is 0."""
    monkeypatch.setattr(prove, "MODES", tuple(mode for mode in prove.MODES if mode.name == "joined function, sync"))
    monkeypatch.setattr(sys, "argv", ["prove", "--store", sqlite_url])

    status = prove.main()

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0].split()[:8] == ["mode", "store", "labels", "expected", "found", "lost", "doubled", "stuck"]
    assert lines[1].startswith(f"joined function, sync  {sqlite_url} ")
    assert lines[1].split()[4:10] == ["13", "13", "13", "0", "0", "0"]
    assert lines[-1].startswith("13 processes killed, one per label, in ")
    assert lines[-1].endswith(": none lost, doubled or stuck")


def test_the_script_fails_on_a_broken_mode(
    tmp_path: Path, prove: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One doubled effect is printed with its label, and the whole run is wrong."""
    monkeypatch.setattr(prove, "MODES", (prove.Mode("broken", "tests.kit.crash_scenarios:Doubled"),))
    monkeypatch.setattr(prove, "JOBS", 2)

    assert not prove.run([prove.Place("files", str(tmp_path))], quick=False)

    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:8] == ["broken", "files", "3", "3", "4", "0", "1", "0"]
    assert "  doubled: between\n" in out
    assert out.endswith(": 1 lines are WRONG\n")

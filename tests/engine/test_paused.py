"""An owner that is stopped for longer than its lease, while a duplicate completes, and then goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from idempotency.testing import Report, crash_everywhere
from tests.kit.paths import SCRIPTS

pytestmark = pytest.mark.processes

PAUSE = 20.0
"""Seconds, of which a duplicate that can take over needs one, the lease, and a little."""

SHORT_PAUSE = 3.0
"""Seconds; where the owner has locked the row, its duplicates try in vain all the time."""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which deliveries say what they saw."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "_prove"))
    return tmp_path / "seen"


def paused(scenario: str, url: str, seen: Path, label: str, recorded: str | None = None) -> Report:
    """Stop the owner at ``label`` only."""
    name = f"tests.kit.paused_scenarios:{scenario}"
    return crash_everywhere(name, url, str(seen), only=[label], pause=PAUSE, recorded=recorded)


def deliveries(seen: Path) -> list[dict[str, object]]:
    """Return what the deliveries of the paused owner's key saw, in the order in which they ended."""
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    key = lines[-1]["key"]
    return [{name: line[name] for name in line if name != "key"} for line in lines if line["key"] == key]


DUPLICATE = {"attempt": 2, "lost": False, "events": ["stored"], "answer": "attempt 2"}
OWNER = {"attempt": 1, "lost": True, "events": ["superseded", "replayed"], "answer": "attempt 2"}
RETRY = {"attempt": 0, "lost": False, "events": ["replayed"], "answer": "attempt 2"}


@pytest.mark.parametrize(
    ("database", "label"),
    [
        ("postgres_url", "effect"),
        ("mariadb_url", "effect"),
        # On SQLite an effect that is not committed locks the file, and nobody can take over: so it stops before.
        ("sqlite_url", "before INSERT prove_effect"),
    ],
)
def test_a_late_owner_of_a_transaction_is_rolled_back(
    request: pytest.FixtureRequest, seen: Path, database: str, label: str
) -> None:
    """Its effect is undone, it is told by ``lost``, and its client gets the duplicate's response."""
    report = paused("Transactional", request.getfixturevalue(database), seen, label)

    assert (report.ok, report.found) == (True, 1), str(report)
    assert deliveries(seen) == [DUPLICATE, RETRY, OWNER, RETRY, RETRY]


def test_a_late_owner_on_postgresql_cannot_record(postgres_url: str, seen: Path) -> None:
    """Its effect is its own and stays, but the record is the duplicate's, and it is told by ``lost``."""
    recorded = "complete > after UPDATE prove_record"

    report = paused("LeasedSQL", postgres_url, seen, "before complete", recorded)

    assert (report.repeated, report.found, report.ok) == (("before complete",), 2, True), str(report)
    assert deliveries(seen) == [DUPLICATE, RETRY, OWNER, RETRY, RETRY]


def test_a_late_owner_on_redis_cannot_record(redis_url: str, seen: Path) -> None:
    """Its effect is its own and stays, but the record is the duplicate's, and it is told by ``lost``."""
    report = paused("LeasedRedis", redis_url, seen, "before complete", "after complete")

    assert (report.repeated, report.found, report.ok) == (("before complete",), 2, True), str(report)
    assert deliveries(seen) == [DUPLICATE, RETRY, OWNER, RETRY, RETRY]


@pytest.mark.parametrize("database", ["postgres_url", "mariadb_url"])
def test_an_owner_paused_anywhere_has_one_effect(request: pytest.FixtureRequest, seen: Path, database: str) -> None:
    """At whichever statement or COMMIT a transaction stands still, effect and record stay one."""
    url = request.getfixturevalue(database)

    report = crash_everywhere("scenarios:TransactionalHTTP", url, pause=SHORT_PAUSE, jobs=8)

    assert report.ok, str(report)
    assert report.found == report.expected

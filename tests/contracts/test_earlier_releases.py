"""Processes of earlier commits beside those of this one, on one store; the proof on more stores is scripts/prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules
from tests.kit.servers import missing

pytestmark = pytest.mark.processes


@pytest.fixture
def contracts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of the proof, where the history has the earlier commits."""
    module = script_modules(monkeypatch, SCRIPTS / "_prove")("contracts")
    if not module.has_history():
        missing("the history of the repository has no earlier commits")
    return module


@pytest.fixture
def names(contracts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module of the proof that the version is raised."""
    return script_modules(monkeypatch, SCRIPTS / "_prove")("contracts_names")


@pytest.mark.parametrize("earlier", ["FIRST", "SAGAS"])
def test_earlier_code_and_this_one_share_a_store(contracts: Any, earlier: str, sqlite_url: str, tmp_path: Path) -> None:
    """Results, failures, responses, deliveries, sagas and tools: each is done once, and all are answered the same."""
    known = getattr(contracts, earlier)
    package = contracts.wheel_of(known.commit, tmp_path)
    place = contracts.Place("SQLite", sqlite_url, {})
    contracts.create(place, package, known.sagas)
    arguments = {"count": 4, "sagas": known.sagas, "key": ""}

    result = contracts.run_together(place, [package, contracts.ROOT], arguments, tmp_path / "ledger")

    kinds = 7 if known.sagas else 4  # a saga has two effects
    assert result.wrong == []
    assert (result.effects, result.lost, result.doubled, result.errors) == (4 * kinds, 0, 0, 0)


@pytest.mark.parametrize("earlier", ["OUTBOX", "EVENTS"])
def test_earlier_code_and_this_one_share_an_outbox_and_streams(
    contracts: Any, earlier: str, sqlite_url: str, tmp_path: Path
) -> None:
    """Each publishes and projects what the other one wrote: once, in order; snapshots are read as they were written."""
    known = getattr(contracts, earlier)
    packages = {"earlier": [contracts.wheel_of(known.commit, tmp_path)], "this one": [contracts.ROOT]}
    trial = contracts.contracts_events.Trial(known.commit, packages, known.events)

    result = contracts.contracts_events.run_together(sqlite_url, trial, 2, tmp_path / "ledger")

    # Five keys, 2 messages each, by one process, by the other one, and by both; and 2 operations in each step.
    assert result == contracts.contracts_events.Result(46, 40 if known.events else 0, [])


def test_what_the_other_one_lost_doubled_or_read_otherwise_is_wrong(contracts: Any) -> None:
    """The judge of messages and events sees each of it."""
    expected = contracts.contracts_events.Expected(1, True)

    class Writer:
        me = "p0"

    expected.add("earlier", [Writer])
    names = ["place earlier-0", *(f"account-{key} p0 earlier 0" for key in range(1, 5))]
    published = [{"name": name, "side": "this one", "trace": "ä"} for name in [*names, names[0]]]
    published[1]["side"] = "earlier"
    events = [[f"account-{key}", 1, "p0 earlier 0", 0] for key in range(4)]
    states = {f"account-{key}": [1, 0, 1, key != 2] for key in range(5)}
    answer = {"states": states, "events": events, "seen": [["account-0", 1]] * 5}

    wrong = sorted(expected.wrong(published, [answer]))

    assert [each.partition(":")[0].partition(" {")[0] for each in wrong] == [
        "events lost or doubled",
        "message account-0 p0 earlier 0",
        "message place earlier-0",
        "message published otherwise",
        "projected 5 events, 1 of 5 that there are",
        "streams are",
    ]


def test_what_is_lost_doubled_or_answered_otherwise_is_wrong(contracts: Any) -> None:
    """The judge sees each of it."""
    answers = [{"function 1": "a", "saga 1": "b"}, {"function 1": "c", "saga 1": "error: E: no"}]

    result = contracts.judged(answers, ["function 1", "function 1", "saga 1"])

    assert (result.doubled, result.lost, result.errors) == (1, 1, 1)
    assert result.wrong == [
        "function 1: ['a', 'c']",
        "function 1: done 2 times",
        "saga 1: ['b', 'error: E: no']",
        "pay 1: done 0 times",
    ]


@pytest.mark.parametrize("earlier", ["FIRST", "SAGAS"])
def test_the_version_is_raised_beside_earlier_code(
    contracts: Any, names: Any, earlier: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The columns are added while an earlier commit works; names are written, and nothing else changes."""
    known = getattr(contracts, earlier)
    package = contracts.wheel_of(known.commit, tmp_path)
    place = contracts.Place("SQLite", sqlite_url, {})
    contracts.create(place, package, False)

    raised = names.raise_version(place, package, 10, tmp_path / "ledger", seconds=1.0)

    assert raised.result.wrong == []
    assert (raised.result.effects, raised.result.lost, raised.result.doubled, raised.result.errors) == (40, 0, 0, 0)
    assert raised.result.answers == 5 * 40
    assert raised.records == 40

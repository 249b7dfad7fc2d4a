"""The proofs of streams, small: a load of processes, and what is seen as wrong in what a reader gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from idempotency.streams import Position
from idempotency.testing import crash_everywhere
from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

pytestmark = pytest.mark.processes


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of scripts/_prove by its name."""
    monkeypatch.setenv("PYTHONPATH", "")
    return script_modules(monkeypatch, SCRIPTS / "_prove")


SMALL = {"writers": 4, "readers": 2, "killed_writers": 1, "killed_readers": 1}


def test_a_load_on_sqlite(prove: Any, sqlite_url: str, tmp_path: Path) -> None:
    """A writer and a reader are killed, and others go on: all is read once, in order."""
    load = prove("streams_load").Load(sqlite_url, "load", 2, 100, 0.01, 0.2, str(tmp_path), **SMALL)

    result = prove("streams_stage").run(prove("processes").fork_server("streams_load"), load)

    assert result.wrong == prove("streams_judge").Wrong()
    assert result.ok
    assert result.killed == 2
    assert result.events > 400


def test_readers_without_the_bound_lose_events(prove: Any, postgres18_url: str, tmp_path: Path) -> None:
    """The proof can fail: without the bound, what the open transaction commits is behind what was read."""
    load = prove("streams_load").Load(
        postgres18_url, "unbounded", 2, 100, 0.5, 0.01, str(tmp_path), patience=2.0, bounded=False, **SMALL
    )

    result = prove("streams_stage").run(prove("processes").fork_server("streams_load"), load)

    assert result.wrong.lost > 0
    assert not result.ok


def delivered(prove: Any, *events: tuple[int, str, int, str, int, int]) -> list[Any]:
    """Return what a reader got: seq, stream, version, writer, batch, number."""
    make = prove("streams_judge").Delivered
    return [
        make((0, seq), stream, version, (writer, batch), number)
        for seq, stream, version, writer, batch, number in events
    ]


A1, A2, A3 = (1, "a", 1, "0.0", 0, 0), (2, "a", 2, "0.0", 0, 1), (3, "a", 3, "0.0", 1, 0)
B1, B2 = (4, "b", 1, "1.0", 0, 0), (5, "b", 2, "1.0", 0, 1)


@pytest.mark.parametrize(
    ("got", "wrong"),
    [
        ([[A1, A2, A3]], {}),
        ([[A1, A2, A3, B1, B2], [A1, A2, A3, B1, B2]], {}),
        ([[A1, A2]], {"lost": 1}),
        ([[A1, A3]], {"lost": 1, "disordered": 1}),
        ([[A1, A2, A3, B1, B2], [A1, A2, A3]], {"lost": 2}),
        ([[A1, A2, A2, A3]], {"doubled": 1, "disordered": 1}),
        ([[A2, A1, A3]], {"disordered": 3}),
        ([[A1, A2, A3, B1]], {"torn": 1}),
        ([[A1, A2, A3, (6, "c", 1, "2.0", 0, 0)]], {"rolled_back": 1}),
        ([[A1, A2, A3, (6, "c", 1, "2.0", 1, 0)]], {"rolled_back": 1}),
        (
            [[(3, *A1[1:]), (4, *A2[1:]), (5, *A3[1:]), (6, *B1[1:]), (7, *B2[1:])], [A1, A2, A3, B1, B2]],
            {"disordered": 1},
        ),
    ],
)
def test_what_is_wrong_is_counted(prove: Any, got: Any, wrong: dict[str, int]) -> None:
    """Two transactions are committed, the answer of the third was lost, two never were."""
    judge = prove("streams_judge")
    attempts = {
        ("0.0", 0): judge.Attempt("a", 2, "committed"),
        ("0.0", 1): judge.Attempt("a", 1, "committed"),
        ("1.0", 0): judge.Attempt("b", 2),
        ("2.0", 0): judge.Attempt("c", 1, "refused"),
        ("2.0", 1): judge.Attempt("c", 1, "undone"),
    }

    found = judge.compare(attempts, [delivered(prove, *reader) for reader in got])

    assert found == judge.Wrong(**wrong)
    assert found.ok is not bool(wrong)


def test_what_the_processes_have_noted_is_read(prove: Any, tmp_path: Path) -> None:
    judge = prove("streams_judge")
    (tmp_path / "writer-3.1").write_text("0 begun s1 2\n0 committed\n1 begun s2 4\n")
    (tmp_path / "reader-0").write_text("7.9 s1 1 3.1 0 0\n= 7.9\n")

    assert judge.attempts_in(tmp_path) == {
        ("3.1", 0): judge.Attempt("s1", 2, "committed"),
        ("3.1", 1): judge.Attempt("s2", 4, "begun"),
    }
    assert judge.delivered_in(tmp_path / "reader-0") == [judge.Delivered((7, 9), "s1", 1, ("3.1", 0), 0)]
    assert judge.delivered_in(tmp_path / "reader-1") == []


@pytest.mark.parametrize(
    ("noted", "found", "kept"),
    [
        (None, (0, Position()), ""),
        ("1.1 a 1 0.0 0 0\n", (0, Position()), ""),
        ("1.1 a 1 0.0 0 0\n= 1.1\n", (1, Position(1, 1)), "1.1 a 1 0.0 0 0\n= 1.1\n"),
        ("1.1 a 1 0.0 0 0\n= 1.1\n1.2 a 2 0.0 1 0\n= 1.", (1, Position(1, 1)), "1.1 a 1 0.0 0 0\n= 1.1\n"),
    ],
)
def test_a_reader_goes_on_after_its_last_whole_page(
    prove: Any, tmp_path: Path, noted: str | None, found: tuple[int, Position], kept: str
) -> None:
    if noted is not None:
        (tmp_path / "reader-0").write_text(noted)

    assert prove("streams_load").resume(tmp_path / "reader-0") == found
    assert (tmp_path / "reader-0").read_text() == kept


@pytest.mark.parametrize(
    ("module", "name", "label"),
    [("streams_scenarios", "LeasedAppend", "appended"), ("backfill", "Backfill", "filled #2")],
)
def test_a_process_is_killed_while_it_works(prove: Any, sqlite_url: str, module: str, name: str, label: str) -> None:
    """The next run does what is missing, and nothing twice."""
    report = crash_everywhere(getattr(prove(module), name), sqlite_url, only=(label,), jobs=1)

    assert report.ok
    assert (report.expected, report.found) == (1, 1)


def test_backfills_of_one_name_on_sqlite(prove: Any, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, of which one is killed, and code that changes rows: each is filled, once."""
    backfill = prove("backfill")
    monkeypatch.setattr(backfill, "WORKERS", 2)
    monkeypatch.setattr(backfill, "KILLED", 1)

    found = backfill.run(prove("processes").fork_server("backfill"), sqlite_url, "load", 200)

    assert found.ok
    assert (found.killed, found.lost, found.doubled, found.wrong_total) == (1, 0, 0, 0)
    assert found.changes > 0

"""The proofs of streams, small: a load in threads, and what is seen as wrong in what a reader gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from idempotency.testing import crash_everywhere
from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

pytestmark = pytest.mark.processes


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of scripts/_prove by its name."""
    return script_modules(monkeypatch, SCRIPTS / "_prove")


def test_a_load_on_sqlite(prove: Any, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three writers and two readers: all is read once, in order."""
    load = prove("streams_load")
    monkeypatch.setattr(load, "WRITERS", 3)
    monkeypatch.setattr(load, "READERS", 2)
    with ThreadPoolExecutor(6) as pool:
        result = load.run(pool, load.Load(sqlite_url, "load", 2, 20, 0.01, 0.05, str(tmp_path)))

    assert result.ok
    assert result.events > 60


def test_what_is_wrong_is_counted(prove: Any, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One event is missing, and two have changed places."""
    load = prove("streams_load")
    monkeypatch.setattr(load, "PATIENCE", 0.3)
    place = load.Load(sqlite_url, "load", 1, 0, 0.0, 0.0, str(tmp_path))
    engine, events = place.engine(), place.events
    events.create_schema_sync(engine)
    with engine.begin() as connection:
        events.append_sync(connection, "s0", [load.Written(0, number) for number in range(6)])
        connection.execute(text("DELETE FROM load WHERE version = 2"))
        connection.execute(text("UPDATE load SET seq = 9 WHERE version = 5"))
    engine.dispose()
    (tmp_path / "total").write_text("6")

    found = load.read(place)

    assert (found.count, found.doubled > 0, found.disordered > 0) == (5, True, True)


def test_a_process_is_killed_while_it_appends(prove: Any, sqlite_url: str) -> None:
    """Before and after the commit: the next run appends what is missing, and nothing twice."""
    scenario = prove("streams_scenarios").LeasedAppend
    report = crash_everywhere(scenario, sqlite_url, only=("appended",), jobs=1)

    assert report.ok
    assert (report.expected, report.found) == (1, 1)

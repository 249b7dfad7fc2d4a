"""The proof of a rebuild, small, and what is seen as wrong in what readers get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

pytestmark = pytest.mark.processes


@pytest.fixture
def rebuild(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module scripts/_prove/projections_rebuild.py."""
    return script_modules(monkeypatch, SCRIPTS / "_prove")("projections_rebuild")


def test_a_rebuild_beside_live_writes_on_sqlite(rebuild: Any, sqlite_url: str, tmp_path: Path) -> None:
    """A builder is killed at a commit and at four places of the switch; nothing is wrong, and no table remains."""
    load = rebuild.Load(sqlite_url, "rebuilt", 200, 1, str(tmp_path))
    result = rebuild.run(load)

    assert result.ok, result
    assert (result.killed, result.commits) == (5, 1)
    engine = load.engine()
    tables = inspect(engine).get_table_names()
    engine.dispose()
    assert not [name for name in tables if name.startswith("rebuilt")]


def test_what_is_wrong_is_counted(rebuild: Any, sqlite_url: str, tmp_path: Path) -> None:
    """Of 60 events one is lost in one version, and one doubled in the other; a reader sees both as holes."""
    load = rebuild.Load(sqlite_url, "rebuilt", 60, 0, str(tmp_path))
    rebuild.create(load)
    for stream in range(rebuild.STREAMS):
        rebuild.fill(load, stream)
    engine = load.engine()
    for version in (1, 2):
        load.projection(engine, version).rebuild()
    with engine.begin() as connection:
        assert rebuild.check(load, engine, 0) == (0, 0, 0)
        connection.execute(text("UPDATE rebuilt_view_1 SET applied = 2 WHERE stream = 's7'"))
        connection.execute(text("UPDATE rebuilt_view_2 SET applied = 4 WHERE stream = 's8'"))
    found = rebuild.check(load, engine, 0), rebuild.read(load)
    engine.dispose()

    assert found == ((1, 1, 2), (rebuild.SEEN, rebuild.SEEN, 0))

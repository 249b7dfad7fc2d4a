"""What ``scripts/bench --saga`` measures, with few workflows."""

from __future__ import annotations

import pytest

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules
from tests.kit.targets import unique_name

pytestmark = pytest.mark.processes


async def test_workflows_are_counted_and_timed(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five steps: the saga is opened and ended; a leased step is begun and done, a joined one only done."""
    bench = script_modules(monkeypatch, SCRIPTS / "_bench")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    saga, report = bench("saga"), bench("saga_report")
    monkeypatch.setattr(saga, "AT_ONCE", (2,))
    monkeypatch.setattr(saga, "COUNTED", 2)
    monkeypatch.setattr(bench("saga_peer"), "installed", False)

    (costs,) = [each async for each in saga.measure(postgres_url, unique_name("bench"), saga.Amount(1, 2))]

    assert [(each.kind, each.at_once) for each in costs] == [("leased", 2), ("joined", 2)]
    assert [(each.statements, each.commits) for each in costs] == [(12, 12), (7, 7)]
    assert all(each.per_second > 0 and each.processor > 0 for each in costs)
    assert [line.split()[:2] for line in report.saga_rows(costs).splitlines()] == [["leased", "2"], ["joined", "2"]]


def test_the_ratio_is_to_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it was measured beside."""
    bench = script_modules(monkeypatch, SCRIPTS / "_bench")
    saga, report = bench("saga"), bench("saga_report")
    ours, peer = saga.Cost("joined", 16, 150.0, 7, 7, 5000.0), saga.Cost("DBOS", 16, 60.0, 23, 12, 14000.0)

    first, second = report.saga_rows([ours, peer]).splitlines()
    assert first.split() == ["joined", "16", "150", "2.50", ">=", "2.00", "7.0", "7.0", "5000", "us", "0.36"]
    assert second.split() == ["DBOS", "16", "60", "23.0", "12.0", "14000", "us"]
    assert report.saga_rows([ours]).split() == ["joined", "16", "150", "7.0", "7.0", "5000", "us"]

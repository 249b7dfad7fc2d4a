"""What ``scripts/bench --console`` measures, with few records."""

from __future__ import annotations

import pytest

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules


async def test_the_first_byte_of_the_page_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside records that are done, with some that wait."""
    bench = script_modules(monkeypatch, SCRIPTS / "_bench")
    console, subjects = bench("console"), bench("subjects")

    subject = subjects.subject_of("memory://", "bench")
    async with subjects.opened(subject):
        costs = await console.measure(subject, 300)

    assert costs.records == 300
    assert all(0 < each < 10_000 for each in costs.samples)
    assert console.row(subject.name, console.Costs(100_000, [1.0, 2.0, 9.0])).split()[-5:] == [
        "100,000",
        "2.0",
        "9.0",
        "<=",
        "300",
    ]

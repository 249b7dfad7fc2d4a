"""The proofs of the outbox, small: kills at some labels, and relays and servers that are killed at random."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

pytestmark = pytest.mark.processes


@pytest.fixture
def prove(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of scripts/_prove by its name."""
    monkeypatch.setenv("PYTHONPATH", "")
    return script_modules(monkeypatch, SCRIPTS / "_prove")


def test_the_labels_of_a_relay_on_sqlite(
    prove: Any, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the broker confirmed, and after it did: a repetition is seen, and nothing else."""
    outbox = prove("outbox")
    only = ["after SELECT outbox #3", "after publish", "after DELETE outbox"]
    monkeypatch.setattr(outbox, "JOBS", 2)
    monkeypatch.setattr(outbox, "places", lambda _: nullcontext([outbox.Place("SQLite", sqlite_url)]))
    monkeypatch.setattr(outbox, "chosen", lambda labels, *_: [label for label in labels if label in only])

    assert outbox.run(quick=True)

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["poll", "SQLite", "file", "3"]
    assert lines[1].split()[4:10] == ["0", "0", "0", "0", "0", "4"]
    assert lines[-1].endswith(": none lost, phantom, doubled, reordered or stuck")


def test_what_is_wrong_is_counted(prove: Any) -> None:
    """Each kind of fault, in what was emitted, what arrived, and what took effect."""
    consumer, delivered = prove("outbox_consumer"), prove("outbox_brokers").Delivered
    first, second, lost, phantom = (
        delivered(*row) for row in (("1", "k", 0), ("2", "k", 1), ("3", "k", 2), ("4", "q", 0))
    )

    found = consumer.compare(
        [second, first, first, phantom],
        {first, second, lost},
        consumer.Counter({first: 2, second: 1, phantom: 1}),
    )

    assert found == consumer.Found(lost=1, phantom=1, doubled=1, reordered=1, repeated=1)
    assert not found.ok
    assert consumer.Found(repeated=3).ok

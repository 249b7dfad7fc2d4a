"""What ``scripts/bench --outbox`` measures, with few messages."""

from __future__ import annotations

import os

import pytest

from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules

pytestmark = pytest.mark.processes


async def test_a_relay_is_measured_beside_a_load(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises unless each message was published; samples and their publishes are of one clock."""
    bench = script_modules(monkeypatch, SCRIPTS / "_bench")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    outbox, latency, emitting = (bench(name) for name in ("outbox", "outbox_latency", "outbox_emitting"))

    async with outbox.opened(postgres_url, f"bench_outbox_{os.getpid()}") as (engine, box):
        rate = await outbox.relayed("poll", outbox.AtOnce(), engine, box, 2 * outbox.KEYS)
        across = await latency.across(postgres_url, engine, box, 100, 5)
        cost = await emitting.emitting(engine, box, 0.1, 1)

    assert rate.per_second > 0
    assert 0 < across.median <= across.p99
    assert min(cost.ours, cost.by_hand) > 0

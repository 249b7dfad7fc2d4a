"""The consumers that ``scripts/bench --messages`` measures, with few messages."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.rabbitmq import URL
from tests.kit.paths import SCRIPTS
from tests.kit.script_modules import script_modules
from tests.kit.servers import missing


@pytest.fixture(autouse=True)
def _rabbitmq() -> None:
    if reason := missing_broker("aio_pika"):
        missing(reason)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of scripts/_bench by its name."""
    return script_modules(monkeypatch, SCRIPTS / "_bench")


async def test_every_way_handles_each_message_once_and_has_a_row(postgres_url: str, bench: Any) -> None:
    """The measuring itself counts the effects of both deliveries, and raises where they are not one per message."""
    subject = bench("subjects").subject_of(postgres_url, f"bench_messages_{os.getpid()}")
    await subject.open()
    try:
        rates = await bench("messages").measure(URL, subject, [subject], messages=3, rounds=1)
    finally:
        await subject.close()

    names = ["bare", "by hand, one", "by hand, three", "joined", "leased PostgreSQL"]
    assert [(rate.name, rate.replay is not None) for rate in rates] == [(name, name != "bare") for name in names]
    rows = bench("messages_report").messages_table(rates).splitlines()[-5:]
    assert [row[:20].strip() for row in rows] == names
    assert rows[0].split("|")[0].split()[3] == "1.00"


async def test_an_effect_that_happened_twice_ends_the_measuring(
    postgres_url: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of a consumer that does its work twice are not printed."""
    messages, subject = bench("messages"), bench("subjects").subject_of(postgres_url, f"bench_twice_{os.getpid()}")
    insert = messages.Effects.insert

    async def insert_twice(*arguments: Any) -> Any:
        await insert(*arguments)
        return await insert(*arguments)

    monkeypatch.setattr(messages.Effects, "insert", insert_twice)
    await subject.open()
    try:
        with pytest.raises(RuntimeError, match="9 messages were handled bare: 18 effects, of 9 messages"):
            await messages.measure(URL, subject, [], messages=3, rounds=1)
    finally:
        await subject.close()

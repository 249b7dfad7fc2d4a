"""An hour in which the broker is away, or does not take some messages. The clock is moved, and nobody sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner

from idempotency._cli.commands import app
from idempotency.outbox import Message, Outbox, Outcome, Refused, RetryLater, Sent
from idempotency.outbox._log import LogRelay
from idempotency.outbox._relay import Relay
from idempotency.outbox.events import RelayEvent
from tests.kit.ledger import Ledger
from tests.kit.moved_clock import HOUR, MovedClock
from tests.kit.relays import count, emit, relay_on
from tests.kit.sql_store import until
from tests.outbox.kit.logical import Recorder, slot_of

pytestmark = pytest.mark.timeout(180)

KEYS = 5
WAITS = 60.0
"""Seconds between two looks of a relay. Its lease is longer than the test."""
OPTIONS: dict[str, Any] = {"lease": 6 * HOUR, "poll": (WAITS, WAITS)}

DATABASES = pytest.mark.stores("sqlite", "postgres", "mariadb")
LOG = pytest.mark.parametrize("mode", ["table", "message"])
ONE_SERVER = pytest.mark.parametrize("logical_server", ["installed"], indirect=True)


class Away(Recorder):
    """A publisher to a broker that cannot be reached until it is back."""

    back = False

    async def publish(self, batch: Any, /) -> Any:
        """Fail as a whole, as a driver does that has no connection."""
        if not self.back:
            raise ConnectionRefusedError
        return await super().publish(batch)


class Hour:
    """An outbox, a clock that is moved, and what comes of a relay."""

    def __init__(self, engine: AsyncEngine, outbox: Outbox, clock: MovedClock) -> None:
        self.engine = engine
        self.outbox = outbox
        self.clock = clock
        self.events: list[RelayEvent] = []
        self.emitted = 0

    async def emit(self, *keys: object) -> None:
        """Emit a message of each key, whose type is its number."""
        numbered = [(key, str(self.emitted + place)) for place, key in enumerate(keys)]
        self.emitted += len(keys)
        await emit(self.engine, self.outbox, *numbered)

    @asynccontextmanager
    async def running(self, relay: Relay) -> AsyncIterator[None]:
        """Run a relay in this block."""
        running = asyncio.create_task(relay.run())
        yield
        await relay.stop()
        await running

    async def command(self, *arguments: str) -> list[str]:
        """Return the lines of a command on the outbox."""
        url = self.engine.url.render_as_string(hide_password=False)
        table = self.outbox.tables.messages.name
        command = ["outbox", *arguments, "--store", url, "--table", table]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()


@pytest.fixture
async def hour(ledger: Ledger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hour]:
    """An hour of a relay that polls."""
    clock = MovedClock(ledger.engine, f"{ledger.name}_clock", monkeypatch)
    async with clock.moving():
        yield Hour(ledger.engine, outbox, clock)


@pytest.fixture
async def log_hour(log_engine: AsyncEngine, mode: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hour]:
    """An hour of a relay of the log, whose slot is there already."""
    clock = MovedClock(log_engine, "moved_clock", monkeypatch)
    async with clock.moving():
        hour = Hour(log_engine, Outbox(mode=mode), clock)
        await log_relay(hour, Recorder()).drain()
        yield hour


async def until_true(condition: Callable[[], bool]) -> None:
    async def met() -> bool:
        return condition()

    await until(met, 150)


def log_relay(hour: Hour, publisher: Any) -> LogRelay:
    return LogRelay(
        hour.engine,
        publisher,
        outbox=hour.outbox,
        slot=slot_of(hour.engine),
        on_event=hour.events.append,
        **OPTIONS,
    )


@DATABASES
async def test_a_broker_that_is_away_for_an_hour(hour: Hour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idempotency.outbox._relay._LAST_PAUSE", WAITS)
    publisher = Away()
    await away_for_an_hour(hour, relay_on(hour.engine, hour.outbox, publisher, hour.events, **OPTIONS), publisher)


@ONE_SERVER
@LOG
async def test_a_broker_that_is_away_for_an_hour_while_the_log_is_read(
    log_hour: Hour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idempotency.outbox._relay._LAST_PAUSE", WAITS)
    publisher = Away()
    await away_for_an_hour(log_hour, log_relay(log_hour, publisher), publisher)


async def away_for_an_hour(hour: Hour, relay: Relay, publisher: Away) -> None:
    """Messages are emitted all the time. None is given up, and each is published once, in the order of its key."""
    tables = hour.outbox.tables

    async def go_on() -> None:
        if hour.clock.passed < HOUR and hour.emitted < 100 * KEYS:
            await hour.emit(*range(KEYS))

    hour.clock.each = go_on
    async with hour.running(relay):
        await until_true(lambda: hour.clock.passed > HOUR)
        waiting = await hour.command("list", "--limit", "10000")
        dead = await count(hour.engine, tables.dead)
        assert publisher.messages == []
        publisher.back = True
        await until_true(lambda: len(publisher.messages) >= hour.emitted)
    assert {event.reason for event in hour.events if event.kind == "unavailable"} == {"ConnectionRefusedError"}
    assert {event.kind for event in hour.events} == {"unavailable", "retry", "published"}
    # What is emitted last may be in the log still.
    assert hour.emitted - KEYS <= len(waiting) <= hour.emitted
    assert {line.split("\t")[3] for line in waiting} == {"attempts=0"}
    assert dead == 0
    published = [(message.aggregate_id, int(message.type)) for message in publisher.messages]
    for key in map(str, range(KEYS)):
        assert [number for each, number in published if each == key] == list(range(int(key), hour.emitted, KEYS))
    assert await count(hour.engine, tables.messages) == await count(hour.engine, tables.dead) == 0


@DATABASES
async def test_messages_that_a_broker_does_not_take_for_an_hour(hour: Hour) -> None:
    publisher = Recorder()
    await refusing_for_an_hour(hour, relay_on(hour.engine, hour.outbox, publisher, hour.events, **OPTIONS), publisher)


@ONE_SERVER
@LOG
async def test_messages_that_a_broker_does_not_take_for_an_hour_while_the_log_is_read(log_hour: Hour) -> None:
    publisher = Recorder()
    await refusing_for_an_hour(log_hour, log_relay(log_hour, publisher), publisher)


async def refusing_for_an_hour(hour: Hour, relay: Relay, publisher: Recorder) -> None:
    """One key fails again and again, and one is refused: both are dead in the end, and delay no other key."""
    failed: list[float] = []
    delays: list[float] = []
    emitted_at: dict[str, float] = {}

    def answer(message: Message) -> Outcome:
        match message.aggregate_id, message.type:
            case "poison", "0":
                failed.append(hour.clock.monotonic())
                return RetryLater("quota exceeded")
            case "large", _:
                return Refused("it has 2 MB")
        delays.append(hour.clock.passed - emitted_at.get(message.type, hour.clock.passed))
        return Sent()

    async def go_on() -> None:
        emitted_at[str(hour.emitted)] = hour.clock.passed
        await hour.emit("good")

    publisher.answer = answer
    await hour.emit("poison", "poison", "large")
    hour.clock.each = go_on
    async with hour.running(relay):
        await until_true(lambda: "1" in [message.type for message in publisher.messages])

    # The first attempts do not count until another message gets through: the broker could be away. Then by the
    # schedule: after 1 second, twice as long each time, at most 300 seconds; each up to a quarter shorter.
    assert len(failed) >= 21
    schedule = [min(300.0, 2.0**number) for number in range(19)]
    pauses = [after - before for before, after in pairwise(failed[-20:])]
    assert all(0.75 * least <= pause <= least + 2 * WAITS for pause, least in zip(pauses, schedule, strict=True))
    assert max(delays) <= 2 * WAITS
    dead = [line.split("\t") for line in await hour.command("list", "--dead")]
    assert sorted((fields[5], fields[6], fields[-1]) for fields in dead) == [
        ("type=0", "key=order/poison", "reason=given up after 20 attempts: quota exceeded"),
        ("type=2", "key=order/large", "reason=it has 2 MB"),
    ]
    async with hour.engine.connect() as connection:
        row = hour.outbox.tables.dead.c
        lived = await connection.scalar(select(func.max(row.died_ms - row.created_ms)))
    assert 0.75 * sum(schedule) <= lived / 1000 <= sum(schedule) + 40 * WAITS

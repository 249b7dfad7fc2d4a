"""What an operator sees of messages: records of operations, and counts of deliveries only as what they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idempotency import current, idempotent_consumer
from idempotency._cli.commands import app
from idempotency._rules import Claim, record_id
from tests.kit.handlers import POISON, id_of
from tests.kit.targets import Target, run_on

pytestmark = pytest.mark.stores("sqlite", "redis", "postgres")

SCOPE = "consumer:1:c"


@pytest.fixture
def place(store_target: Target) -> Iterator[Target]:
    """A store with its table, for commands that have an event loop of their own."""
    asyncio.run(store_target.create())
    return store_target


def command(place: Target, *arguments: str) -> Result:
    """Run a command on the records of ``place``."""
    names = [text for name, value in place.options.items() for text in (f"--{name}", value)]
    return CliRunner().invoke(app, [*arguments, "--store", place.url, *names])


def shown(place: Target, *arguments: str) -> list[dict[str, Any]]:
    """Inspect, and return the records that are printed."""
    result = command(place, "inspect", *arguments, "--json")
    records: list[dict[str, Any]] = json.loads(result.stdout) if result.exit_code == 0 else []
    return records


def deliver(place: Target, *ends: str, key: str = "order-7") -> None:
    """Deliver a message, not for the first time, once for each of these ends: ``fail``, ``hold`` or ``done``."""

    async def work(store: Any) -> None:
        @idempotent_consumer(store, consumer="c", key=id_of, max_attempts=5)
        async def handle(message: dict[str, Any]) -> None:
            operation = current()
            assert operation is not None
            if message["end"] == "hold":
                operation.hold()
            if message["end"] != "done":
                raise POISON

        for end in ends:
            await handle.deliver({"id": key, "end": end}, attempt=2)

    run_on(place, work)


def test_counts_are_shown_with_the_record_of_their_message(place: Target) -> None:
    """A key shows one record, with the deliveries that were begun and those that failed; an id shows the same."""
    deliver(place, "fail", "fail", "hold")
    record = record_id(SCOPE, "order-7").hex()

    for asked in (("order-7",), ("order-7", "--scope", SCOPE), ("--id", record)):
        (found,) = shown(place, *asked)
        assert (found["id"], found["state"], found["deliveries"]) == (record, "unknown", {"begun": 3, "failed": 2})
    lines = command(place, "inspect", "order-7").stdout.splitlines()
    assert lines[-2:] == ["begun:    3 (deliveries that were begun)", "failed:   2 (deliveries whose handler failed)"]


@pytest.mark.parametrize("outcome", ["done", "release"])
def test_counts_end_with_the_outcome_that_was_unknown(place: Target, outcome: str) -> None:
    """Once a message is resolved, nothing of its deliveries is counted any more, and none is shown as running."""
    deliver(place, "fail", "hold")
    (record,) = shown(place, "order-7")

    assert command(place, "resolve", record["id"], outcome).exit_code == 0

    assert [found["state"] for found in shown(place, "order-7")] == (["done"] if outcome == "done" else [])
    assert all("deliveries" not in found for found in shown(place, "order-7"))
    assert shown(place, "--id", record_id(f"begun:1:{SCOPE}", "order-7").hex()) == []


def test_counts_are_forgotten_with_the_record(place: Target) -> None:
    """A message that is forgotten is counted from the start."""
    deliver(place, "fail", "done")
    (record,) = shown(place, "order-7")
    assert (record["state"], record["deliveries"]) == ("done", {"begun": 2, "failed": 1})

    assert command(place, "forget", record["id"], "--yes").exit_code == 0

    assert shown(place, "order-7") == []


@pytest.mark.parametrize("asked", [("order-7",), ("order-7", "--scope", SCOPE)], ids=["key", "scoped"])
def test_counts_without_a_record_are_shown_as_counts(place: Target, asked: tuple[str, ...]) -> None:
    """A dead letter has no record. What is counted of it is shown, and to forget one count forgets all of them."""
    deliver(place, "fail", "fail")

    found = {each["counts"]: each for each in shown(place, *asked)}

    assert found.keys() == {"begun", "failed"}
    assert {each["state"] for each in found.values()} == {"count"}
    assert (
        "begun:    2 (deliveries that were begun)\n" in command(place, "inspect", "--id", found["begun"]["id"]).stdout
    )
    assert command(place, "forget", found["begun"]["id"], "--yes").exit_code == 0
    assert shown(place, *asked) == []


def test_counts_that_cannot_be_found_are_named(place: Target) -> None:
    """Of a key that is too long to be stored whole, the counts remain, which the command says."""
    deliver(place, "fail", "hold", key="k" * 2000)
    record = record_id(SCOPE, "k" * 2000).hex()

    result = command(place, "resolve", record, "done")

    assert (result.exit_code, result.stdout) == (0, f"{record} done\n")
    assert result.stderr == "note: the counts of its deliveries remain until they expire: its names are not whole\n"


@pytest.mark.parametrize(("hold", "state"), [(False, "lapsed"), (True, "unknown")])
def test_a_record_whose_owner_vanished_is_not_shown_as_running(place: Target, hold: bool, state: str) -> None:
    """Its lease is over. The next claim runs it, unless it is held."""
    claim = Claim(scope=SCOPE, key="order-7", fingerprint=b"", lease=0.0, ttl=60.0, hold=hold)
    run_on(place, lambda store: store.claim(claim))

    (found,) = shown(place, "order-7")
    lines = command(place, "inspect", "order-7").stdout.splitlines()

    assert found["state"] == state
    (line,) = (line for line in lines if line.startswith("state:"))
    assert (
        line
        == {
            "lapsed": "state:    lapsed: its owner has vanished, and the next claim runs it",
            "unknown": "state:    unknown",
        }[state]
    )

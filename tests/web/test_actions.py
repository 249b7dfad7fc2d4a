"""What an operator does on the page, and what the audit says of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency.errors import StoreError
from idempotency.saga import SagaOperations
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.web import console
from tests.saga.operate import trips
from tests.web.kit import claim_of, saga, stuck_saga, unknown
from tests.web.visitor import Visitor

EACH_STORE = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


async def audit_of(store: Any) -> list[tuple[str, str, str, str | None]]:
    """Return who did what, why, and how it ended, the newest first."""
    return [(each.operator, each.name, each.reason, each.outcome) for each in await store.actions()]


@EACH_STORE
async def test_a_record_is_resolved_on_each_store(store: Any) -> None:
    """With a reason, which the audit has with the operator and the outcome."""
    path = await unknown(store, "order-7")
    visitor = Visitor(console(store, allow=lambda _: "ada"))
    assert await visitor.offers(path) == ["resolve done:", "resolve not done:", "forget:"]

    answer = await visitor.act(path, "resolve done:")

    assert answer.status_code == 303
    shown = await visitor.client.get(answer.headers["location"])
    assert "resolve done: done." in shown.text
    assert "the provider says so" in shown.text
    assert await store.unresolved() == []
    assert await audit_of(store) == [("ada", "resolve done", "the provider says so", "done")]
    assert await visitor.offers(path) == ["forget:"]


@pytest.mark.parametrize(
    ("action", "outcome", "found"), [("resolve not done:", "released", None), ("forget:", "forgotten", None)]
)
async def test_a_record_is_released_or_forgotten(
    visitor: Visitor, memory: MemoryStore, action: str, outcome: str, found: None
) -> None:
    """Its next request runs."""
    path = await unknown(memory, "order-7")

    await visitor.act(path, action)

    assert await memory.inspect(claim_of("order-7").id) is found
    assert await audit_of(memory) == [("ada", action.removesuffix(":"), "the provider says so", outcome)]
    assert (await visitor.get(path)).status_code == 404


async def test_a_record_of_a_message_is_forgotten_with_its_counts(visitor: Visitor, memory: MemoryStore) -> None:
    """As the command does."""
    path = await unknown(memory, "m-7", "message")
    count = claim_of("m-7", "failed:1:consumer:1:billing", lease=0.0, hold=False)
    await memory.claim(count)

    await visitor.act(path, "forget:")

    assert await memory.inspect(count.id) is None


async def test_what_is_run_offers_nothing(visitor: Visitor, memory: MemoryStore) -> None:
    """Its owner is there."""
    claim = claim_of("order-7")
    await memory.claim(claim)
    path = f"record/{claim.id.hex()}"

    assert await visitor.offers(path) == []
    assert "its owner, whose lease goes on for" in (await visitor.get(path)).text


@pytest.mark.parametrize("reason", ["", "  ", "x" * 1001])
async def test_each_action_needs_a_reason(visitor: Visitor, memory: MemoryStore, reason: str) -> None:
    """Else nothing is done, and nothing written down."""
    path = await unknown(memory, "order-7")

    answer = await visitor.act(path, "forget:", reason)

    assert (answer.status_code, "Nothing was changed" in answer.text) == (422, True)
    assert len(await memory.unresolved()) == 1
    assert await memory.actions() == []


@pytest.mark.parametrize("action", ["retry now:", "forget", "", "resolve done:step"])
async def test_what_a_thing_does_not_offer_is_not_done(visitor: Visitor, memory: MemoryStore, action: str) -> None:
    """Whatever a form says."""
    path = await unknown(memory, "order-7")

    answer = await visitor.act(path, action)

    assert answer.status_code == 409
    assert len(await memory.unresolved()) == 1
    assert await memory.actions() == []


class Watched(MemoryStore):
    """A store that notes in which order it is asked, and fails as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.did: list[str] = []
        self.failing: set[str] = set()

    async def _note(self, what: str) -> None:
        self.did.append(what)
        if what in self.failing:
            raise StoreError("the store is away")

    async def write_down(self, action: Any, /) -> None:
        await self._note("write down")
        await super().write_down(action)

    async def write_outcome(self, id: str, outcome: str, /) -> None:
        await self._note("write outcome")
        await super().write_outcome(id, outcome)

    async def forget(self, record: bytes, /) -> bool:
        await self._note("forget")
        return await super().forget(record)


async def test_an_action_is_written_down_before_it_and_its_outcome_after_it() -> None:
    """Whatever happens in between, the audit says what was begun."""
    store = Watched()
    path = await unknown(store, "order-7")

    await Visitor(console(store, allow=lambda _: "ada")).act(path, "forget:")

    assert store.did == ["write down", "forget", "write outcome"]


async def test_what_cannot_be_written_down_is_not_done() -> None:
    """The store fails before the action."""
    store = Watched()
    path = await unknown(store, "order-7")
    store.failing = {"write down"}

    answer = await Visitor(console(store, allow=lambda _: "ada")).act(path, "forget:")

    assert (answer.status_code, "the store is away" in answer.text) == (503, True)
    assert store.did == ["write down"]
    assert len(await store.unresolved()) == 1


async def test_an_action_that_fails_is_in_the_audit() -> None:
    """With the error, as the store says it."""
    store = Watched()
    path = await unknown(store, "order-7")
    store.failing = {"forget"}

    answer = await Visitor(console(store, allow=lambda _: "ada")).act(path, "forget:")

    assert answer.status_code == 303
    assert await audit_of(store) == [("ada", "forget", "the provider says so", "refused: the store is away")]


async def test_an_outcome_that_cannot_be_written_down_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The action has happened, and the audit says that its end is not known."""
    store = Watched()
    path = await unknown(store, "order-7")
    store.failing = {"write outcome"}

    answer = await Visitor(console(store, allow=lambda _: "ada")).act(path, "forget:")

    assert answer.status_code == 303
    assert await audit_of(store) == [("ada", "forget", "the provider says so", None)]
    assert "is not in the audit: the store is away" in caplog.text


async def test_a_thing_that_changes_meanwhile_is_not_changed_again(memory: MemoryStore) -> None:
    """Another operator was faster, after the page had looked."""

    class Slower(MemoryStore):
        async def write_down(self, action: Any, /) -> None:
            await super().write_down(action)
            await super().resolve(claim_of("order-7").id, "done")

    store = Slower()
    path = await unknown(store, "order-7")

    await Visitor(console(store, allow=lambda _: "ada")).act(path, "resolve not done:")

    [(_, _, _, outcome)] = await audit_of(store)
    assert outcome is not None
    assert outcome.startswith("refused: it is not any more as it was shown")
    assert await store.inspect(claim_of("order-7").id) is not None


@EACH_STORE
async def test_a_stuck_saga_is_resolved_on_each_store(store: Any) -> None:
    """The step is done, and the saga goes on at the next run."""
    if isinstance(store, SQLStore):
        await store.create_saga_schema()
    path = await stuck_saga(store)
    visitor = Visitor(console(store, allow=lambda _: "ada"))

    assert await visitor.offers(path) == [
        "retry now:",
        "resolve done:hotel",
        "resolve not done:hotel",
        "compensate:",
        "cancel:",
    ]
    await visitor.act(path, "resolve done:hotel", result='"hotel by hand"')

    assert await trips.trips(store)("Rome", key="trip-7") == "flight to Rome, hotel by hand"
    [(_, name, _, outcome)] = await audit_of(store)
    assert (name, outcome) == ("resolve done", "hotel is done, and the saga goes on now")
    shown = (await visitor.get(path)).text
    assert "resolved by ada" in shown
    assert await visitor.offers(path) == []


async def test_a_result_that_is_no_json_changes_nothing(visitor: Visitor, memory: MemoryStore) -> None:
    """The audit says so."""
    path = await stuck_saga(memory)

    await visitor.act(path, "resolve done:hotel", result="hotel by hand")

    [(_, _, _, outcome)] = await audit_of(memory)
    assert outcome is not None
    assert outcome.startswith("refused: result is JSON")
    assert "resolve done:hotel" in await visitor.offers(path)


async def test_a_saga_is_compensated_and_an_undo_resolved(visitor: Visitor, memory: MemoryStore) -> None:
    """Once it is undone, no other way is offered."""
    path = await stuck_saga(memory)

    await visitor.act(path, "compensate:")

    assert await visitor.offers(path) == [
        "retry now:",
        "resolve done:hotel",
        "resolve not done:hotel",
        "resolve done:undo:hotel",
        "resolve done:undo:flight",
    ]
    await visitor.act(path, "resolve done:undo:flight")
    assert [(name, outcome) for _, name, _, outcome in await audit_of(memory)] == [
        ("resolve done", "undo:flight is done, and the saga goes on now"),
        ("compensate", "it has failed, and is undone from now on"),
    ]


async def test_a_saga_is_cancelled_or_retried(visitor: Visitor, memory: MemoryStore) -> None:
    """One that sleeps goes on at once; one that is cancelled is undone by its next run."""
    path = await saga(memory, "sleep")

    await visitor.act(path, "retry now:")
    await visitor.act(path, "cancel:")

    assert [(name, outcome) for _, name, _, outcome in await audit_of(memory)] == [
        ("cancel", "it is cancelled at its next step"),
        ("retry now", "it goes on now"),
    ]
    await saga(memory, "sleep")
    [view] = await SagaOperations(memory).find("book-trip/trip-7")
    assert view.state in ("undoing", "undone")


async def test_a_saga_is_given_the_signal_for_which_it_waits(visitor: Visitor, memory: MemoryStore) -> None:
    """About what it asks; about anything else it is refused."""
    path = await saga(memory, "approve")
    assert "signal:approve" in await visitor.offers(path)

    await visitor.act(path, "signal:approve", value="true", about='{"price": 49}')
    await visitor.act(path, "signal:approve", value="true", about='{"price": 50}')

    last, first = await audit_of(memory)
    assert last[3] == "it has the signal"
    assert first[3] is not None
    assert "about something else" in first[3]
    assert "signal:approve" not in await visitor.offers(path)


async def test_a_saga_that_is_run_can_only_be_cancelled(visitor: Visitor, memory: MemoryStore) -> None:
    """The rest would be refused by its fence."""
    trips.HANGING["flight"] = asyncio.Event()
    task = asyncio.create_task(trips.trips(memory)("Rome", key="trip-7"))
    await trips.until(lambda: trips.DID["flight"])

    [view] = await SagaOperations(memory).sagas()
    offers = await visitor.offers(f"saga/{view.id}")
    trips.HANGING.clear()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert offers == ["cancel:"]


async def test_a_key_is_shown_on_demand_and_that_is_written_down(memory: MemoryStore) -> None:
    """Only where the option allows it, and on one page."""
    path = await unknown(memory, "order-for-ada")
    hidden, shown = (Visitor(console(memory, allow=lambda _: "eve", show_keys=each)) for each in (False, True))
    assert "show key:" not in await hidden.offers(path)

    refused = await hidden.act(path, "show key:")
    answer = await shown.act(path, "show key:", "she asks for it")

    assert refused.status_code == 409
    assert (answer.status_code, "order-for-ada" in answer.text) == (200, True)
    assert "order-for-ada" not in (await shown.get(path)).text
    assert await audit_of(memory) == [("eve", "show key", "she asks for it", "shown")]

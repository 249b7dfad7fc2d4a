"""What an operator decides on a page that was read before the thing changed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import ManualClock
from idempotency.web import console
from tests.web.kit import claim_of, stuck_saga, unknown
from tests.web.visitor import Visitor

EACH_STORE = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


@EACH_STORE
async def test_what_another_operator_has_resolved_is_not_forgotten(store: Any) -> None:
    """Else a request whose effect happened would run again."""
    path = await unknown(store, "order-7")
    ada, bob = (Visitor(console(store, allow=lambda _, name=name: name)) for name in ("ada", "bob"))
    form = await bob.form(path, "forget:")

    await ada.act(path, "resolve done:")
    answer = await bob.post(path, form | {"reason": "it did not happen"})

    assert (answer.status_code, "has changed since the page was read" in answer.text) == (409, True)
    assert await store.inspect(claim_of("order-7").id) is not None
    assert [action.operator for action in await store.actions()] == ["ada"]


async def test_a_run_that_began_after_the_page_was_read_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks as the run before it did: unknown, at its first attempt."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    visitor = Visitor(console(store, allow=lambda _: "ada"))
    path = await unknown(store, "order-7")
    clock.advance(600)
    first = await visitor.form(path, "resolve done:")
    await visitor.act(path, "resolve not done:")
    monkeypatch.setattr("idempotency.web._words.Clock.seconds", property(lambda clock: time.time() + 60))
    await unknown(store, "order-7")
    clock.advance(30)

    stale = await visitor.post(path, first | {"reason": "the provider has it"})
    fresh = await visitor.act(path, "resolve done:")

    assert (stale.status_code, fresh.status_code) == (409, 303)


@EACH_STORE
async def test_a_page_that_was_read_long_ago_still_counts(store: Any) -> None:
    """As long as nothing has changed."""
    path = await unknown(store, "order-7")
    visitor = Visitor(console(store, allow=lambda _: "ada"))

    assert (await visitor.act(path, "resolve done:")).status_code == 303


@pytest.mark.parametrize("read", ["", "x", "-1", "1e9", "9" * 30])
async def test_a_form_says_when_its_page_was_read(visitor: Visitor, memory: MemoryStore, read: str) -> None:
    """As a number of seconds."""
    path = await unknown(memory, "order-7")

    assert (await visitor.act(path, "resolve done:", read=read)).status_code == 409


@EACH_STORE
async def test_a_step_that_was_run_again_is_not_resolved(store: Any) -> None:
    """Its outcome is unknown once more, and that is another question."""
    if isinstance(store, SQLStore):
        await store.create_saga_schema()
    path = await stuck_saga(store)
    visitor = Visitor(console(store, allow=lambda _: "ada"))
    stale = await visitor.form(path, "resolve done:hotel")
    failing = await visitor.form(path, "compensate:")
    await visitor.act(path, "resolve not done:hotel")
    await stuck_saga(store)

    answers = [await visitor.post(path, form | {"reason": "so"}) for form in (stale, failing)]

    assert [answer.status_code for answer in answers] == [409, 409]
    assert "resolve done:hotel" in await visitor.offers(path)
    assert (await visitor.act(path, "resolve done:hotel", result='"by hand"')).status_code == 303

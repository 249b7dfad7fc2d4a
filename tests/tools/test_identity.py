"""Which calls of a tool are one: by the key of the caller, the intent, or the attempt; and what they must share."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel

from idempotency import current
from idempotency.errors import ConfigurationError, KeyInvalidError, KeyMissingError, KeyReusedError
from idempotency.stores.memory import MemoryStore
from idempotency.tool import idempotent_tool, tool_call
from idempotency.tool._data import NoDataError, canonical_text


class Currency(enum.Enum):
    EURO = "EUR"


@dataclass(frozen=True, slots=True)
class Money:
    amount: Decimal
    currency: Currency


class Order(BaseModel):
    id: int
    tags: list[str] = []


@pytest.fixture
def effects() -> list[str]:
    return []


def refund_tool(effects: list[str], **options: Any) -> Any:
    """Make a tool that has one effect."""

    @idempotent_tool(MemoryStore(), **{"name": "refund", **options})
    async def refund(order_id: str, amount: float, note: str = "") -> str:
        effects.append(f"{order_id} {amount:g}")
        return f"refunded {amount:g}"

    return refund


async def test_calls_of_one_intent_are_one(effects: list[str]) -> None:
    """A model that plans anew has no key and a new id of the call; what it means is the same."""
    refund = refund_tool(effects, intent=("order_id", "amount"))

    with tool_call(attempt="run-1/call-1"):
        first = await refund("7", 5.0)
    with tool_call(attempt="run-2/call-9"):
        again = await refund(amount=5, order_id="7")

    assert first == again == "refunded 5"
    assert effects == ["7 5"]


async def test_another_intent_is_another_call(effects: list[str]) -> None:
    refund = refund_tool(effects, intent=("order_id", "amount"))

    await refund("7", 5)
    await refund("8", 5)
    await refund("7", 6)

    assert effects == ["7 5", "8 5", "7 6"]


async def test_an_intent_can_be_a_function(effects: list[str]) -> None:
    """It is given the arguments as they are passed."""
    refund = refund_tool(effects, intent=lambda order_id, amount, note="": f"refund of {order_id}")

    await refund("7", 5)
    await refund(order_id="7", amount=5)
    with pytest.raises(KeyReusedError):
        await refund("7", 6)

    assert effects == ["7 5"]


async def test_the_same_identity_with_other_arguments_is_refused(effects: list[str]) -> None:
    """All arguments are compared, also those that the intent does not name."""
    refund = refund_tool(effects, intent=("order_id",))

    await refund("7", 5, note="late")
    with pytest.raises(KeyReusedError):
        await refund("7", 5, note="damaged")
    with pytest.raises(KeyReusedError):
        await refund("7", 50, note="late")

    assert effects == ["7 5"]


async def test_an_ignored_argument_is_not_compared(effects: list[str]) -> None:
    """The context of a framework is another object in each call, and no data."""

    @idempotent_tool(MemoryStore(), intent=("order_id",), ignore=("ctx",))
    async def refund(order_id: str, ctx: object) -> str:
        effects.append(order_id)
        return "done"

    await refund("7", object())
    await refund("7", object())

    assert effects == ["7"]


async def test_an_argument_that_is_no_data_is_refused(effects: list[str]) -> None:
    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str, ctx: object) -> str:
        effects.append(order_id)
        return "done"

    with pytest.raises(ConfigurationError, match="called with a value of type object, by which .*ignore="):
        await refund("7", object())

    assert effects == []


async def test_the_key_of_the_caller_comes_before_the_intent(effects: list[str]) -> None:
    """Another key is the caller's statement that another operation is meant."""
    refund = refund_tool(effects, intent=("order_id", "amount"))

    for key in ("k-1", "k-1", "k-2"):
        with tool_call(caller_key=key, attempt="run/1"):
            await refund("7", 5)

    assert effects == ["7 5", "7 5"]


async def test_the_intent_comes_before_the_attempt(effects: list[str]) -> None:
    refund = refund_tool(effects, intent=("order_id", "amount"))

    with tool_call(attempt="run/1"):
        await refund("7", 5)
    await refund("7", 5)

    assert effects == ["7 5"]


async def test_without_an_intent_the_attempt_identifies_a_call(effects: list[str]) -> None:
    refund = refund_tool(effects)

    for attempt in ("run/1", "run/1", "run/2"):
        with tool_call(attempt=attempt):
            await refund("7", 5)

    assert effects == ["7 5", "7 5"]


async def test_a_call_that_nothing_identifies_is_refused(effects: list[str]) -> None:
    """A digest of all arguments is never taken for an identity."""
    refund = refund_tool(effects)

    with pytest.raises(KeyMissingError, match="intent="):
        await refund("7", 5)
    with tool_call(), pytest.raises(KeyMissingError):
        await refund("7", 5)

    assert effects == []


async def test_an_intent_without_a_value_is_no_intent(effects: list[str]) -> None:
    """Else all calls that leave it out would be one."""

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str | None, amount: int) -> str:
        effects.append(f"{order_id} {amount}")
        return "done"

    with pytest.raises(KeyMissingError):
        await refund(None, 5)

    assert effects == []


async def test_an_intent_function_that_says_nothing_is_no_intent(effects: list[str]) -> None:
    refund = refund_tool(effects, intent=lambda order_id, amount, note="": order_id or None)

    with pytest.raises(KeyMissingError):
        await refund("", 5)
    with tool_call(attempt="run/1"):
        await refund("", 5)

    assert effects == [" 5"]


async def test_identities_of_different_kinds_do_not_meet(effects: list[str]) -> None:
    """A key, an intent and an attempt of one text are three identities."""
    refund = refund_tool(effects, intent=lambda order_id, amount, note="": "x" if note else None)

    with tool_call(caller_key="x"):
        await refund("7", 1)
    with tool_call(attempt="x"):
        await refund("7", 1)
    await refund("7", 1, note="by intent")

    assert effects == ["7 1"] * 3


async def test_a_repeat_that_is_meant_has_an_occurrence(effects: list[str]) -> None:
    """Without one, and with each one, the tool runs once."""
    refund = refund_tool(effects, intent=("order_id", "amount"))

    for occurrence in (None, None, 2, "2", 3):
        with tool_call(occurrence=occurrence):
            await refund("7", 5)

    assert effects == ["7 5"] * 3


async def test_an_occurrence_can_be_an_argument_of_the_tool(effects: list[str]) -> None:
    @idempotent_tool(MemoryStore(), intent=("order_id", "occurrence"))
    async def remind(order_id: str, occurrence: int = 1) -> str:
        effects.append(f"{order_id} {occurrence}")
        return "sent"

    await remind("7")
    await remind("7", occurrence=1)
    await remind("7", occurrence=2)

    assert effects == ["7 1", "7 2"]


async def test_callers_do_not_see_each_others_calls(effects: list[str]) -> None:
    """Neither by a key that both chose, nor by one intent."""
    refund = refund_tool(effects, intent=("order_id", "amount"))

    for caller in ("ann", "bob", "ann"):
        with tool_call(caller=caller, caller_key="1"):
            await refund("7", 5)
        with tool_call(caller=caller):
            await refund("8", 5)

    assert effects == ["7 5", "8 5"] * 2


async def test_two_tools_do_not_share_a_key(effects: list[str]) -> None:
    store = MemoryStore()

    def tool(name: str) -> Any:
        @idempotent_tool(store, name=name)
        async def act() -> str:
            effects.append(name)
            return name

        return act

    with tool_call(caller_key="k"):
        assert await tool("refund")() == "refund"
    with tool_call(caller_key="k"):
        assert await tool("cancel")() == "cancel"

    assert effects == ["refund", "cancel"]


async def test_two_tools_of_one_name_are_refused() -> None:
    store = MemoryStore()

    def tool(text: str) -> Any:
        @idempotent_tool(store)
        async def act() -> str:
            return text

        return act

    first = tool("refund")
    with pytest.raises(ConfigurationError, match="name="):
        tool("cancel")
    assert first


async def test_the_name_of_a_call_is_for_one_tool(effects: list[str]) -> None:
    """What the tool calls, and another tool beside it, do not inherit the key; a repeat by the framework does."""
    store = MemoryStore()

    @idempotent_tool(store, name="inner")
    async def inner() -> str:
        effects.append("inner")
        return "inner"

    @idempotent_tool(store, name="outer")
    async def outer(nested: bool) -> str:
        effects.append("outer")
        return await inner() if nested else "outer"

    with tool_call(caller_key="k"), pytest.raises(KeyMissingError):
        await outer(nested=True)
    with tool_call(caller_key="k"):
        await outer(nested=False)
        await asyncio.create_task(outer(nested=False))
        with pytest.raises(KeyMissingError):
            await inner()

    assert effects == ["outer", "outer"]


async def test_a_nested_tool_can_be_named_on_its_own(effects: list[str]) -> None:
    store = MemoryStore()

    @idempotent_tool(store, name="inner")
    async def inner() -> str:
        effects.append("inner")
        return "inner"

    @idempotent_tool(store, name="outer")
    async def outer() -> str:
        operation = current()
        assert operation is not None
        with tool_call(caller_key=operation.derive("inner")):
            return await inner()

    for key in ("k-1", "k-1", "k-2"):
        with tool_call(caller_key=key):
            await outer()

    assert effects == ["inner", "inner"]


def test_a_thread_of_the_framework_has_the_name_of_the_call() -> None:
    """Frameworks run synchronous tools in threads, with a copy of the context."""
    effects: list[str] = []

    @idempotent_tool(MemoryStore())
    def act() -> str:
        effects.append("act")
        return "done"

    for _ in range(2):
        with tool_call(caller_key="k") as call:
            contextvars.copy_context().run(act)

    assert effects == ["act"]
    assert call.replayed_at is not None


@pytest.mark.parametrize("named", [{"caller_key": ""}, {"caller_key": 7}, {"caller_key": "k" * 256}, {"attempt": ""}])
def test_a_key_that_is_none_is_refused(named: Any) -> None:
    """It would be taken for no key, and the call run under another identity."""
    with pytest.raises(KeyInvalidError), tool_call(**named):
        pass


@pytest.mark.parametrize("caller", [0, 7, b"7", ("a", 7)])
def test_a_caller_that_is_no_text_is_refused(caller: Any) -> None:
    """The user 0 would be taken for no caller, and get the results of all who have none."""
    match = f"caller must be text, not {type(caller).__name__}"
    with pytest.raises(ConfigurationError, match=match), tool_call(caller=caller):
        pass


def test_a_function_for_the_caller_that_is_not_awaited_is_refused() -> None:
    async def caller() -> str: ...

    unused: Any = caller()
    with pytest.raises(ConfigurationError, match="caller must be text, not coroutine"), tool_call(caller=unused):
        pass


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"intent": ("order",)}, "intent names 'order', and the function has no such argument"),
        ({"intent": ()}, "intent must name an argument"),
        ({"intent": "order_id"}, r"such as \('order_id',\)"),
        ({"ignore": ("ctx",)}, "ignore names 'ctx'"),
        ({"name": ""}, "name must be text"),
        ({"verify": lambda order_id, amount, note: None}, "verify= of an asynchronous tool must be a coroutine"),
        ({"approval": "yes"}, "approval= must be a function"),
    ],
)
def test_what_cannot_work_is_refused_at_the_decoration(options: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        refund_tool([], **{"intent": ("order_id",), **options})


async def test_an_intent_that_returns_no_text_is_refused(effects: list[str]) -> None:
    refund = refund_tool(effects, intent=lambda order_id, amount, note="": 7)

    with pytest.raises(ConfigurationError, match="intent= must return text, not int"):
        await refund("7", 5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": None}, '{"a":null,"b":1}'),
        (5.0, "5"),
        (0.1, "0.1"),
        (True, "true"),
        (Decimal("5.00"), "5"),
        (Decimal("5.10"), '"5.1"'),
        (Decimal("-0.50"), '"-0.5"'),
        (Decimal("0E+999999999"), "0"),
        (Decimal("1E+3"), "1000"),
        (Decimal("1.00000000000000000000000000000010"), '"1.0000000000000000000000000000001"'),
        ((1, [2]), "[1,[2]]"),
        ({"b", "a"}, '["a","b"]'),
        (Currency.EURO, '"EUR"'),
        (Money(Decimal(3), Currency.EURO), '{"amount":3,"currency":"EUR"}'),
        (Order(id=7), '{"id":7,"tags":[]}'),
        (date(2026, 1, 2), '"2026-01-02"'),
        (datetime(2026, 1, 2, 4, tzinfo=timezone(timedelta(hours=1))), '"2026-01-02T03:00:00+00:00"'),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), '"2026-01-02T03:00:00+00:00"'),
        (timedelta(days=1, seconds=2), "[1,2,0]"),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (b"\x00", '"AA=="'),
        ("ä", '"ä"'),
    ],
)
def test_equal_arguments_have_one_text(value: object, text: str) -> None:
    """It is part of stored keys: a change of it makes them new."""
    assert canonical_text(value) == text


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        object(),
        float("nan"),
        {1: 2},
        Decimal("NaN"),
        float("inf"),
        [object()],
        Order,
        # What a model may have made up. To write them out would take gigabytes.
        Decimal("1E+999999999"),
        Decimal("1E-999999999"),
        pytest.param(10**5000, id="5000 digits"),
        pytest.param(_nested(100_000), id="nested"),
        datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=5))),
    ],
)
def test_what_is_no_data_has_no_text(value: object) -> None:
    with pytest.raises(NoDataError):
        canonical_text(value)

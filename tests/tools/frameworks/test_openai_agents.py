"""The adapter in the OpenAI Agents SDK."""

from __future__ import annotations

import asyncio
import logging
from importlib.util import find_spec
from typing import Any

import pytest

from tests.kit.servers import missing

if find_spec("agents") is None:
    missing("openai-agents is not installed")

from agents import Agent, RunConfig, RunContextWrapper, Runner, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call

from idempotency.adapters.openai_agents import idempotent_function_tool
from idempotency.errors import ConfigurationError
from idempotency.tool import idempotent_tool
from tests.tools.frameworks.contract import DO_NOT_REPEAT, INTENT, MAY_BE_DONE, REPLAYED, ToolLoopContract
from tests.tools.frameworks.openai_agents_rig import OpenAIAgentsRig, answers_of
from tests.tools.frameworks.rig import Answer


class TestOpenAIAgents(ToolLoopContract):
    """The contract."""

    rig = OpenAIAgentsRig


async def run_twice(tool: Any, context: Any = None, group: str | None = "conversation") -> list[Answer]:
    """Let the model make the same call with the same id in two runs."""
    answers = []
    for _ in range(2):
        call = function_call("refund", {"order_id": "order-7", "amount": 5}, call_id="call-1")
        agent = Agent(name="clerk", model=ScriptedModel([[call], [assistant_message("done")]]), tools=[tool])
        config = RunConfig(group_id=group, tracing_disabled=True)
        answers += answers_of(await Runner.run(agent, "Refund it.", context=context, run_config=config))
    return answers


def test_the_model_sees_the_function_as_it_is(store) -> None:
    """Its description, its arguments, their types, descriptions and defaults."""

    async def refund(order_id: str, amount: int = 1, *, why: str = "") -> str:
        """Refund an order.

        Args:
            order_id: the number of the order
        """
        raise NotImplementedError

    plain, tool = function_tool(refund), idempotent_function_tool()(idempotent_tool(store, intent=INTENT)(refund))

    assert tool.params_json_schema == plain.params_json_schema
    assert (tool.name, tool.description) == ("refund", "Refund an order.")


def test_a_function_that_is_not_decorated_is_refused(refunds) -> None:
    """Its calls would not be protected."""
    with pytest.raises(ConfigurationError, match="idempotent_tool"):
        idempotent_function_tool()(refunds.make)


@pytest.mark.parametrize("options", [{"caller": lambda _: 7}, {"run": lambda _: 7}])
async def test_a_caller_or_run_that_is_no_text_is_logged_and_not_tried_again(store, refunds, options, caplog) -> None:
    """The SDK would ask the model to try again."""
    tool = idempotent_function_tool(**options)(refunds.tool(store, intent=INTENT))

    first, second = await run_twice(tool)

    assert "Do not call again; report it to a person" in first.text
    assert first.text == second.text
    assert "must be text, not int" in caplog.text
    assert refunds.made == []


async def test_a_tool_may_take_the_context(store, refunds) -> None:
    """It is no argument of the model, so ignore= names it."""

    @idempotent_function_tool()
    @idempotent_tool(store, intent=INTENT, ignore=("wrapper",))
    async def refund(wrapper: RunContextWrapper[str], order_id: str, amount: int) -> str:
        return f"{refunds.make(order_id, amount)} for {wrapper.context}"

    first, second = await run_twice(refund, context="ann")

    assert first.text == "refund 1 of 5 for ann"
    assert second.text.startswith("refund 1 of 5 for ann\n\n" + REPLAYED)


async def test_a_tool_that_is_not_awaited(store, refunds) -> None:
    """The SDK runs it in a thread."""

    @idempotent_function_tool()
    @idempotent_tool(store)
    def refund(order_id: str, amount: int) -> str:
        return refunds.make(order_id, amount)

    first, second = await run_twice(refund)

    assert first.text == "refund 1 of 5"
    assert second.text.startswith("refund 1 of 5\n\n" + REPLAYED)


async def test_an_application_may_name_its_runs(store, refunds) -> None:
    """By its own context, which a RunState saves."""
    refund = idempotent_function_tool(run=lambda context: context.context["ticket"])(refunds.tool(store))

    await run_twice(refund, context={"ticket": "1"}, group=None)
    await run_twice(refund, context={"ticket": "2"}, group=None)

    assert refunds.made == ["order-7 5", "order-7 5"]


async def test_without_an_id_of_the_run_a_tool_needs_an_intent(store, refunds) -> None:
    """The id of the call may come again in another run."""
    first, _ = await run_twice(idempotent_function_tool()(refunds.tool(store)), group=None)

    assert first.text.startswith("Nothing was done: the call has no idempotency key")
    assert refunds.made == []


async def test_a_tool_that_is_cancelled_from_inside_may_have_been_done(store, refunds) -> None:
    """Nobody cancelled the call, and the SDK would let the model try again."""

    async def cancelled() -> None:
        raise asyncio.CancelledError

    first, second = await run_twice(idempotent_function_tool()(refunds.tool(store, cancelled)))

    assert MAY_BE_DONE in first.text
    assert DO_NOT_REPEAT in second.text
    assert refunds.made == ["order-7 5"]


async def test_a_result_that_is_no_text_is_replayed_as_it_is(store, refunds) -> None:
    """The SDK may check it against a schema."""

    @idempotent_function_tool()
    @idempotent_tool(store)
    async def refund(order_id: str, amount: int) -> dict[str, str]:
        return {"made": refunds.make(order_id, amount)}

    first, second = await run_twice(refund)

    assert first.text == second.text == "{'made': 'refund 1 of 5'}"


async def test_an_error_of_the_code_is_logged_and_the_model_does_not_repeat_the_call(store, refunds, caplog) -> None:
    """The annotation names no type that could be recorded, which shows after the effect."""

    @idempotent_function_tool()
    @idempotent_tool(store)
    async def refund(order_id: str, amount: int) -> Any:
        refunds.make(order_id, amount)
        return object()

    with caplog.at_level(logging.ERROR, "idempotency"):
        first, _ = await run_twice(refund)

    assert "Do not call again" in first.text
    assert "does not name" in caplog.text
    assert refunds.made == ["order-7 5"]


async def test_an_error_of_the_tool_is_the_sdks(store, refunds) -> None:
    """It failed before its effect, and runs again."""
    failures = [ValueError("no such order")]

    @idempotent_function_tool()
    @idempotent_tool(store)
    async def refund(order_id: str, amount: int) -> str:
        if failures:
            raise failures.pop()
        return refunds.make(order_id, amount)

    first, second = await run_twice(refund)

    assert "try again" in first.text
    assert second.text == "refund 1 of 5"


async def test_the_words_after_a_time_out_may_be_ones_own(store, refunds) -> None:
    """An option of the SDK has priority."""
    refund = idempotent_function_tool(timeout=0.05, timeout_error_function=lambda context, error: "Ask Ann.")

    first, _ = await run_twice(refund(refunds.tool(store, asyncio.Event().wait)))

    assert first.text == "Ask Ann."


async def test_an_approval_may_depend_on_the_arguments(store, refunds) -> None:
    """The SDK reads them of a function tool before it is called."""

    async def is_large(context: Any, arguments: dict[str, Any], call: str) -> bool:
        return arguments["amount"] > 5

    tool = idempotent_function_tool(needs_approval=is_large)(refunds.tool(store))
    calls = [
        function_call("refund", {"order_id": "order-7", "amount": amount}, call_id=f"call-{amount}")
        for amount in (5, 6)
    ]
    agent = Agent(name="clerk", model=ScriptedModel([calls]), tools=[tool])
    result = await Runner.run(agent, "Refund it.", run_config=RunConfig(group_id="one", tracing_disabled=True))

    assert [item.raw_item.call_id for item in result.interruptions] == ["call-6"]
    assert refunds.made == ["order-7 5"]


async def test_a_run_that_is_streamed(store, refunds) -> None:
    """Its tools are called the same way."""
    tool, answers = idempotent_function_tool()(refunds.tool(store)), []
    for _ in range(2):
        call = function_call("refund", {"order_id": "order-7", "amount": 5}, call_id="call-1")
        agent = Agent(name="clerk", model=ScriptedModel([[call], [assistant_message("done")]]), tools=[tool])
        result = Runner.run_streamed(agent, "Refund it.", run_config=RunConfig(group_id="one", tracing_disabled=True))
        _ = [event async for event in result.stream_events()]
        answers += answers_of(result)

    assert REPLAYED in answers[1].text
    assert refunds.made == ["order-7 5"]

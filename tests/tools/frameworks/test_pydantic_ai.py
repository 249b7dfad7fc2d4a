"""The adapter in Pydantic AI."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest

from tests.kit.servers import missing

if find_spec("pydantic_ai") is None:
    missing("pydantic-ai-slim is not installed")

from pydantic_ai import (
    Agent,
    ApprovalRequired,
    DeferredToolRequests,
    DeferredToolResults,
    ModelRetry,
    RunContext,
    Tool,
    ToolApproved,
)
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.toolsets import CombinedToolset, FunctionToolset

from idempotency import Policy
from idempotency.adapters.pydantic_ai import IdempotentTools
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.tool import idempotent_tool
from tests.tools.frameworks.contract import INTENT, MAY_BE_DONE, REPLAYED, ToolLoopContract
from tests.tools.frameworks.pydantic_ai_rig import PydanticAIRig, answers_of
from tests.tools.frameworks.rig import Answer, refund_call


class TestPydanticAI(ToolLoopContract):
    """The contract."""

    rig = PydanticAIRig


def agent_of(*tools: Any, calls: int = 1, name: str = "refund", **options: Any) -> Agent[Any, Any]:
    """Make an agent that calls its tool so many times, and ends."""

    async def model(messages: list[ModelMessage], info: Any) -> ModelResponse:
        made = sum(bool(message.tool_calls) for message in messages if isinstance(message, ModelResponse))
        if made == calls:
            return ModelResponse(parts=[TextPart("done")])
        call = ToolCallPart(name, {"order_id": "order-7", "amount": 5}, tool_call_id=f"call-{made + 1}")
        return ModelResponse(parts=[call])

    return Agent(FunctionModel(model), tools=tools, capabilities=[IdempotentTools()], **options)


async def run(agent: Agent[Any, Any], **options: Any) -> list[Answer]:
    """Run an agent, and read what its model was answered."""
    return answers_of((await agent.run("Refund it.", **options)).all_messages())


async def test_an_approval_that_is_resumed_twice_refunds_once(store, refunds) -> None:
    """A person approved one call."""
    tool = Tool(refunds.tool(store), requires_approval=True)
    agent = agent_of(tool, output_type=[str, DeferredToolRequests])
    asked = await agent.run("Refund it.")
    approved = DeferredToolResults(approvals={"call-1": True})

    for _ in range(2):
        result = await agent.run(message_history=asked.all_messages(), deferred_tool_results=approved)

    (again,) = answers_of(result.all_messages())
    assert REPLAYED in again.text
    assert refunds.made == ["order-7 5"]


async def test_a_tool_that_asks_for_an_approval_itself_runs_when_it_has_it(store, refunds) -> None:
    """It asks before its effect, so nothing is recorded until then, also where a failure leaves the outcome unknown."""

    @idempotent_tool(store, ignore=("ctx",), policy=Policy(on_crash="hold", outcomes={Exception: "hold"}))
    async def refund(ctx: RunContext[None], order_id: str, amount: int) -> str:
        if not ctx.tool_call_approved:
            raise ApprovalRequired
        return refunds.make(order_id, amount)

    agent = agent_of(refund, output_type=[str, DeferredToolRequests])
    asked = await agent.run("Refund it.")
    approved = DeferredToolResults(approvals={"call-1": True})

    result = await agent.run(message_history=asked.all_messages(), deferred_tool_results=approved)

    assert [answer.text for answer in answers_of(result.all_messages())] == ["refund 1 of 5"]


async def test_an_approval_with_other_arguments_is_refused(store, refunds) -> None:
    """The first decision was carried out, and the second one changes the amount."""
    tool = Tool(refunds.tool(store), requires_approval=True)
    agent = agent_of(tool, output_type=[str, DeferredToolRequests])
    asked = await agent.run("Refund it.")

    for amount in (3, 4):
        decided = DeferredToolResults()
        decided.approvals["call-1"] = ToolApproved(override_args={"order_id": "order-7", "amount": amount})
        result = await agent.run(message_history=asked.all_messages(), deferred_tool_results=decided)

    (last,) = answers_of(result.all_messages())
    assert "with other arguments had the same id" in last.text
    assert refunds.made == ["order-7 3"]


async def test_a_tool_that_asks_the_model_again_has_had_no_effect(store, refunds) -> None:
    """It is the same intent, and runs again."""
    complaints = [ModelRetry("Which order?")]

    @idempotent_tool(store, intent=INTENT)
    async def refund(order_id: str, amount: int) -> str:
        if complaints:
            raise complaints.pop()
        return refunds.make(order_id, amount)

    first, second = await run(agent_of(refund, calls=2))

    assert "Which order?" in first.text
    assert second.text == "refund 1 of 5"


async def test_a_tool_that_asks_the_model_again_after_a_time_out_does_not_run_again(store, refunds) -> None:
    """Its provider may have refunded."""

    @idempotent_tool(store, intent=INTENT)
    async def refund(order_id: str, amount: int) -> str:
        refunds.make(order_id, amount)
        raise ModelRetry("Try again.") from TimeoutError()

    answers = await run(agent_of(refund, calls=2))

    assert [MAY_BE_DONE in answer.text for answer in answers] == [True, True]
    assert refunds.made == ["order-7 5"]


async def test_a_tool_in_a_thread_that_the_framework_does_not_wait_for(store, refunds) -> None:
    """It goes on, and its result is recorded."""
    go_on = threading.Event()

    def refund(order_id: str, amount: int) -> str:
        made = refunds.make(order_id, amount)
        go_on.wait()
        return made

    decorate = partial(idempotent_tool, store, name="refund", intent=INTENT)
    first, second = await run(agent_of(Tool(decorate()(refund), timeout=4), calls=2))
    go_on.set()
    recorded = await asyncio.to_thread(decorate(policy=Policy(on_crash="hold", wait=10))(refund), "order-7", 5)

    assert MAY_BE_DONE in first.text
    assert "being done right now" in second.text
    assert recorded == "refund 1 of 5"
    assert refunds.made == ["order-7 5"]


async def test_other_tools_are_not_touched(refunds) -> None:
    """What the framework says of their time-outs stays."""

    async def refund(order_id: str, amount: int) -> str:
        await asyncio.Event().wait()
        raise NotImplementedError

    (only,) = await run(agent_of(Tool(refund, timeout=0.05)))

    assert "Timed out after" in only.text


async def test_a_call_in_a_history_without_run_ids_needs_an_intent(store, refunds) -> None:
    """The id of the call may come again in another conversation."""
    clerk = PydanticAIRig(refunds.tool(store))
    history = ModelMessagesTypeAdapter.validate_json(await clerk.save(refund_call("call-1")))
    for message in history:
        message.run_id = None

    (only,) = await clerk.resume(ModelMessagesTypeAdapter.dump_json(history).decode())

    assert "Nothing was done: the call has no idempotency key" in only.text
    assert refunds.made == []


async def test_a_tool_may_take_the_context(store, refunds) -> None:
    """It is no argument of the model, so ignore= names it."""

    @idempotent_tool(store, intent=INTENT, ignore=("ctx",))
    async def refund(ctx: RunContext[str], order_id: str, amount: int) -> str:
        return f"{refunds.make(order_id, amount)} for {ctx.deps}"

    first, second = await run(agent_of(refund, calls=2), deps="ann")

    assert first.text == "refund 1 of 5 for ann"
    assert second.text.startswith("refund 1 of 5 for ann\n\n" + REPLAYED)


async def test_a_result_that_is_no_text_is_replayed_as_it_is(store, refunds) -> None:
    """The application may read it from the history."""

    @idempotent_tool(store, intent=INTENT)
    async def refund(order_id: str, amount: int) -> dict[str, str]:
        return {"made": refunds.make(order_id, amount)}

    first, second = await run(agent_of(refund, calls=2))

    assert first.text == second.text == '{"made":"refund 1 of 5"}'


async def test_an_error_of_the_code_fails_the_run(store) -> None:
    """Its author reads it, and not the model."""

    @idempotent_tool(store, intent=INTENT)
    async def refund(order_id: str, amount: int) -> Any:
        return object()

    with pytest.raises(ConfigurationError, match="does not name"):
        await run(agent_of(refund))


@pytest.mark.parametrize("intent", [INTENT, None])
async def test_a_tool_that_only_calls_idempotent_ones_is_not_touched(store, refunds, intent) -> None:
    """It has done other things too, and two calls in it are not one call of the model."""
    refund_once = refunds.tool(store, intent=intent)

    async def refund(order_id: str, amount: int) -> str:
        return f"{await refund_once(order_id, amount)}, and wrote to its customer"

    agent = agent_of(refund, calls=2)
    if intent is None:
        with pytest.raises(KeyMissingError):
            await run(agent)
    else:
        assert [answer.text for answer in await run(agent)] == ["refund 1 of 5, and wrote to its customer"] * 2


async def test_a_tool_of_toolsets(store, refunds) -> None:
    """Its name is another one than that of its function, and its set is one of several."""
    shop = FunctionToolset([refunds.tool(store, intent=INTENT)])
    agent = agent_of(
        toolsets=[CombinedToolset([shop.renamed({"pay_back": "refund"}), FunctionToolset()])], name="pay_back"
    )

    (first,), (second,) = await run(agent), await run(agent)

    assert first.text == "refund 1 of 5"
    assert second.text.startswith("refund 1 of 5\n\n" + REPLAYED)

"""The adapter in LangChain and LangGraph."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Annotated, Any, TypedDict

import pytest

from tests.kit.servers import missing

if find_spec("langchain") is None:
    missing("langchain is not installed")

from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, ToolRetryMiddleware
from langchain.tools import BaseTool, ToolRuntime, tool
from langchain_core.messages import AIMessage, AnyMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph, add_messages
from langgraph.prebuilt import ToolNode
from langgraph.runtime import get_runtime
from langgraph.types import Command, RetryPolicy, interrupt
from pydantic import BaseModel

from idempotency import Policy
from idempotency.adapters.langchain import IdempotentTools
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.tool import idempotent_tool, tool_call
from tests.tools.frameworks.contract import DO_NOT_REPEAT, INTENT, MAY_BE_DONE, REPLAYED, ToolLoopContract
from tests.tools.frameworks.langchain_rig import LangChainRig, Model, answers_of
from tests.tools.frameworks.rig import Answer

ASK = {"messages": [("user", "Refund it.")]}
THREAD: Any = {"configurable": {"thread_id": "conversation"}}


class TestLangChain(ToolLoopContract):
    """The contract."""

    rig = LangChainRig


def called(message: str | None = None) -> AIMessage:
    """Make the message in which the model calls."""
    args = {"order_id": "order-7", "amount": 5}
    return AIMessage("", id=message, tool_calls=[{"type": "tool_call", "name": "refund", "id": "call-1", "args": args}])


def agent_of(function: Any, *middleware: Any, message: str | None = None) -> Any:
    """Make an agent that calls its tool once, and then ends each time."""
    model = Model(responses=[called(message), *[AIMessage("done")] * 3])
    return create_agent(model, [function], middleware=[*middleware, IdempotentTools()], checkpointer=InMemorySaver())


def tool_node(function: Any) -> ToolNode:
    """Make the node of a graph of one's own."""
    tools = IdempotentTools()
    return ToolNode([tool(function)], wrap_tool_call=tools.wrap_tool_call, awrap_tool_call=tools.awrap_tool_call)


async def fork(agent: Any) -> list[Answer]:
    """Go on once more from the checkpoint of the model's message."""
    history = [state async for state in agent.aget_state_history(THREAD)]
    (before,) = [state for state in history if state.next == ("tools",)]
    return answers_of(await agent.ainvoke(None, await agent.aupdate_state(before.config, None)))


async def test_a_fork_of_the_checkpoint_is_the_same_call(store, refunds) -> None:
    """The graph runs another task, for the same message of the model."""
    agent = agent_of(refunds.tool(store))
    await agent.ainvoke(ASK, THREAD)

    (forked,) = await fork(agent)

    assert forked.text.startswith("refund 1 of 5\n\n" + REPLAYED)
    assert refunds.made == ["order-7 5"]


def test_a_tool_that_is_not_awaited(store, refunds) -> None:
    """The agent is invoked without awaiting."""

    @idempotent_tool(store)
    def refund(order_id: str, amount: int) -> str:
        """Refund an order."""
        return refunds.make(order_id, amount)

    agent = agent_of(refund)
    agent.invoke(ASK, THREAD, interrupt_before=["tools"])
    saved = agent.get_state(THREAD).config

    answers = [answers_of(agent.invoke(None, saved)) for _ in range(2)]

    assert answers[0][0].text == "refund 1 of 5"
    assert answers[1][0].text.startswith("refund 1 of 5\n\n" + REPLAYED)


def test_a_tool_that_is_not_awaited_answers_in_words(store, refunds) -> None:
    """Its provider gave no answer in time."""

    @idempotent_tool(store)
    def refund(order_id: str, amount: int) -> str:
        """Refund an order."""
        refunds.make(order_id, amount)
        raise TimeoutError

    (only,) = answers_of(agent_of(refund).invoke(ASK, THREAD))

    assert MAY_BE_DONE in only.text
    assert only.failed


async def test_a_retry_of_the_framework_repeats_what_failed_before_its_effect(store, refunds) -> None:
    """The middleware of retries stands outside."""
    failures = [ValueError("no such order")]

    @idempotent_tool(store)
    async def refund(order_id: str, amount: int) -> str:
        """Refund an order."""
        if failures:
            raise failures.pop()
        return refunds.make(order_id, amount)

    agent = agent_of(refund, ToolRetryMiddleware(initial_delay=0))

    (only,) = answers_of(await agent.ainvoke(ASK, THREAD))

    assert only.text == "refund 1 of 5"


async def test_a_retry_of_the_framework_does_not_repeat_what_may_have_been_done(store, refunds) -> None:
    """The provider gave no answer in time, after it had refunded."""

    async def no_answer() -> None:
        raise TimeoutError

    agent = agent_of(refunds.tool(store, no_answer), ToolRetryMiddleware(initial_delay=0))

    (only,) = answers_of(await agent.ainvoke(ASK, THREAD))

    assert DO_NOT_REPEAT in only.text
    assert refunds.made == ["order-7 5"]


async def test_an_id_of_a_message_in_another_thread_is_another_call(store, refunds) -> None:
    """Not every model gives its messages ids that are unique."""
    for thread in ("one", "other"):
        agent = agent_of(refunds.tool(store), message="message-1")
        await agent.ainvoke(ASK, {"configurable": {"thread_id": thread}})

    assert refunds.made == ["order-7 5", "order-7 5"]


class Messages(BaseModel):
    """A state in which each message has an id."""

    messages: Annotated[list[AnyMessage], add_messages]


class WithoutIds(TypedDict):
    """A state in which the message of the model has none."""

    messages: list[AnyMessage]


@pytest.mark.parametrize("state_schema", [Messages, WithoutIds])
async def test_a_node_with_a_time_out_and_retries_refunds_once(store, refunds, state_schema) -> None:
    """LangGraph cancels the node, and runs it again."""
    graph = StateGraph(state_schema)
    retry = RetryPolicy(initial_interval=0, jitter=False)
    graph.add_node("tools", tool_node(refunds.tool(store, asyncio.Event().wait)), timeout=1, retry_policy=retry)
    graph.add_edge(START, "tools")

    state = await graph.compile().ainvoke({"messages": [called()]})

    (only,) = answers_of(state)
    assert MAY_BE_DONE in only.text
    assert refunds.made == ["order-7 5"]


async def test_an_approval_that_is_resumed_twice_refunds_once(store, refunds) -> None:
    """A person approved one call."""
    agent = agent_of(refunds.tool(store), HumanInTheLoopMiddleware(interrupt_on={"refund": True}))
    await agent.ainvoke(ASK, THREAD)
    asked = (await agent.aget_state(THREAD)).config
    approved = Command(resume={"decisions": [{"type": "approve"}]})

    await agent.ainvoke(approved, asked)
    (again,) = answers_of(await agent.ainvoke(approved, asked))

    assert REPLAYED in again.text
    assert refunds.made == ["order-7 5"]


async def test_a_tool_that_interrupts_runs_again_when_it_is_resumed(store, refunds) -> None:
    """It asks before its effect, so nothing is recorded until then, also where a failure leaves the outcome unknown."""

    @idempotent_tool(store, policy=Policy(on_crash="hold", outcomes={Exception: "hold"}))
    async def refund(order_id: str, amount: int) -> str:
        """Refund an order."""
        return refunds.make(order_id, interrupt("How much?"))

    agent = agent_of(refund)
    await agent.ainvoke(ASK, THREAD)

    (only,) = answers_of(await agent.ainvoke(Command(resume=4), THREAD))

    assert only.text == "refund 1 of 4"
    assert refunds.made == ["order-7 4"]


async def test_a_tool_may_take_what_is_injected(store, refunds) -> None:
    """It is no argument of the model, so ignore= names it."""

    @idempotent_tool(store, ignore=("runtime",))
    async def refund(order_id: str, amount: int, runtime: ToolRuntime) -> str:
        """Refund an order."""
        return f"{refunds.make(order_id, amount)} by {runtime.tool_call_id}"

    agent = agent_of(refund)
    await agent.ainvoke(ASK, THREAD)

    (forked,) = await fork(agent)

    assert forked.text.startswith("refund 1 of 5 by call-1\n\n" + REPLAYED)


async def test_an_error_of_the_code_fails_the_run(store, refunds) -> None:
    """Its author reads it, and not the model."""

    @idempotent_tool(store)
    async def refund(order_id: str, amount: int) -> Any:
        """Refund an order."""
        return object()

    with pytest.raises(ConfigurationError, match="does not name"):
        await agent_of(refund).ainvoke(ASK, THREAD)


async def test_a_task_of_langgraph_names_the_call_by_its_own_id(store, refunds) -> None:
    """The flow fails after the task that refunds, before the checkpoint has its result."""
    refund = refunds.tool(store)
    failures = [RuntimeError("killed")]

    @task
    async def refund_task(order_id: str, amount: int) -> str:
        with tool_call(attempt=get_runtime().execution_info.task_id):
            made = await refund(order_id, amount)
        if failures:
            raise failures.pop()
        return made

    @entrypoint(checkpointer=InMemorySaver())
    async def flow(order_id: str) -> str:
        return await refund_task(order_id, 5)

    with pytest.raises(RuntimeError, match="killed"):
        await flow.ainvoke("order-7", THREAD)

    assert await flow.ainvoke(None, THREAD) == "refund 1 of 5"
    assert await flow.ainvoke("order-7", THREAD) == "refund 2 of 5"


@pytest.mark.parametrize("intent", [INTENT, None])
async def test_a_tool_that_only_calls_idempotent_ones_is_not_touched(store, refunds, intent) -> None:
    """It has done other things too, and two calls in it are not one call of the model."""
    refund_once = refunds.tool(store, intent=intent)

    async def refund(order_id: str, amount: int) -> str:
        """Refund an order, and write to its customer."""
        return await refund_once(order_id, amount)

    agent = agent_of(refund)
    if intent is None:
        with pytest.raises(KeyMissingError):
            await agent.ainvoke(ASK, THREAD)
    else:
        await agent.ainvoke(ASK, THREAD)
        assert [answer.text for answer in await fork(agent)] == ["refund 1 of 5"]


async def test_a_tool_that_is_a_class(store, refunds) -> None:
    """Its method is decorated."""

    class Refund(BaseTool):
        name: str = "refund"
        description: str = "Refund an order."

        @idempotent_tool(store, ignore=("self",))
        def _run(self, order_id: str, amount: int) -> str:
            return refunds.make(order_id, amount)

    agent = agent_of(Refund())
    await agent.ainvoke(ASK, THREAD)

    (forked,) = await fork(agent)

    assert forked.text.startswith("refund 1 of 5\n\n" + REPLAYED)

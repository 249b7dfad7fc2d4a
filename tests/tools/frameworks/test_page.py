"""The code of the page about tools, in the frameworks that it is written for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from idempotency import current
from idempotency.tool import idempotent_tool
from tests.kit.servers import missing
from tests.test_docs_code import blocks

PAGE = blocks("tools.md")
ARGUMENTS = {"order_id": "order-7", "amount": 5}


class Provider:
    """The provider of the page."""

    def __init__(self) -> None:
        self.refunds: list[str] = []

    async def refund(self, order_id: str, amount: int, idempotency_key: str) -> str:
        self.refunds.append(f"{order_id} {amount}")
        return "refunded"


def run(heading: str, store: Any, **names: Any) -> dict[str, Any]:
    """Run the code under a heading, and return its names."""
    names |= {"store": store, "provider": Provider(), "current": current, "idempotent_tool": idempotent_tool}
    for code in PAGE[heading]:
        exec(compile(code, "docs/tools.md", "exec"), names)
    return names


@pytest.fixture
def framework(request: pytest.FixtureRequest) -> None:
    """Skip a test whose framework is not installed."""
    if find_spec(request.param) is None:
        missing(f"{request.param} is not installed")


@pytest.mark.parametrize("framework", ["agents"], indirect=True)
async def test_the_clerk_of_the_page_refunds_once(store, framework) -> None:
    from agents import RunConfig, Runner
    from agents.testing import ScriptedModel, assistant_message, function_call

    calls = [[function_call("refund_by_clerk", ARGUMENTS, call_id=f"call-{number}")] for number in range(2)]
    page = run("OpenAI Agents SDK", store, model=ScriptedModel([*calls, [assistant_message("done")]]))

    await Runner.run(page["clerk"], "Refund it.", run_config=RunConfig(tracing_disabled=True))

    assert page["provider"].refunds == ["order-7 5"]


@pytest.mark.parametrize("framework", ["langchain"], indirect=True)
async def test_the_chain_of_the_page_refunds_once(store, framework) -> None:
    from langchain_core.messages import AIMessage
    from langgraph.checkpoint.memory import InMemorySaver

    from tests.tools.frameworks.langchain_rig import Model

    calls = [
        AIMessage(
            "", tool_calls=[{"type": "tool_call", "name": "refund_in_chain", "id": str(number), "args": ARGUMENTS}]
        )
        for number in range(2)
    ]
    model = Model(responses=[*calls, AIMessage("done")])
    page = run("LangChain and LangGraph", store, model=model, checkpointer=InMemorySaver())

    await page["chain"].ainvoke({"messages": ["Refund it."]}, {"configurable": {"thread_id": "1"}})

    assert page["provider"].refunds == ["order-7 5"]


@pytest.mark.parametrize("framework", ["pydantic_ai"], indirect=True)
async def test_the_desk_of_the_page_refunds_once(store, framework) -> None:
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    calls = iter([ToolCallPart("refund_at_desk", ARGUMENTS, tool_call_id=f"call-{number}") for number in range(2)])

    async def model(messages: Any, info: Any) -> ModelResponse:
        return ModelResponse(parts=[next(calls, TextPart("done"))])

    page = run("Pydantic AI", store, model=FunctionModel(model))

    await page["desk"].run("Refund it.")

    assert page["provider"].refunds == ["order-7 5"]

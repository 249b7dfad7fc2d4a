"""The rig of LangChain: a conversation is saved by its checkpointer, in a file of SQLite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from idempotency.adapters.langchain import IdempotentTools
from tests.tools.frameworks.rig import CONVERSATION, Answer, Call, Rig


class Model(FakeMessagesListChatModel):
    """A model that gives its answers one after another."""

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Any:
        return self


class LangChainRig(Rig):
    """An agent of LangChain, which is a graph of LangGraph."""

    middleware: Sequence[Any] = ()
    """What stands around the middleware of the library."""

    def _agent(self, turns: list[list[Call]], checkpointer: Any) -> Any:
        answers = [AIMessage("", tool_calls=[self._call(call) for call in calls]) for calls in turns]
        agent = create_agent(
            Model(responses=[*answers, AIMessage("done")]),
            [tool(self.function)],
            middleware=[*self.middleware, IdempotentTools(caller=lambda _: self.caller)],
            checkpointer=checkpointer,
        )
        agent.step_timeout = self.timeout
        return agent

    def _call(self, call: Call) -> Any:
        return {"type": "tool_call", "name": self.function.__name__, "id": call.id, "args": call.arguments}

    @asynccontextmanager
    async def _checkpoints(self) -> Any:
        async with AsyncSqliteSaver.from_conn_string(str(Path(self.directory) / "checkpoints.db")) as saver:
            yield saver

    async def talk(self, *turns: list[Call], conversation: str = CONVERSATION) -> list[Answer]:
        async with self._checkpoints() as saver:
            agent, config = self._agent([*turns], saver), _config(conversation)
            try:
                return answers_of(await agent.ainvoke(_ASK, config))
            except TimeoutError:  # of a step of the graph: the application resumes it
                return answers_of(await agent.ainvoke(None, config))

    async def save(self, *calls: Call, conversation: str = CONVERSATION) -> str:
        async with self._checkpoints() as saver:
            agent, config = self._agent([[*calls]], saver), _config(conversation)
            await agent.ainvoke(_ASK, config, interrupt_before=["tools"])
            return json.dumps((await agent.aget_state(config)).config)

    async def resume(self, saved: str) -> list[Answer]:
        async with self._checkpoints() as saver:
            return answers_of(await self._agent([], saver).ainvoke(None, json.loads(saved)))


_ASK = {"messages": [("user", "Refund it.")]}


def _config(conversation: str) -> Any:
    return {"configurable": {"thread_id": conversation}}


def answers_of(state: Any) -> list[Answer]:
    """Read what the model was answered in a run."""
    answers = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    return [Answer(each.tool_call_id, each.text, each.status == "error") for each in answers]

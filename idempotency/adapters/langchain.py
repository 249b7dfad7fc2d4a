"""Tools of LangChain agents and of LangGraph.

    @idempotent_tool(store, intent=("order_id", "amount"))
    def refund(order_id: str, amount: int) -> str: ...

    agent = create_agent(model, [refund], middleware=[..., IdempotentTools()], checkpointer=checkpointer)

A graph of LangGraph gives both methods to its node:
``ToolNode([refund], wrap_tool_call=tools.wrap_tool_call, awrap_tool_call=tools.awrap_tool_call)``. A ``@task`` needs
``intent=``, or a ``tool_call(attempt=...)`` of its own.

Attempt: the ``thread_id``, the id of the model's message and the ``tool_call_id``. They are in the checkpoint, so they
are the same when the graph is resumed from it, or its node is retried. Under ``durability="exit"`` a graph that is
killed has no checkpoint of the message: the model calls anew, and only ``intent=`` knows that it is the same call.

``IdempotentTools`` is the last of the middleware: ``ToolRetryMiddleware`` outside of it repeats what failed before its
effect, and nothing that may have been done. Do not give the ``ToolNode`` ``handle_tool_errors=True``: it would
answer the errors of this library in its own words. A tool that calls ``interrupt()`` runs again when it is resumed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt.tool_node import ToolCallRequest, ToolRuntime
from langgraph.types import Command

from idempotency.adapters._tools import attempt_of, noted
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.tool import ToolCall, explain, is_idempotent_tool, tool_call

Answer = ToolMessage | Command[Any]


class IdempotentTools(AgentMiddleware[Any, Any, Any]):
    """Names the calls of idempotent tools, and answers the model in words; other tools are not touched.

    ``caller`` is given the ``ToolRuntime`` of a call, and returns the authenticated caller; callers do not see each
    other's results. Default None: all are one caller.
    A function with an argument that LangGraph injects needs ``ignore=`` with its name in its ``idempotent_tool``.
    """

    def __init__(self, *, caller: Callable[[ToolRuntime[Any, Any]], str | None] | None = None) -> None:
        super().__init__()
        self._caller = caller

    def wrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Answer]) -> Answer:
        """Execute a tool under the name of its call."""
        if not _is_idempotent(request.tool):
            return handler(request)
        with self._named(request) as call:
            try:
                return _noted(call, handler(request))
            except ConfigurationError:
                raise
            except IdempotencyError as error:
                return _failed(request, explain(error, call))

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Answer]]
    ) -> Answer:
        """Execute a tool under the name of its call."""
        if not _is_idempotent(request.tool):
            return await handler(request)
        with self._named(request) as call:
            try:
                return _noted(call, await handler(request))
            except ConfigurationError:
                raise
            except IdempotencyError as error:
                return _failed(request, explain(error, call))

    @contextmanager
    def _named(self, request: ToolCallRequest) -> Iterator[ToolCall]:
        caller = self._caller(request.runtime) if self._caller is not None else None
        with tool_call(attempt=_attempt(request), caller=caller, is_interim=_is_interim) as call:
            yield call


def _is_interim(ended: object) -> bool:
    """Return whether a tool has interrupted the graph, which calls it again when it is resumed."""
    return isinstance(ended, GraphBubbleUp)


def _attempt(request: ToolCallRequest) -> str | None:
    call, info = request.tool_call["id"], request.runtime.execution_info
    if call is None or info is None:
        return None
    return attempt_of(info.thread_id or "", _message_of(request.state, call) or info.task_id, call)


def _message_of(state: Any, call: str) -> str | None:
    """Return the id of the message in which the model called. It is the same in a fork of the checkpoint."""
    fields = state if isinstance(state, Mapping) else {"": state, **getattr(state, "__dict__", {})}
    messages = [each for values in fields.values() if isinstance(values, list) for each in values]
    for message in reversed(messages):
        if isinstance(message, AIMessage) and any(each["id"] == call for each in message.tool_calls):
            return message.id
    return None


def _noted(call: ToolCall, answer: Answer) -> Answer:
    if isinstance(answer, ToolMessage):
        return answer.model_copy(update={"content": noted(call, answer.content)})
    return answer


def _is_idempotent(tool: object) -> bool:
    """Return whether a tool is an idempotent one itself, and does not only call one."""
    return any(is_idempotent_tool(getattr(tool, name, None)) for name in ("func", "coroutine", "_run", "_arun"))


def _failed(request: ToolCallRequest, text: str) -> ToolMessage:
    name, call = request.tool_call["name"], cast(str, request.tool_call["id"])
    return ToolMessage(text, name=name, tool_call_id=call, status="error")

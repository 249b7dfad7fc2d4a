"""Tools of Pydantic AI.

    @idempotent_tool(store, intent=("order_id", "amount"))
    async def refund(order_id: str, amount: int) -> str: ...

    agent = Agent(model, tools=[refund], capabilities=[IdempotentTools()])

Attempt: the ``run_id`` of the message in which the model called, and the ``tool_call_id``. Both are in the message
history, so they are the same when another run, in another process, goes on with that history.

At its ``timeout`` Pydantic AI cancels a tool, and lets the model try again. Here the model hears that it may have been
done. An approval of Pydantic AI is for one call; a history that is resumed twice with it runs the tool once. A tool
that raises ``ApprovalRequired`` or ``CallDeferred`` runs again when it is called again; so does one that raises
``ModelRetry``, unless a time-out is the cause. A replay is marked in results that are text. A tool that runs in another
process than the agent, as in an activity of Temporal, needs ``intent=``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_ai import ApprovalRequired, CallDeferred, RunContext, ToolFailed
from pydantic_ai.capabilities import AbstractCapability, CapabilityOrdering, ValidatedToolArgs, WrapToolExecuteHandler
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.tools import ToolDefinition

from idempotency.adapters._tools import attempt_of, noted
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.tool import explain, explain_interruption, is_idempotent_tool, tool_call


@dataclass(kw_only=True)
class IdempotentTools(AbstractCapability[Any]):
    """Names the calls of idempotent tools, and answers the model in words; other tools are not touched.

    ``caller`` is given the ``RunContext`` of a call, and returns the authenticated caller; callers do not see each
    other's results. Default None: all are one caller.
    A function that takes the context needs ``ignore=`` with the name of that argument in its ``idempotent_tool``.
    """

    caller: Callable[[RunContext[Any]], str | None] | None = None

    def get_ordering(self) -> CapabilityOrdering:
        """Stand inside of all others: what they do about a failure is then done about the answer in words."""
        return CapabilityOrdering(position="innermost")

    async def wrap_tool_execute(
        self,
        ctx: RunContext[Any],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: ValidatedToolArgs,
        handler: WrapToolExecuteHandler,
    ) -> Any:
        """Execute a tool under the name of its call."""
        if not _is_idempotent(ctx, call.tool_name):
            return await handler(args)
        caller = self.caller(ctx) if self.caller is not None else None
        attempt = _attempt(ctx, call.tool_call_id)
        with tool_call(attempt=attempt, caller=caller, is_interim=_is_interim) as named:
            try:
                return noted(named, await handler(args))
            except ConfigurationError:
                raise
            except IdempotencyError as error:
                raise ToolFailed(explain(error, named)) from error
            except Exception as error:
                if named.interrupted:
                    raise ToolFailed(explain_interruption(named)) from error
                raise


def _is_interim(ended: object) -> bool:
    return isinstance(ended, ApprovalRequired | CallDeferred)


def _attempt(ctx: RunContext[Any], call: str) -> str | None:
    """Return the attempt: its run is that of the model's message, which ``ctx`` may only go on with."""
    for message in reversed(ctx.messages):
        if isinstance(message, ModelResponse) and any(part.tool_call_id == call for part in message.tool_calls):
            return attempt_of(message.run_id or None, call)
    return attempt_of(ctx.run_id or None, call)


def _is_idempotent(ctx: RunContext[Any], name: str) -> bool:
    """Return whether a tool is an idempotent one itself, and does not only call one."""
    tools = ctx.tool_manager.tools if ctx.tool_manager is not None else None
    tool: Any = (tools or {}).get(name)
    while hasattr(tool, "source_tool"):  # of toolsets that are combined
        tool = tool.source_tool
    # What calls the function of a tool is a method of its schema.
    schema = getattr(getattr(tool, "call_func", None), "__self__", None)
    return is_idempotent_tool(getattr(schema, "function", None))

"""Tools of the OpenAI Agents SDK.

    @idempotent_function_tool(timeout=20)
    @idempotent_tool(store, intent=("order_id", "amount"))
    async def refund(order_id: str, amount: int) -> str: ...

    agent = Agent(name="clerk", tools=[refund])

Attempt: the id of the run and the ``tool_call_id``. The latter is the same when a ``RunState`` is resumed, and not
unique: some providers number the calls of each conversation anew. The SDK gives a run no id, so it is the ``group_id``
of its ``RunConfig``, which is the id of the conversation, or what ``run=`` returns. Without either, a tool needs
``intent=``.

At its ``timeout`` the SDK cancels a tool, and lets the model try again. Here the model hears that it may have been
done. An approval of the SDK is for the arguments of one call; a state that is resumed twice after it runs the tool
once. A replay is marked in results that are text. An error of the configuration is logged, and the model is asked to
tell a person; the SDK would ask it to try again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints
from weakref import WeakKeyDictionary

from agents import FunctionTool, function_tool
from agents.function_schema import function_schema
from agents.tool_context import ToolContext

from idempotency._signature import is_async, name_of
from idempotency.adapters._tools import attempt_of, noted
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.tool import ToolCall, explain, explain_interruption, is_idempotent_tool, tool_call

_logger = logging.getLogger("idempotency")

Reader = Callable[[ToolContext[Any]], str | None]


def idempotent_function_tool(
    *, run: Reader | None = None, caller: Reader | None = None, **options: Any
) -> Callable[[Callable[..., Any]], FunctionTool]:
    """Make a function tool of a function that :func:`~idempotency.tool.idempotent_tool` decorated.

    ``run`` is given the ``ToolContext`` of a call, and returns the id of its run, the same when the run is resumed; or
    None where there is none. Default: the ``group_id`` of the ``RunConfig``.
    ``caller`` is given it too, and returns the authenticated caller; callers do not see each other's results. Default
    None: all are one caller.
    The other options are those of ``agents.function_tool``. A function that takes the context needs ``ignore=`` with
    the name of that argument in its ``idempotent_tool``.
    Raises :class:`~idempotency.errors.ConfigurationError` for a function that ``idempotent_tool`` did not decorate.
    """

    def decorate(function: Callable[..., Any]) -> FunctionTool:
        if not is_idempotent_tool(function):
            raise ConfigurationError(
                f"{name_of(function)} is no idempotent tool: decorate it with idempotent_tool first"
            )
        calls = _Calls(function, run or _group_of, caller)
        return function_tool(calls.wrapper(), **{"timeout_error_function": calls.explain_time_out, **options})

    return decorate


def _group_of(context: ToolContext[Any]) -> str | None:
    return context.run_config.group_id if context.run_config is not None else None


class _Calls:
    """The calls of one tool."""

    def __init__(self, function: Callable[..., Any], run: Reader, caller: Reader | None) -> None:
        self._function = function
        self._run = run
        self._caller = caller
        self._takes_context = function_schema(function, strict_json_schema=False).takes_context
        self._calls: WeakKeyDictionary[ToolContext[Any], ToolCall] = WeakKeyDictionary()

    def wrapper(self) -> Any:
        """Return the function that the SDK calls. It is given the context, whether or not the tool takes it."""
        function = self._function

        async def call_async(context: ToolContext[Any], /, *args: Any, **kwargs: Any) -> Any:
            try:
                with self._named(context) as call:
                    return noted(call, await function(*self._arguments(context, args), **kwargs))
            except IdempotencyError as error:
                return _words(error, self._calls.get(context))
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                return explain_interruption(self._calls[context])

        def call_sync(context: ToolContext[Any], /, *args: Any, **kwargs: Any) -> Any:
            try:
                with self._named(context) as call:
                    return noted(call, function(*self._arguments(context, args), **kwargs))
            except IdempotencyError as error:
                return _words(error, self._calls.get(context))

        return self._shaped(call_async if is_async(function) else call_sync)

    def explain_time_out(self, context: ToolContext[Any], error: Exception) -> str:
        """Return the words for the model after the SDK has cancelled a call."""
        call = self._calls.get(context)
        return explain_interruption(call) if call is not None and call.interrupted else str(error)

    @contextmanager
    def _named(self, context: ToolContext[Any]) -> Iterator[ToolCall]:
        attempt = attempt_of(self._run(context) or None, context.tool_call_id)
        caller = self._caller(context) if self._caller is not None else None
        with tool_call(attempt=attempt, caller=caller) as call:
            self._calls[context] = call
            yield call

    def _arguments(self, context: ToolContext[Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (context, *args) if self._takes_context else args

    def _shaped(self, wrapper: Any) -> Any:
        """Give a wrapper what the SDK reads of a function, and the context as its first parameter."""
        function: Any = self._function
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(wrapper, name, getattr(function, name))
        signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
        if not self._takes_context:
            signature = signature.replace(parameters=[_CONTEXT, *signature.parameters.values()])
            hints[_CONTEXT.name] = _CONTEXT.annotation
        wrapper.__signature__, wrapper.__annotations__ = signature, hints
        return wrapper


_CONTEXT = inspect.Parameter("__tool_context", inspect.Parameter.POSITIONAL_ONLY, annotation=ToolContext[Any])


def _words(error: IdempotencyError, call: ToolCall | None) -> str:
    if isinstance(error, ConfigurationError):
        _logger.error("a tool call failed", exc_info=error)
    return explain(error, call)


def _is_cancelled() -> bool:
    """Return whether the task of the call is cancelled, and not only what the tool awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

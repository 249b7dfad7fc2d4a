"""Tools of an MCP server, by the MCP Python SDK.

    tools = IdempotentTools()

    @tools.tool()
    @idempotent_tool(store, intent=("order_id", "amount"))
    async def refund(order_id: str, amount: int) -> str: ...

    server = MCPServer("shop", extensions=[tools])

The key of the caller is, in this order: ``io.github.asgi-idempotency/key`` in the ``_meta`` of the call;
``arguments.meta.idempotency_key``, as the Agentic Commerce Protocol has it; the header ``Idempotency-Key`` of the POST.
The tool does not see the first two. The id of a request is no identity: a client that sends a call again, as it must
when the stream of the response breaks, gives it a new one. Without a key of the caller, the ``intent`` of the tool
identifies the call.

A call goes on when its client goes away, and the repeat gets its result.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, ToolBinding
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.request_state import authenticated_principal
from mcp_types import CallToolRequestParams, CallToolResult, InputRequiredResult, TextContent, ToolAnnotations

from idempotency._http.key import read_key
from idempotency._signature import is_async
from idempotency.errors import ConfigurationError, IdempotencyError, KeyInvalidError
from idempotency.tool import ToolCall, explain, is_idempotent_tool, repeats_have_no_effect, tool_call

F = TypeVar("F", bound=Callable[..., Any])

Context = ServerRequestContext[Any, Any]

KEY = "io.github.asgi-idempotency/key"
"""The member of ``_meta`` of a call that is the key of its caller."""

REPLAYED_AT = "io.github.asgi-idempotency/replayed-at"
"""The member of ``_meta`` of a result that is a recorded one: when the call began, in ISO 8601."""

_HEADER = b"idempotency-key"


class IdempotentTools(Extension):
    """The idempotent tools of an MCP server: give it to ``MCPServer(extensions=[...])`` after its tools are added."""

    identifier = "io.github.asgi-idempotency/idempotent-tools"

    def __init__(self, *, caller: Callable[[Context], str | None] = authenticated_principal) -> None:
        """Make the extension.

        ``caller``: names the caller of a request; callers do not see each other's results. Default: the client, issuer
        and subject of the access token, as the SDK checked it; without authentication all are one caller. Agents that
        have different tokens and work on the same orders need a name in common, such as that of their tenant.
        """
        self._caller = caller
        self._tools: dict[str, ToolBinding] = {}
        self._served = False

    def tool(self, *, annotations: ToolAnnotations | None = None, **options: Any) -> Callable[[F], F]:
        """Add a tool, which ``idempotent_tool`` has decorated. The options are those of ``MCPServer.tool``.

        ``idempotentHint`` is announced as it is, unless ``annotations`` have it.
        Raises :class:`~idempotency.errors.ConfigurationError` for a function that is not decorated, and once a server
        was made with the extension: it would not serve the tool.
        """
        if self._served:
            raise ConfigurationError("a tool must be added before MCPServer(extensions=[...]) is made")

        def add(function: F) -> F:
            if not is_idempotent_tool(function):
                raise ConfigurationError(f"{function!r} is no idempotent tool: decorate it with idempotent_tool first")
            name = options.get("name") or function.__name__
            hint = {"idempotent_hint": repeats_have_no_effect(function)}
            given = {} if annotations is None else annotations.model_dump(exclude_none=True)
            stamped = {**options, "annotations": ToolAnnotations(**{**hint, **given})}
            self._tools[name] = ToolBinding(_in_words(function), meta=stamped.pop("meta", None), kwargs=stamped)
            return function

        return add

    def tools(self) -> Sequence[ToolBinding]:
        """See :class:`mcp.server.extension.Extension`."""
        self._served = True
        return list(self._tools.values())

    def settings(self) -> dict[str, Any]:
        """Tell clients by which member of ``_meta`` they send their key."""
        return {"key": KEY}

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: Context, call_next: CallNext
    ) -> HandlerResult:
        """See :class:`mcp.server.extension.Extension`."""
        if params.name not in self._tools:
            return await call_next(ctx)
        try:
            named = tool_call(caller_key=_key(params, ctx), caller=self._caller(ctx), is_interim=_is_interim)
            with named as call:
                return _marked(await call_next(ctx), call)
        except KeyInvalidError as error:
            return CallToolResult(content=[TextContent(type="text", text=explain(error))], is_error=True)


def _key(params: CallToolRequestParams, ctx: Context) -> str | None:
    """Return the key of the caller, and remove it from what the tool sees."""
    in_meta = [_without_key(meta) for meta in (params.meta, ctx.meta) if meta is not None]
    in_arguments = None
    arguments = params.arguments or {}
    if isinstance(arguments.get("meta"), dict):
        in_arguments = arguments["meta"].pop("idempotency_key", None)
    for key in (*in_meta, in_arguments):
        if key is not None:
            return cast(str, key)
    headers = [] if ctx.request is None else ctx.request.headers.raw
    return read_key([value for name, value in headers if name == _HEADER], strict=False)


def _without_key(meta: Mapping[str, Any]) -> Any:
    return cast(dict[str, Any], meta).pop(KEY, None)


def _is_interim(value: object) -> bool:
    """Return whether a tool asks for input, or failed: a result that is an error stands for an exception."""
    return isinstance(value, InputRequiredResult) or (isinstance(value, CallToolResult) and value.is_error)


def _marked(result: HandlerResult, call: ToolCall) -> HandlerResult:
    """Say in a result that it is a recorded one: to the model by a sentence, to the client in ``_meta``."""
    if call.replayed_at is None or not isinstance(result, CallToolResult):
        return result
    note = TextContent(type="text", text=call.note)
    meta = {**(result.meta or {}), REPLAYED_AT: call.replayed_at.isoformat(timespec="seconds")}
    return result.model_copy(update={"content": [*result.content, note], "meta": meta})


_running: set[asyncio.Task[Any]] = set()
"""The calls that run: those whose client has gone away have no other reference."""


def _in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a tool fail in words for the model, and finish when its client goes away.

    An error of the configuration is not put into words: the server logs it.
    """
    if not is_async(function):

        @functools.wraps(function)
        def call_sync(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except ConfigurationError:
                raise
            except IdempotencyError as error:
                raise ToolError(explain(error)) from error

        return call_sync

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await _finish(function(*args, **kwargs))
        except ConfigurationError:
            raise
        except IdempotencyError as error:
            raise ToolError(explain(error)) from error

    return call


async def _finish(work: Any) -> Any:
    # The SDK cancels a call whose stream has ended, and the client sends it again: it is not to find half of it.
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_forget)
    return await asyncio.shield(task)


def _forget(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled():
        task.exception()  # it may be that nobody awaits the task any more, and asyncio reports what is never read

"""An MCP server with idempotent tools, for the tests of its adapter."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

import anyio
import httpx2
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve
from mcp_types import CallToolResult, ElicitRequest, ElicitRequestFormParams, InputRequiredResult, TextContent
from pydantic import BaseModel

from idempotency.adapters.mcp import IdempotentTools
from idempotency.tool import idempotent_tool
from tests.kit.served import served
from tests.tools.scenarios import Verified

WORDS = {
    "unknown": "may have been done, and it is not known whether it was. Do not call it again",
    "running": "is being done right now",
    "reused": "was called before with other arguments",
    "malformed": "the idempotency key of this call is malformed",
    "nameless": "the call has no idempotency key",
}


class Sure(BaseModel):
    """The answer of a person."""

    sure: bool


async def ask(order_id: str) -> Elicit[Sure]:
    return Elicit(f"Delete {order_id}?", Sure)


class Shop:
    """The tools of a shop. ``refunds`` are the effects; ``seen`` is what the tools were given besides."""

    def __init__(self, store: Any, **options: Any) -> None:
        self.refunds: list[str] = []
        self.seen: list[Any] = []
        self.failure: Exception | None = None
        self.running, self.finish = threading.Event(), threading.Event()
        self.finish.set()
        self.tools = IdempotentTools(**options)
        self._add_tools(store)
        self.server = MCPServer("shop", extensions=[self.tools])

    def _add_tools(self, store: Any) -> None:
        @self.tools.tool()
        @idempotent_tool(store, name="refund", intent=("order_id", "amount", "occurrence"))
        async def refund(order_id: str, amount: int, note: str = "", occurrence: int = 1) -> str:
            """Refund an order."""
            return await self.pay(f"{order_id} {amount}")

        @self.tools.tool()
        @idempotent_tool(store, name="charge", ignore=("ctx",))
        async def charge(order_id: str, ctx: Context, meta: dict[str, Any] | None = None) -> str:
            self.seen.append((meta, dict(ctx.request_context.meta or {})))
            return await self.pay(order_id)

        @self.tools.tool()
        @idempotent_tool(store, name="cancel", intent=("order_id",))
        def cancel(order_id: str) -> str:
            self.refunds.append(order_id)
            if self.failure is not None:
                raise self.failure
            return f"cancelled {order_id}"

        @self.tools.tool(name="close")
        @idempotent_tool(store, name="close", ignore=("ctx",))
        async def close_account(account: str, ctx: Context) -> str | InputRequiredResult:
            if ctx.input_responses is None:
                return confirmation(account)
            return await self.pay(f"close {account}")

        @self.tools.tool()
        @idempotent_tool(store, name="delete", intent=("order_id",))
        async def delete(order_id: str, answer: Annotated[Sure, Resolve(ask)]) -> CallToolResult:
            if not answer.sure:
                return CallToolResult(content=[TextContent(type="text", text="ask again")], is_error=True)
            text = await self.pay(f"delete {order_id}")
            return CallToolResult(content=[TextContent(type="text", text=text)])

    async def pay(self, what: str) -> str:
        self.refunds.append(what)
        self.running.set()
        await anyio.to_thread.run_sync(self.finish.wait, 20)
        if self.failure is not None:
            raise self.failure
        return f"done {what}"

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Serve it by uvicorn, and yield its URL."""
        with served(self.server.streamable_http_app(), lifespan="on") as url:
            yield f"{url}/mcp"


class VerifiedOverMcp(Verified):
    """A tool that the crash kit kills with its server; the model has the words only."""

    def __init__(self, url: str, directory: str) -> None:
        super().__init__(url, directory)
        tools = IdempotentTools()
        tools.tool()(self.refund)
        self.server = MCPServer("shop", extensions=[tools])

    async def deliver(self, key: str) -> None:
        async with Client(self.server) as client:
            found = await client.call_tool("refund", {"order_id": key})
        if found.is_error:
            raise RuntimeError(text_of(found))


def confirmation(account: str) -> InputRequiredResult:
    schema: Any = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    params = ElicitRequestFormParams(message=f"Close {account}?", requested_schema=schema)
    return InputRequiredResult(input_requests={"sure": ElicitRequest(params=params)})


def text_of(result: CallToolResult) -> list[str]:
    """Return the texts of a result."""
    return [getattr(each, "text", "") for each in result.content]


@asynccontextmanager
async def over_http(url: str, headers: dict[str, str] | None = None) -> AsyncIterator[Client]:
    """Open a client, whose every POST has the headers."""
    async with (
        httpx2.AsyncClient(headers=headers, timeout=20) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client

"""The shop for agents: a tool of an MCP server, which orders through the API.

    uvicorn --app-dir examples shop.tools:app

A model that saw no answer, or that makes its plan again, calls the tool again. The *intent* says which calls are one:
one item for one occasion is ordered once. Another occasion is another order.
"""

from __future__ import annotations

import httpx
from mcp.server.mcpserver import MCPServer

from idempotency import Policy, current
from idempotency.adapters.mcp import IdempotentTools
from idempotency.client import AsyncIdempotentTransport
from idempotency.tool import idempotent_tool
from shop.database import Service
from shop.settings import API, LEASE

service = Service("agents")
tools = IdempotentTools()
# After a crash the tool runs again: it sends the same key to the API, which places one order.
policy = Policy(on_crash="rerun", lease=LEASE)


@tools.tool()
@idempotent_tool(service.store, intent=("item", "occasion"), policy=policy, name="shop.order")
async def order(item: str, occasion: str) -> str:
    """Order an item from the shop for an occasion, and return the number of the order."""
    operation = current()
    assert operation is not None
    headers = {"Authorization": "Bearer agent", "Idempotency-Key": operation.derive("order")}
    wanted = {"reference": f"{item} for {occasion}", "item": item}
    async with httpx.AsyncClient(transport=AsyncIdempotentTransport(), base_url=API, timeout=10) as client:
        answer = await client.post("/orders", json=wanted, headers=headers)
    answer.raise_for_status()
    return str(answer.json()["id"])


app = MCPServer("shop", extensions=[tools], log_level="WARNING").streamable_http_app()

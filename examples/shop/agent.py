"""An agent that orders by the tool. It has no memory: killed and started again, it begins from its first occasion.

    python -m shop.agent "a birthday" "a wedding"

The model is scripted: for each occasion it wants tea, and it calls the tool once more, as models do.
"""

from __future__ import annotations

import asyncio
import sys

from mcp.client.client import Client

from shop.settings import TOOLS


async def call(occasion: str) -> str:
    """Call the tool until there is an answer, as the framework of an agent does."""
    while True:
        try:
            async with asyncio.timeout(15), Client(TOOLS) as client:
                result = await client.call_tool("order", {"item": "tea", "occasion": occasion})
            if not result.is_error:
                return str(getattr(result.content[0], "text", ""))
        except Exception as error:  # the server is away: the client raises whatever its transport raised
            print(f"again: {type(error).__name__}", file=sys.stderr)
        await asyncio.sleep(0.5)


async def main(occasions: list[str]) -> None:
    for occasion in occasions:
        first, again = await call(occasion), await call(occasion)
        if first != again:
            raise AssertionError(f"{occasion}: two orders, {first} and {again}")
        print(f"{occasion}: {first}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))

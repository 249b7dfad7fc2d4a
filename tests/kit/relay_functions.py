"""Functions to which ``idempotency relay`` publishes in another process."""

from __future__ import annotations

import asyncio

from idempotency.outbox import Message


async def printed(message: Message) -> None:
    """Print the payload."""
    print(f"published {(message.payload or b'').decode()}", flush=True)


async def printed_slowly(message: Message) -> None:
    """Print the payload before and after a while: half a second, or an hour for the payload ``endless``."""
    payload = (message.payload or b"").decode()
    print(f"begun {payload}", flush=True)
    await asyncio.sleep(3600 if payload == "endless" else 0.5)
    print(f"published {payload}", flush=True)

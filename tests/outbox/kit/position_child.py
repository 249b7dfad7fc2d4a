"""A handler that moves a checkpoint to the position of each message, and a process of it that is killed: URL MODE SLOT.

It is killed when it has handled the messages of a batch, and before the relay has written that they are published.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from idempotency.outbox import Message, Outbox
from idempotency.outbox._log import LogRelay
from idempotency.outbox._log_statements import LogStatements
from idempotency.outbox.publishers.function import FunctionPublisher
from idempotency.projections import checkpoint


def make_handler(engine: AsyncEngine, handled: list[tuple[Any, bool]]) -> Callable[[Message], Awaitable[None]]:
    """Return a handler that writes each message into ``effect``, once; it notes the position, and if it was new."""
    sessions = async_sessionmaker(engine)

    async def handle(message: Message) -> None:
        async with sessions() as session, session.begin():
            handled.append((message.position, await apply(session, message)))

    async def apply(session: AsyncSession, message: Message) -> bool:
        assert message.position is not None
        stream = "/".join(message.key)
        if new := await checkpoint(session, "billing", stream, message.position):
            await session.execute(text("INSERT INTO effect VALUES (:id)"), {"id": message.id})
        return new

    return handle


def make_relay(engine: AsyncEngine, mode: Any, slot: str, handler: Any) -> LogRelay:
    publisher = FunctionPublisher(handler, delivery_timeout=4.0)
    return LogRelay(engine, publisher, outbox=Outbox(mode=mode), slot=slot, lease=5.0)


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(url: str, mode: str, slot: str) -> None:
    LogStatements.move_on = die  # type: ignore[assignment, method-assign]
    engine = create_async_engine(url)
    await make_relay(engine, mode, slot, make_handler(engine, [])).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

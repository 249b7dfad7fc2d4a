"""A process that runs a LogRelay again and again, each time until it is killed at another place: URL MODE SLOT FILE.

At each place of the relay's work one process is killed before, and one after it. What is published is a line in FILE.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.outbox import Message, Outbox, Sent
from idempotency.outbox._ledger import Ledger
from idempotency.outbox._log import LogRelay
from idempotency.outbox._log_statements import LogStatements
from idempotency.outbox._slot import Slot

PLACES: list[tuple[Any, str]] = [
    (Slot, "create_publication"),
    (Slot, "create"),
    (Ledger, "begin"),
    (Slot, "begin_peek"),
    (LogStatements, "move_on"),
    (Slot, "advance"),
]
DEATHS: list[tuple[tuple[Any, str, bool] | None, int]] = [
    *(((owner, name, after), -1) for owner, name in PLACES for after in (False, True)),
    *((None, messages) for messages in (0, 1, 7)),
]
"""The method before or after whose call a process is killed, or after how many messages."""

FIRST_WITH_SLOT = 6
KEYS, EACH = 3, 4


class LineForEach:
    """A publisher into a file. It is killed after some messages where ``kill_after`` says so."""

    delivery_timeout = 1.0

    def __init__(self, path: str, kill_after: int) -> None:
        self._path = path
        self._until = kill_after

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Sent]:
        with open(self._path, "a") as file:
            for message in batch:
                if self._until == 0:
                    file.flush()
                    die()
                self._until -= 1
                file.write(f"{message.aggregate_id} {(message.payload or b'').decode()}\n")
        return [Sent()] * len(batch)

    async def aclose(self) -> None:
        """Close nothing."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(owner: Any, name: str, after: bool) -> None:
    """Let this process be killed before or after the first call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def killed(*args: Any, **options: Any) -> Any:
        if after:
            method(*args, **options)
        die()

    setattr(owner, name, killed)


async def emit(url: str, outbox: Outbox, first: int) -> None:
    engine = create_async_engine(url)
    for number in range(first, first + EACH):
        async with engine.begin() as connection:
            for key in range(KEYS):
                await outbox.emit(connection, aggregate_type="order", aggregate_id=key, type="Placed", payload=number)
    await engine.dispose()


async def relay(url: str, outbox: Outbox, slot: str, path: str, kill_after: int) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        # As if its lease were over.
        await connection.execute(text("UPDATE outbox_lease SET until_ms = 0"))
    await LogRelay(engine, LineForEach(path, kill_after), outbox=outbox, slot=slot, batch=5).drain()
    await engine.dispose()


def in_child(work: Callable[[], Any]) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            asyncio.run(work())
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(url: str, mode: Any, slot: str, path: str) -> None:
    outbox = Outbox(mode=mode, notify=False)

    def run(number: int, place: tuple[Any, str, bool] | None, kill_after: int) -> int:
        # In message mode nothing can be emitted before the slot is there.
        if mode == "table" or number >= FIRST_WITH_SLOT:
            assert in_child(lambda: emit(url, outbox, number * EACH)) == 0

        def killed() -> Any:
            if place is not None:
                arm(*place)
            return relay(url, outbox, slot, path, kill_after)

        return in_child(killed)

    for number, (place, kill_after) in enumerate(DEATHS):
        print(number, run(number, place, kill_after), flush=True)
    assert in_child(lambda: relay(url, outbox, slot, path, -1)) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A sweeper in a process of its own."""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import suppress

from saga_stage import Place, Stage


def sweep(place: Place) -> None:
    """Run what is due until SIGTERM, which lets it end what it runs, or cancels that, by chance."""
    asyncio.run(_sweep(place))


async def _sweep(place: Place) -> None:
    stage = Stage(place)
    running = asyncio.create_task(stage.sweeper.run())
    stops: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()

    def end() -> None:
        if random.choice((True, False)):
            running.cancel()
        else:
            stops.append(loop.create_task(stage.sweeper.stop()))

    loop.add_signal_handler(signal.SIGTERM, end)
    with suppress(asyncio.CancelledError):
        await running
    await stage.close()

"""A process that handles the messages of a service, and works beside that, until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from idempotency.outbox import PollingRelay
from idempotency.outbox.publishers import open_publisher
from shop import broker
from shop.database import Service
from shop.settings import LEASE


async def serve(service: Service, handler: Any) -> None:
    """Run the consumer of a service, and beside it the relay that publishes what it emits."""
    publisher = open_publisher(broker.PUBLISH)
    await serve_beside(PollingRelay(service.engine, publisher, outbox=service.outbox, lease=LEASE), service, handler)
    await publisher.aclose()


async def serve_beside(worker: Any, service: Service, handler: Any) -> None:
    """Run the consumer of a service beside a relay or a sweeper. When one fails, the process ends."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as group:
        group.create_task(worker.run())
        await broker.consume(service.name, handler, stop)
        await worker.stop()
    await service.engine.dispose()

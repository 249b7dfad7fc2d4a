"""The process of a service: it handles its messages, and publishes what it tells, until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from idempotency.outbox import PollingRelay
from idempotency.outbox.publishers import open_publisher
from shop import broker
from shop.database import Service


async def serve(service: Service, handler: Any) -> None:
    """Run the consumer of a service, and the relay of its outbox beside it."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    publisher = open_publisher(broker.PUBLISH)
    relay = PollingRelay(service.engine, publisher, outbox=service.outbox, lease=4.0)
    relaying = asyncio.create_task(relay.run())
    await broker.consume(service.name, handler, stop)
    await relay.stop()
    await relaying
    await publisher.aclose()
    await service.engine.dispose()

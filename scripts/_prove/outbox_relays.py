"""A relay in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

from outbox_brokers import Broker
from sqlalchemy.ext.asyncio import create_async_engine

from idempotency.outbox import LogRelay, Outbox, PollingRelay

LEASE = 3.0
TIMEOUT = 2.0

# What is proved here is counted, not read in a log.
logging.getLogger("idempotency").setLevel(logging.ERROR)
"""Seconds after which a batch is given up."""

PAUSE = 1.5 * LEASE


def relay(url: str, name: str, by_log: bool, broker: Broker) -> None:
    """Relay until SIGTERM, which stops it in order."""
    asyncio.run(_relay(url, name, by_log, broker))


async def _relay(url: str, name: str, by_log: bool, broker: Broker) -> None:
    publisher, engine = broker.publisher(TIMEOUT), create_async_engine(url)
    options: dict[str, Any] = {"outbox": Outbox(name), "lease": LEASE}
    kind = LogRelay if by_log else PollingRelay
    running = kind(engine, publisher, **options)
    loop = asyncio.get_running_loop()
    stops: list[asyncio.Task[None]] = []
    loop.add_signal_handler(signal.SIGTERM, lambda: stops.append(loop.create_task(running.stop())))
    await running.run()
    await publisher.aclose()
    await engine.dispose()

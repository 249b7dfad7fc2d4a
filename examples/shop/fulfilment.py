"""The process that goes on with the sagas: it hears the answers of the services, and runs what can go on.

    python -m shop.fulfilment

The sweeper also finds the sagas whose process was killed, when their lease is over.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import Any

from idempotency import Policy, idempotent_consumer
from idempotency.saga import SagaError, Sweeper
from shop import broker
from shop.saga import fulfil, service


@idempotent_consumer(service.store, consumer="orders", policy=Policy(lease=3.0), max_attempts=20)
async def on_answer(message: Any) -> None:
    """Give the answer of a service to the saga that waits for it. The first answer of a name counts."""
    type, order, more = broker.read(message)
    # Killed between the signal and its record, it comes here again: then the saga may have ended.
    with suppress(SagaError):
        await fulfil.signal(order.id, "stock" if type.startswith("Stock") else "coupon", more["refused"])


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    sweeper = Sweeper(service.store, [fulfil], poll=0.2)
    sweeping = asyncio.create_task(sweeper.run())
    await broker.consume(service.name, on_answer, stop)
    await sweeper.stop()
    await sweeping
    await service.engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())

"""The process that goes on with the sagas: it handles the answers of the services, and runs the sagas that can go on.

    python -m shop.fulfilment

Its sweeper also finds the sagas whose process was killed, when their lease is over.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from idempotency import Policy, idempotent_consumer
from idempotency.saga import SagaEndedError, Sweeper
from shop.broker import read
from shop.saga import fulfil, service
from shop.serving import serve_beside
from shop.settings import LEASE


@idempotent_consumer(service.store, consumer="orders", policy=Policy(lease=LEASE), max_attempts=20)
async def on_answer(message: Any) -> None:
    """Give the answer of a service to the saga of the order, which waits for it as a signal."""
    type, order, more = read(message)
    service_name = "inventory" if type.startswith("Stock") else "marketing"
    # A process that is killed after the signal and before the record of the message gives the signal once more.
    # The saga has its first signal then, and may have ended.
    with suppress(SagaEndedError):
        await fulfil.signal(order.id, service_name, more["refused"])


if __name__ == "__main__":
    asyncio.run(serve_beside(Sweeper(service.store, [fulfil], poll=0.2), service, on_answer))

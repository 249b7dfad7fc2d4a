"""The consumer program of both dramatiq rigs: ``python -m dramatiq tests.adapters.rigs.dramatiq_app``."""

from __future__ import annotations

import os
import signal
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from idempotency.adapters.dramatiq import idempotent_actor
from idempotency.testing._points import CRASH_AT, arm
from tests.adapters.rigs.orders import Work

if label := os.environ.get(CRASH_AT):
    # The worker is a child of the process that was started: the machine goes down, not only the child.
    arm(label, announce=lambda: os.killpg(0, signal.SIGKILL))

work = Work()
store, options = work.open(asynchronous=False)
broker: dramatiq.Broker
if work.setting.extra["broker"] == "rabbitmq":
    broker = RabbitmqBroker(url=work.setting.extra["url"], confirm_delivery=True)
else:
    broker = RedisBroker(
        url=work.setting.extra["url"],
        namespace=work.setting.place,
        heartbeat_timeout=3000,
        maintenance_chance=1_000_000,
    )
dramatiq.set_broker(broker)


@dramatiq.actor(
    queue_name=work.setting.place,
    actor_class=idempotent_actor(store, consumer="billing", pause=0.1, **options),
    min_backoff=50,
    max_backoff=100,
)
def bill(order: dict[str, Any]) -> dict[str, Any]:
    return work.handle_sync(order)

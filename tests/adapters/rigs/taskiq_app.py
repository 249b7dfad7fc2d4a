"""The consumer program of the taskiq rigs: ``python -m taskiq worker tests.adapters.rigs.taskiq_app:broker``."""

from __future__ import annotations

import os
import signal
from typing import Any

from aio_pika import Message
from nats.js.api import ConsumerConfig
from taskiq import AsyncBroker, TaskiqMessage
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue
from taskiq_nats import PullBasedJetStreamBroker

from idempotency.adapters.taskiq import idempotent_task
from idempotency.testing._points import CRASH_AT, arm
from tests.adapters.rigs.orders import Work
from tests.adapters.rigs.taskiq_nats_rig import ACK_WAIT

if label := os.environ.get(CRASH_AT):
    # The worker is a child of the process that was started, which would start another.
    arm(label, announce=lambda: os.killpg(0, signal.SIGKILL))

work = Work()
store, options = work.open(asynchronous=True)
place, url = work.setting.place, work.setting.extra["url"]


def make_broker() -> AsyncBroker:
    if work.setting.extra["broker"] == "nats":
        config = ConsumerConfig(durable_name=place, ack_wait=ACK_WAIT)
        return PullBasedJetStreamBroker(
            url, subject=place, stream_name=place, durable=place, consumer_config=config, pull_consume_timeout=1
        )
    return AioPikaBroker(
        url,
        exchange=Exchange(name=place),
        task_queues=[Queue(name=place)],
        dead_letter_queue=Queue(name=f"{place}_dead"),
    )


broker = make_broker()


async def dead_letter(message: TaskiqMessage, reason: str) -> None:
    body = broker.formatter.dumps(message).message
    if isinstance(broker, PullBasedJetStreamBroker):
        await broker.js.publish(f"{place}_dead", body, headers={"reason": reason})
    elif isinstance(broker, AioPikaBroker) and broker.write_channel is not None:
        dead = Message(body, headers={"reason": reason}, delivery_mode=2)
        await broker.write_channel.default_exchange.publish(dead, f"{place}_dead")


@broker.task("bill")
@idempotent_task(store, consumer="billing", dead_letter=dead_letter, pause=0.1, **options)
async def bill(order: dict[str, Any]) -> dict[str, Any]:
    return await work.handle(order)

"""The topic and the consumer process of the confluent-kafka adapter."""

from __future__ import annotations

import json
import signal
import threading
from typing import Any

from confluent_kafka import Message, Producer

from idempotency import idempotent_consumer
from idempotency.adapters.confluent_kafka import consume
from tests.adapters.rigs.kafka_cluster import SESSION_TIMEOUT_MS, KafkaRig
from tests.adapters.rigs.orders import Work


class Rig(KafkaRig):
    """The topic, and this module as its consumer."""

    def command(self) -> list[str]:
        return ["-m", __name__]


def main() -> None:
    work = Work()
    store, options = work.open(asynchronous=False)
    place, settings = work.setting.place, {"bootstrap.servers": work.setting.extra["servers"]}
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    @idempotent_consumer(store, consumer="billing", **options)
    def on_order(message: Message) -> dict[str, Any]:
        return work.handle_sync(json.loads(message.value() or b""))

    config = {
        "group.id": place,
        "session.timeout.ms": SESSION_TIMEOUT_MS,
        "heartbeat.interval.ms": SESSION_TIMEOUT_MS // 10,
        **settings,
    }
    producer = Producer(settings)
    consume(config, [place], on_order, producer=producer, dead_letter=f"{place}_dead", pause=0.1, stop=stop)


if __name__ == "__main__":
    main()

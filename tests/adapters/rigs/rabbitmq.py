"""A queue of RabbitMQ with a dead-letter queue beside it."""

from __future__ import annotations

import json
import os
from typing import Any

import pika

URL = os.environ.get("IDEMPOTENCY_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672/")


class RabbitRig:
    """A durable queue; messages carry the AMQP property ``message_id``."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._connection = pika.BlockingConnection(pika.URLParameters(URL))
        self._channel = self._connection.channel()
        self._declare()

    def _declare(self) -> None:
        self._channel.queue_declare(f"{self.place}_dead", durable=True)
        self._channel.queue_declare(
            self.place,
            durable=True,
            arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{self.place}_dead"},
        )

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        properties = pika.BasicProperties(message_id=order["key"], delivery_mode=2, content_type="application/json")
        self._channel.basic_publish("", self.place, json.dumps(order).encode(), properties)

    def unsettled(self) -> int:
        return self._count(self.place)

    def dead(self) -> int:
        return self._count(f"{self.place}_dead")

    def _count(self, queue: str) -> int:
        count: int = self._channel.queue_declare(queue, passive=True).method.message_count
        return count

    def environment(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        for queue in (self.place, f"{self.place}_dead"):
            self._channel.queue_delete(queue)
        self._connection.close()

"""The queue of the taskiq adapter on RabbitMQ, and its worker."""

from __future__ import annotations

import json
from typing import Any

import pika

from tests.adapters.rigs.rabbitmq import URL, RabbitRig

COMMAND = ["-m", "taskiq", "worker", "tests.adapters.rigs.taskiq_app:broker", "--workers", "1"]


def message(order: dict[str, Any]) -> dict[str, Any]:
    """Make the message that ``bill.kiq(order)`` would, under a ``task_id`` of our own."""
    return {"task_id": order["key"], "task_name": "bill", "labels": {}, "args": [order], "kwargs": {}}


class Rig(RabbitRig):
    """The exchange and the queues that taskiq-aio-pika declares."""

    def _declare(self) -> None:
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{self.place}_dead"}
        quorum = {"x-queue-type": "quorum"}
        self._channel.exchange_declare(self.place, "topic", durable=True)
        self._channel.queue_declare(f"{self.place}_dead", durable=True, arguments=quorum)
        self._channel.queue_declare(self.place, durable=True, arguments={**dead, **quorum})
        self._channel.queue_bind(self.place, self.place, self.place)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        body = json.dumps(message(order)).encode()
        self._channel.basic_publish(self.place, self.place, body, pika.BasicProperties(delivery_mode=2))

    def command(self) -> list[str]:
        return COMMAND

    def environment(self) -> dict[str, Any]:
        return {"broker": "rabbitmq", "url": URL}

    def close(self) -> None:
        self._channel.exchange_delete(self.place)
        super().close()

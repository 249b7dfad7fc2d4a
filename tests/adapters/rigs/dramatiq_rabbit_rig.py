"""The queue of the dramatiq adapter on RabbitMQ, and its worker."""

from __future__ import annotations

import json
import time
from typing import Any

import pika

from tests.adapters.rigs.rabbitmq import URL, RabbitRig

COMMAND = ["-m", "dramatiq", "tests.adapters.rigs.dramatiq_app", "--processes", "1", "--threads", "4"]


def message(place: str, order: dict[str, Any]) -> dict[str, Any]:
    """Make the message that ``bill.send(order)`` would, under a ``message_id`` of our own."""
    return {
        "queue_name": place,
        "actor_name": "bill",
        "args": [order],
        "kwargs": {},
        "options": {},
        "message_id": order["key"],
        "message_timestamp": int(time.time() * 1000),
    }


class Rig(RabbitRig):
    """The three queues that dramatiq makes of one: messages, delayed messages ``.DQ`` and dead letters ``.XQ``."""

    def _declare(self) -> None:
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{self.place}.XQ"}
        self._channel.queue_declare(self.place, durable=True, arguments=dead)
        self._channel.queue_declare(f"{self.place}.DQ", durable=True, arguments=dead)
        self._channel.queue_declare(f"{self.place}.XQ", durable=True, arguments={"x-message-ttl": 86400000 * 7})

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        body = json.dumps(message(self.place, order)).encode()
        self._channel.basic_publish("", self.place, body, pika.BasicProperties(delivery_mode=2))

    def unsettled(self) -> int:
        return self._count(self.place) + self._count(f"{self.place}.DQ")

    def dead(self) -> int:
        return self._count(f"{self.place}.XQ")

    def command(self) -> list[str]:
        return COMMAND

    def environment(self) -> dict[str, Any]:
        return {"broker": "rabbitmq", "url": URL}

    def close(self) -> None:
        for suffix in ("", ".DQ", ".XQ"):
            self._channel.queue_delete(self.place + suffix)
        self._connection.close()

"""The queue of the Celery adapter on RabbitMQ, and its worker, which forks."""

from __future__ import annotations

from typing import Any

from tests.adapters.rigs.celery_queue import PREFORK, application, worker
from tests.adapters.rigs.rabbitmq import URL, RabbitRig


class Rig(RabbitRig):
    """A queue with its dead-letter queue; messages are tasks."""

    pool = PREFORK

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.app = application(place, URL)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        with self.app.connection_for_write() as connection:
            self.app.send_task("bill", [order], task_id=order["key"], connection=connection)

    def command(self) -> list[str]:
        return worker(self.pool)

    def environment(self) -> dict[str, Any]:
        return {"url": URL, "dead_letter": None}

    def close(self) -> None:
        for suffix in ("", "_dead", "_events", "_control.pidbox"):
            self._channel.exchange_delete(self.place + suffix)
        super().close()

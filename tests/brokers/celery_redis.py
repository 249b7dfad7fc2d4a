"""The queue of the Celery adapter on Redis, and its worker, which is one process."""

from __future__ import annotations

from typing import Any

import redis
from servers import NO_REDIS, forget_redis_keys, local_redis, missing

from brokers.celery_queue import SOLO, application, worker


class Rig:
    """A queue, and another for dead letters, under a prefix."""

    pool = SOLO

    def __init__(self, place: str) -> None:
        self.place = place
        url = local_redis()
        if url is None:
            missing(NO_REDIS)
        self._url = url
        self._redis = redis.Redis.from_url(url)
        self.app = application(place, url)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        with self.app.connection_for_write() as connection:
            self.app.send_task("bill", [order], task_id=order["key"], connection=connection)

    def unsettled(self) -> int:
        return self._redis.llen(f"{self.place}:{self.place}") + self._redis.hlen(f"{self.place}:unacked")

    def dead(self) -> int:
        count: int = self._redis.llen(f"{self.place}:{self.place}_dead")
        return count

    def command(self) -> list[str]:
        return worker(self.pool)

    def environment(self) -> dict[str, Any]:
        return {"url": self._url, "dead_letter": f"{self.place}_dead"}

    def close(self) -> None:
        self._redis.close()
        forget_redis_keys(self._url, f"{self.place}:")

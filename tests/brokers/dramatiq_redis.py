"""The queue of the dramatiq adapter on Redis, and its worker."""

from __future__ import annotations

from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from servers import NO_REDIS, forget_redis_keys, local_redis, missing

from brokers.dramatiq_rabbit import COMMAND, message


class Rig:
    """The queue ``place`` in the name space ``place``."""

    def __init__(self, place: str) -> None:
        self.place = place
        url = local_redis()
        if url is None:
            missing(NO_REDIS)
        self._url = url
        self._redis = redis.Redis.from_url(url)
        self._broker = RedisBroker(client=self._redis, namespace=place, middleware=[])

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        self._broker.enqueue(dramatiq.Message(**message(self.place, order)))

    def unsettled(self) -> int:
        return sum(self._redis.hlen(f"{self.place}:{self.place}{suffix}.msgs") for suffix in ("", ".DQ"))

    def dead(self) -> int:
        count: int = self._redis.zcard(f"{self.place}:{self.place}.XQ")
        return count

    def command(self) -> list[str]:
        return COMMAND

    def environment(self) -> dict[str, Any]:
        return {"broker": "redis", "url": self._url}

    def close(self) -> None:
        self._redis.close()
        forget_redis_keys(self._url, f"{self.place}:")

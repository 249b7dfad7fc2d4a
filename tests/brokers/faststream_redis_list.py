"""The list and the consumer process of the FastStream adapter on Redis."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import redis
from faststream.redis import RedisBroker
from servers import NO_REDIS, forget_redis_keys, local_redis, missing

from brokers.contract import POINTS
from brokers.faststream_app import serve
from brokers.kit import Work
from idempotency.adapters.faststream import IdempotencyMiddleware

EXCUSED = {
    f"killed {point}": "a message that was taken from a Redis list is lost with its consumer" for point in POINTS
}


class Rig:
    """The list ``<place>:orders``, and ``<place>:dead`` for dead letters; messages carry the header ``id``."""

    def __init__(self, place: str) -> None:
        url = local_redis()
        if url is None:
            missing(NO_REDIS)
        self.place = place
        self._url = url
        self._redis = redis.Redis.from_url(url, decode_responses=True)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        headers = {"id": order["key"], "content-type": "application/json"}
        self._redis.rpush(f"{self.place}:orders", json.dumps({"data": json.dumps(order), "headers": headers}))

    def unsettled(self) -> int:
        return int(self._redis.llen(f"{self.place}:orders"))

    def dead(self) -> int:
        return int(self._redis.llen(f"{self.place}:dead"))

    def command(self) -> list[str]:
        return ["-m", __name__]

    def environment(self) -> dict[str, Any]:
        return {"url": self._url}

    def close(self) -> None:
        self._redis.close()
        forget_redis_keys(self._url, self.place)


async def main() -> None:
    work = Work()
    store, options = work.open(asynchronous=True)
    place = work.setting.place
    idempotency = IdempotencyMiddleware(store, consumer="billing", dead_letter=f"{place}:dead", pause=0.1, **options)
    broker = RedisBroker(work.setting.extra["url"], middlewares=[idempotency], logger=None)

    @broker.subscriber(list=f"{place}:orders")
    async def on_order(order: dict[str, Any]) -> dict[str, Any]:
        return await work.handle(order)

    await serve(broker)


if __name__ == "__main__":
    asyncio.run(main())

"""The stream and the consumer process of the FastStream adapter on Redis."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import redis
from faststream.redis import RedisBroker, StreamSub
from servers import NO_REDIS, forget_redis_keys, local_redis, missing

from brokers.faststream_app import serve
from brokers.kit import Work
from idempotency.adapters.faststream import IdempotencyMiddleware

GROUP = "billing"
IDLE_MS = 300


class Rig:
    """The stream ``<place>:orders`` with a group, and ``<place>:dead`` for dead letters; messages carry a header."""

    def __init__(self, place: str) -> None:
        url = local_redis()
        if url is None:
            missing(NO_REDIS)
        self.place = place
        self._url = url
        self._redis = redis.Redis.from_url(url, decode_responses=True)
        self._stream = f"{place}:orders"
        self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        headers = {"id": order["key"], "content-type": "application/json"}
        self._redis.xadd(self._stream, {"__data__": json.dumps({"data": json.dumps(order), "headers": headers})})

    def unsettled(self) -> int:
        group = self._redis.xinfo_groups(self._stream)[0]
        waiting = self._redis.xrange(self._stream, min=f"({group['last-delivered-id']}")
        return int(group["pending"]) + len(waiting)

    def dead(self) -> int:
        return int(self._redis.xlen(f"{self.place}:dead"))

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
    stream, consumer = f"{place}:orders", f"worker-{os.getpid()}"

    # The one reads new messages, the other claims those that were not acknowledged.
    @broker.subscriber(stream=StreamSub(stream, group=GROUP, consumer=consumer, polling_interval=50))
    @broker.subscriber(
        stream=StreamSub(stream, group=GROUP, consumer=consumer, polling_interval=50, min_idle_time=IDLE_MS)
    )
    async def on_order(order: dict[str, Any]) -> dict[str, Any]:
        return await work.handle(order)

    await serve(broker)


if __name__ == "__main__":
    asyncio.run(main())

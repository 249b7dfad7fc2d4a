"""Workers that are asked to end while the store is away, and a record is still to be written."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import redis
from servers import Proxy, missing, with_port

from brokers.adapters import missing_broker
from brokers.contract import Places

WORKERS = ["celery_rabbit", "dramatiq_rabbit", "taskiq_rabbit", "faststream_rabbit", "aio_pika", "nats_py"]
AWAY = 3.0
"""Seconds for which the store stays away: a worker with nothing to wait for ends sooner."""


@pytest.mark.parametrize("adapter", WORKERS)
def test_a_worker_that_is_asked_to_end_writes_its_record(adapter: str, postgres_url: str, redis_url: str) -> None:
    """The message was handled and is acknowledged; the worker ends when that is recorded."""
    if reason := missing_broker(adapter):
        missing(reason)
    with (
        Proxy(urlsplit(redis_url).port or 6379) as proxy,
        Places(postgres_url, redis_url).case(adapter, "leased") as case,
    ):
        case.setting = replace(
            case.setting, redis=with_port(redis_url, proxy.port), extra={**case.setting.extra, "lease": 20.0}
        )
        case.publish("order-1", "wait")
        with case.worker() as worker:
            case.heard_of("started", "order-1")
            proxy.pause()
            case.ledger.note("open", "order-1")
            case.heard("unrecorded")
            worker.ask_to_end()
            worker.ends_within(AWAY)
            proxy.cut()
            proxy.resume()
            assert worker.ends_within(20.0)
        with redis.Redis.from_url(redis_url) as client:
            states = {client.hget(key, "s") for key in client.scan_iter(match=f"{case.setting.place}*")}
    # Beside it there may be a record that counts.
    assert b"2" in states

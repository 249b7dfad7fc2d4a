"""Every adapter, and the broker it needs."""

from __future__ import annotations

from functools import cache
from urllib.parse import urlsplit

from tests.adapters.rigs import rabbitmq
from tests.kit import servers

ADAPTERS = {
    "celery_rabbit": "rabbitmq",
    "celery_redis": "redis",
    "sqs": "sqs",
    "aio_pika": "rabbitmq",
    "confluent_kafka": "kafka",
    "aiokafka": "kafka",
    "nats_py": "nats",
    "dramatiq_rabbit": "rabbitmq",
    "faststream_rabbit": "rabbitmq",
    "faststream_nats": "nats",
    "faststream_redis": "redis",
    "faststream_redis_list": "redis",
    "faststream_kafka": "kafka",
    "faststream_confluent": "kafka",
    "dramatiq_redis": "redis",
    "taskiq_rabbit": "rabbitmq",
    "taskiq_nats": "nats",
}
"""The module of the rig, and its broker."""


@cache
def missing_broker(adapter: str) -> str:
    """Say what is missing for the tests of an adapter, if anything; NATS, Kafka and SQS come with wheels."""
    match ADAPTERS[adapter]:
        case "redis" if servers.local_redis() is None:
            return servers.NO_REDIS
        case "rabbitmq":
            parts = urlsplit(rabbitmq.URL)
            if not servers.listening(parts.port or 5672, parts.hostname or ""):
                return "no RabbitMQ listens on port 5672 and IDEMPOTENCY_TEST_RABBITMQ is not set"
    return ""

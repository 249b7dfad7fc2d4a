"""The brokers that a URL can name: their modules, what to install for them, and what they carry.

Nothing here imports a client: the limits of a broker are asked where messages are emitted, which needs no client.
"""

from __future__ import annotations

from dataclasses import dataclass

from idempotency._outbox.limits import Limits
from idempotency.errors import ConfigurationError

RABBITMQ = Limits(most_bytes=16 << 20, tombstones=False)
"""``max_message_size`` of RabbitMQ 4; RabbitMQ 3 takes 128 MiB by default."""
NATS = Limits(most_bytes=1 << 20, tombstones=False)
"""``max_payload``, which counts the headers."""
REDIS = Limits(most_bytes=512 << 20, tombstones=False)
"""``proto-max-bulk-len``."""
FUNCTION = Limits(most_bytes=1 << 30)
"""What a column of PostgreSQL holds: nothing is sent."""
KAFKA = Limits()
"""``max.request.size`` of aiokafka and ``message.max.bytes`` of librdkafka are 1 MB, with what they add."""
SQS = Limits(most_bytes=1 << 20, most_headers=10, tombstones=False, text_only=True)
"""1 MiB since August 2025, and ten attributes."""
CELERY = Limits(text_only=True)
WEBHOOK = Limits(tombstones=False)


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the publisher of a broker is, and what it needs.

    ``module``: in this package, with ``from_url``. ``client``: the module of the client. ``extra``: of our
    distribution, which installs it.
    """

    module: str
    client: str
    extra: str
    limits: Limits


_AIO_PIKA = Broker("aio_pika", "aio_pika", "aio-pika", RABBITMQ)
_NATS = Broker("nats", "nats", "nats", NATS)
_REDIS = Broker("redis", "redis", "redis", REDIS)
_AIOKAFKA = Broker("aiokafka", "aiokafka", "aiokafka", KAFKA)
_CELERY = Broker("celery", "celery", "celery", CELERY)
_WEBHOOK = Broker("webhooks", "httpx", "webhooks", WEBHOOK)

BROKERS = {
    "amqp": _AIO_PIKA,
    "amqps": _AIO_PIKA,
    "nats": _NATS,
    "tls": _NATS,
    "redis": _REDIS,
    "rediss": _REDIS,
    "unix": _REDIS,
    "kafka": _AIOKAFKA,
    "kafka+aiokafka": _AIOKAFKA,
    "kafka+confluent": Broker("confluent_kafka", "confluent_kafka", "confluent-kafka", KAFKA),
    "sqs": Broker("sqs", "boto3", "sqs", SQS),
    "celery+": _CELERY,
    "http": _WEBHOOK,
    "https": _WEBHOOK,
}
"""By scheme; one that ends in ``+`` is followed by the scheme of another system."""


def broker_of(url: str) -> Broker | None:
    """Return the broker that a URL names; None for ``module:name``. ConfigurationError for another scheme."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return None
    first, plus, _ = scheme.lower().partition("+")
    found = BROKERS.get(scheme.lower()) or BROKERS.get(first + plus)
    if found is None:
        known = ", ".join(f"{each}://" if not each.endswith("+") else f"{each}…://" for each in BROKERS)
        raise ConfigurationError(f"no publisher is known for {scheme}://; a URL starts with {known}, or is module:name")
    return found

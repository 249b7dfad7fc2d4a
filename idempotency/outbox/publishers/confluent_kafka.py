"""Kafka through confluent-kafka.

    relay = PollingRelay(engine, ConfluentPublisher({"bootstrap.servers": "localhost:9092"}), outbox=outbox)

The record's key is the aggregate's id, so that an aggregate has one partition, and the headers are ``id``,
``eventType`` and the message's own. A message without a payload is a tombstone. It is confirmed by its delivery report,
when all replicas in sync have it (``acks=all``).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Record

from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Publisher, RetryLater, Sent
from idempotency.outbox.publishers._cloudevents import DEFAULT_SOURCE, Format
from idempotency.outbox.publishers._kafka import (
    CLIENT_OPTIONS,
    LONGEST_FOR_TOPIC,
    OPTIONS,
    Headers,
    KafkaPublisher,
    outcome_of,
    servers_of,
)
from idempotency.outbox.publishers._shared import InUse
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC, Topic

__all__ = ["CLIENT_OPTIONS", "OPTIONS", "ConfluentPublisher", "from_url"]

_logger = logging.getLogger("idempotency")

_POLL = 0.1
"""Seconds for which the thread waits for reports; as long may the end take."""

_REQUIRED = {"acks": ("all", "-1"), "request.required.acks": ("all", "-1"), "enable.idempotence": ("true", "t", "1")}
_MEANINGLESS = {
    "delivery.report.only.error": "a message that is stored would not be reported",
    "transactional.id": "the producer would send in transactions only",
    "message.timeout.ms": "give delivery_timeout=",
    "delivery.timeout.ms": "give delivery_timeout=",
    "default.topic.config": "give its settings themselves",
}


class ConfluentPublisher(KafkaPublisher["_Polled"]):
    """Publish messages to Kafka.

    ``config``: of the :class:`confluent_kafka.Producer` that is made here. ``topic``: default
    ``outbox.event.{aggregate_type}``. ``delivery_timeout``: seconds after which a batch is given up, default 30.
    ``format``: default ``"plain"``; ``"cloudevents"`` adds the attributes of CloudEvents as headers ``ce_...``, with
    ``source``.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        topic: Topic = DEFAULT_TOPIC,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
    ) -> None:
        most = config.get("message.max.bytes")
        super().__init__(
            topic=topic,
            delivery_timeout=delivery_timeout,
            format=format,
            source=source,
            most_bytes=None if most is None else int(most),
        )
        _check(config)
        self._config = {
            # A chain of messages would wait for it at each of them.
            "linger.ms": 0,
            # librdkafka counts what it adds itself; with its default a message could be too large that others take.
            "message.max.bytes": 1_048_576,
            "topic.metadata.propagation.max.ms": round(LONGEST_FOR_TOPIC * 1000),
            **config,
            "enable.idempotence": True,
            "message.timeout.ms": round(self.delivery_timeout * 1000),
        }

    async def _open(self) -> _Polled:
        return _Polled(self._config)

    async def _close(self, client: _Polled, /) -> None:
        await asyncio.to_thread(client.close)

    async def _deliver(self, used: InUse[_Polled], topic: str, message: Message, headers: Headers) -> Outcome:
        try:
            error = await used.client.produce(topic, message, headers)
        except BufferError:
            return RetryLater("the queue of the producer is full")
        except KafkaException as raised:
            error = raised.args[0]
        if error is None:
            return Sent()
        used.failed = used.failed or used.client.broken or error.code() == KafkaError._FATAL
        return outcome_of(error.code(), error.str())


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query."""
    return ConfluentPublisher({"bootstrap.servers": servers_of(url)}, **options)


class _Polled:
    """A producer, and the thread that polls it for its delivery reports.

    ``broken``: the producer had a fatal error, and sends nothing any more.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.broken = False
        self._producer = Producer(config)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="idempotency-kafka-reports", daemon=True)
        self._thread.start()

    async def produce(self, topic: str, message: Message, headers: Headers) -> KafkaError | None:
        """Send a message, and return the error of its report, None if it is stored."""
        loop = asyncio.get_running_loop()
        reported: asyncio.Future[KafkaError | None] = loop.create_future()

        def answer(error: KafkaError | None) -> None:
            # The batch may have been given up.
            if not reported.done():
                reported.set_result(error)

        def report(error: KafkaError | None, _: Record) -> None:
            # A loop that is closed waits for nothing.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(answer, error)

        self._producer.produce(
            topic, message.payload, message.aggregate_id.encode(), headers=list(headers), on_delivery=report
        )
        return await reported

    def close(self) -> None:
        """End the thread, and drop what is not confirmed."""
        self._ended.set()
        self._thread.join()
        self._producer.purge()
        self._producer.flush(0)

    def _poll(self) -> None:
        while not self._ended.is_set():
            try:
                self._producer.poll(_POLL)
            except KafkaException:
                # It is fatal, and librdkafka has logged it.
                self.broken = True
            except Exception:
                # The reports of other messages are still to come.
                _logger.exception("a callback of the Kafka producer failed")


def _check(config: Mapping[str, Any]) -> None:
    for name, allowed in _REQUIRED.items():
        if name in config and str(config[name]).lower() not in allowed:
            raise ConfigurationError(f"{name} must be {allowed[0]}, not {config[name]!r}: else messages are lost")
    for name, reason in _MEANINGLESS.items():
        if str(config.get(name, "false")).lower() not in ("false", "f", "0"):
            raise ConfigurationError(f"{name} must not be set: {reason}")

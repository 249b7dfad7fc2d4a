"""Kafka through aiokafka.

    relay = PollingRelay(engine, AiokafkaPublisher("localhost:9092"), outbox=outbox)

The record's key is the aggregate's id, so that an aggregate has one partition, and the headers are ``id``,
``eventType`` and the message's own. A message without a payload is a tombstone. It is confirmed when all replicas in
sync have it (``acks="all"``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import BrokerResponseError, KafkaError

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

__all__ = ["CLIENT_OPTIONS", "OPTIONS", "AiokafkaPublisher", "from_url"]

_LONGEST_CLOSE = 1.0


class AiokafkaPublisher(KafkaPublisher[AIOKafkaProducer]):
    """Publish messages to Kafka.

    ``servers_or_producer``: the addresses of brokers, such as ``"a:9092,b:9092"``, with which a producer is made, or a
    producer that is started. ``topic``: default ``outbox.event.{aggregate_type}``.
    ``delivery_timeout``: seconds after which a batch is given up, default 30. ``format``: default ``"plain"``;
    ``"cloudevents"`` adds the attributes of CloudEvents as headers ``ce_...``, with ``source``. Other arguments are
    settings of the producer that is made, such as ``security_protocol``.

    A producer that is passed in has ``enable_idempotence=True``, and neither serializers nor a ``transactional_id``. It
    is not closed here. Prefer addresses: after the broker has refused a message, an idempotent producer of aiokafka
    cannot send to that partition any more. One that was made here is then replaced.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        servers_or_producer: str | AIOKafkaProducer,
        *,
        topic: Topic = DEFAULT_TOPIC,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
        **settings: Any,
    ) -> None:
        super().__init__(
            topic=topic,
            delivery_timeout=delivery_timeout,
            format=format,
            source=source,
            most_bytes=settings.get("max_request_size"),
        )
        self._passed_in: AIOKafkaProducer | None = None
        self._settings: dict[str, Any] = {}
        if isinstance(servers_or_producer, str):
            self._settings = _settings(servers_or_producer, self.delivery_timeout, settings)
        else:
            _check(servers_or_producer, settings)
            self._passed_in = servers_or_producer

    async def _open(self) -> AIOKafkaProducer:
        if self._passed_in is not None:
            return self._passed_in
        producer = AIOKafkaProducer(**self._settings)
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def _close(self, producer: AIOKafkaProducer, /) -> None:
        if producer is self._passed_in:
            return
        # stop() would wait until everything is sent, for as long as the broker is away.
        producer._closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_CLOSE):
                await producer._sender.close()
        # After the sender, which else connects again.
        await producer.client.close()

    async def _deliver(self, used: InUse[AIOKafkaProducer], topic: str, message: Message, headers: Headers) -> Outcome:
        producer, key = used.client, message.aggregate_id.encode()
        try:
            async with asyncio.timeout(LONGEST_FOR_TOPIC):
                await producer.partitions_for(topic)
        except TimeoutError:
            return RetryLater(f"Kafka does not know the topic {topic!r}")
        try:
            await producer.send_and_wait(topic, message.payload, key, headers=headers)
        except KafkaError as error:
            # aiokafka does not take back the sequence number of a message that has failed, so that the broker refuses
            # what comes after it in its partition (aiokafka issue 1017).
            used.failed = True
            code = error.errno if isinstance(error, BrokerResponseError) else 0
            return outcome_of(code, type(error).__name__)
        return Sent()


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query."""
    return AiokafkaPublisher(servers_of(url), **options)


def _settings(servers: str, timeout: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the producer that is made."""
    if settings.get("acks", "all") not in ("all", -1) or settings.get("enable_idempotence", True) is not True:
        raise ConfigurationError("acks must be 'all', and enable_idempotence True: else messages are lost")
    chosen = {"request_timeout_ms": round(timeout * 1000), **settings, "bootstrap_servers": servers.split(",")}
    return {**chosen, "acks": "all", "enable_idempotence": True}


def _check(producer: AIOKafkaProducer, settings: dict[str, Any]) -> None:
    if settings:
        raise ConfigurationError(f"a producer that is passed in has its settings already: {', '.join(settings)}")
    # There is no public way to read these settings.
    transactions = producer._txn_manager
    if producer._sender._acks != -1 or transactions is None:
        raise ConfigurationError("the producer must have enable_idempotence=True, and with it acks='all'")
    if transactions.transactional_id is not None:
        raise ConfigurationError("the producer must not have a transactional_id: it sends in transactions only")
    if producer._key_serializer is not None or producer._value_serializer is not None:
        raise ConfigurationError("the producer must not have serializers: keys and payloads are bytes")

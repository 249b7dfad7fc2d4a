"""What the publishers for both clients of Kafka have in common."""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Mapping
from urllib.parse import urlsplit

from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Refused, RetryLater
from idempotency.outbox.publishers._cloudevents import Format, headers_for
from idempotency.outbox.publishers._shared import NOT_TRIED, Client, InUse, SharedClientPublisher, not_in_time
from idempotency.outbox.publishers._topic import Topic, topic_of

OPTIONS = {"topic": str, "delivery_timeout": float, "format": str, "source": str}
CLIENT_OPTIONS = frozenset[str]()

LONGEST_FOR_TOPIC = 5.0
"""Seconds to wait for a topic that the broker does not know. One that it makes by itself is there after about one."""

_REFUSED = frozenset({10, 17, 18, 44, 87})
"""Error codes of the broker that a repeated message meets again: a record or a batch that is too large, a topic whose
name is not valid, the violation of a policy, and a record that is not valid, such as one without a key.
"""

_OVERHEAD = 10_000
"""Bytes that a client adds to key, value and headers, at most."""

_TOPIC_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")

Headers = list[tuple[str, bytes]]


class KafkaPublisher(SharedClientPublisher[Client]):
    """Publish messages to Kafka through a client.

    One message of a key is in flight at a time. The idempotent producer has an order of its own, but after a message
    that has timed out it still sends the next.
    """

    def __init__(
        self, *, topic: Topic, delivery_timeout: float, format: Format, source: str, most_bytes: int | None
    ) -> None:
        """Make a publisher; ``most_bytes``: of a message, by the client's own setting, None for its default."""
        super().__init__(delivery_timeout)
        self.limits = Limits() if most_bytes is None else Limits(most_bytes=most_bytes - _OVERHEAD)
        self._topic_of = topic_of(topic)
        self._headers_of = headers_for(format, source, "ce_")

    async def _send(self, used: InUse[Client], deadline: float, message: Message) -> Outcome:
        topic = self._topic_of(message)
        reason = self.limits.refusal(message) or _invalid_name(topic)
        if reason is not None:
            return Refused(reason)
        if asyncio.get_running_loop().time() >= deadline:
            return NOT_TRIED
        try:
            async with asyncio.timeout_at(deadline):
                return await self._deliver(used, topic, message, _record_headers(self._headers_of(message)))
        except TimeoutError:
            used.failed = True
            return not_in_time(self.delivery_timeout)

    @abstractmethod
    async def _deliver(self, used: InUse[Client], topic: str, message: Message, headers: Headers) -> Outcome: ...


def servers_of(url: str) -> str:
    """Return the addresses of the brokers of a URL, such as ``kafka://a:9092,b:9092``."""
    parts = urlsplit(url)
    if not parts.netloc or "@" in parts.netloc or parts.path.strip("/"):
        raise ConfigurationError(
            "the URL of Kafka has the addresses of brokers only, kafka://a:9092,b:9092: for other settings of the "
            "client make the publisher in a module, and name it as module:name"
        )
    return parts.netloc


def outcome_of(code: int, reason: str) -> Refused | RetryLater:
    """Return the outcome of a message for which the broker has answered an error code."""
    return Refused(reason) if code in _REFUSED else RetryLater(reason)


def _invalid_name(topic: str) -> str | None:
    """Return why a topic cannot exist, None if it can: the clients would wait for it."""
    return None if _TOPIC_NAME.fullmatch(topic) else f"Kafka has no topics of the name {topic!r}"


def _record_headers(headers: Mapping[str, str]) -> Headers:
    return [(name, value.encode()) for name, value in headers.items()]

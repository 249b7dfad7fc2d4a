"""What the publishers for both clients of Kafka have in common."""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Generic

from idempotency._durations import DAY, positive
from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.outbox.publisher import HELD, Outcome, Refused, RetryLater, in_chains
from idempotency.outbox.publishers._cloudevents import Format, headers_for
from idempotency.outbox.publishers._shared import Client, InUse, SharedClient
from idempotency.outbox.publishers._topic import Topic, topic_of

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


class KafkaPublisher(ABC, Generic[Client]):
    """Publish messages to Kafka through a client."""

    def __init__(
        self, *, topic: Topic, delivery_timeout: float, format: Format, source: str, most_bytes: int | None
    ) -> None:
        """Make a publisher; ``most_bytes``: of a message, by the client's own setting, None for its default."""
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout, DAY)
        self.limits = Limits() if most_bytes is None else Limits(most_bytes=most_bytes - _OVERHEAD)
        self._topic_of = topic_of(topic)
        self._headers_of = headers_for(format, source, "ce_")
        self._shared = SharedClient(self._open, self._close)

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """See :meth:`~idempotency.outbox.Publisher.publish`."""
        deadline = asyncio.get_running_loop().time() + self.delivery_timeout
        async with self._shared.used_until(deadline) as used:
            # One message of a key is in flight at a time. The idempotent producer has an order of its own, but after a
            # message that has timed out it still sends the next.
            return await in_chains(batch, partial(self._send, used, deadline))

    async def aclose(self) -> None:
        """Close the client, if it was made here."""
        await self._shared.aclose()

    async def _send(self, used: InUse[Client], deadline: float, message: Message) -> Outcome:
        topic = self._topic_of(message)
        reason = self.limits.refusal(message) or _invalid_name(topic)
        if reason is not None:
            return Refused(reason)
        if asyncio.get_running_loop().time() >= deadline:
            return HELD
        try:
            async with asyncio.timeout_at(deadline):
                return await self._deliver(used, topic, message, _record_headers(self._headers_of(message)))
        except TimeoutError:
            used.failed = True
            return RetryLater(f"it was not confirmed within {self.delivery_timeout:g} seconds")

    @abstractmethod
    async def _open(self) -> Client: ...

    @abstractmethod
    async def _close(self, client: Client, /) -> None:
        """Close the client without sending what is left: each message is confirmed or given up."""

    @abstractmethod
    async def _deliver(self, used: InUse[Client], topic: str, message: Message, headers: Headers) -> Outcome: ...


def outcome_of(code: int, reason: str) -> Refused | RetryLater:
    """Return the outcome of a message for which the broker has answered an error code."""
    return Refused(reason) if code in _REFUSED else RetryLater(reason)


def _invalid_name(topic: str) -> str | None:
    """Return why a topic cannot exist, None if it can: the clients would wait for it."""
    return None if _TOPIC_NAME.fullmatch(topic) else f"Kafka has no topics of the name {topic!r}"


def _record_headers(headers: Mapping[str, str]) -> Headers:
    return [(name, value.encode()) for name, value in headers.items()]

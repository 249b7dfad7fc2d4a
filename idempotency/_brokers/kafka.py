"""Messages of Kafka, for both clients: what identifies one, the headers of a dead letter, and settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from idempotency._brokers.headers import KEY_HEADERS, REASON, identity_header
from idempotency.errors import ConfigurationError

Headers = list[tuple[str, bytes]]

MOST_WAITING = 2000
"""A partition is paused while more of its messages wait here, and resumed when half of that many wait.

The number is high because a pause is expensive: the client drops what it has fetched ahead, and a resumed partition is
idle for up to a second.
"""


def message_position(topic: str, partition: int, offset: int) -> str:
    """Return the position of a message, such as ``orders:0:42``.

    It is the same at every redelivery. A message that is published again has another position.
    """
    return f"{topic}:{partition}:{offset}"


def identity_of(headers: Iterable[tuple[str, bytes | None]] | None, position: str) -> str:
    """Return the value of the header ``Idempotency-Key`` or ``id``, else the message's position."""
    return identity_header(dict(headers or ())) or position


def dead_letter_headers(headers: Iterable[tuple[str, bytes | None]] | None, position: str, reason: str) -> Headers:
    """Return the headers of a dead letter: those of the message, the reason, and the identity.

    The identity is for the case that the dead letter is sent back to its topic.
    """
    added = {REASON: reason.encode()}
    if identity_header(dict(headers or ())) is None:
        added[KEY_HEADERS[0]] = position.encode()
    return [(name, value) for name, value in original_headers(headers) if name not in added] + list(added.items())


def original_headers(headers: Iterable[tuple[str, bytes | None]] | None) -> Headers:
    """Return the headers of the message alone, for a dead letter that is too large with those that are added."""
    return [(name, value or b"") for name, value in headers or ()]


def check_settings(topics: Collection[str], dead_letter: str, auto_commit: object, reset: object) -> None:
    """Refuse settings that lose messages."""
    # librdkafka treats a topic that begins with ^ as a pattern.
    if dead_letter in topics or any(each[0] == "^" and re.match(each, dead_letter) for each in topics if each):
        raise ConfigurationError(f"the dead letters of {dead_letter!r} cannot go to the same topic")
    if auto_commit:
        raise ConfigurationError("auto-commit must be off: it commits offsets of messages that are still being handled")
    if reset in ("latest", "largest", "end"):
        raise ConfigurationError(
            "the offset reset must be 'earliest': with 'latest' the first messages of a partition are lost, if the "
            "consumer ends before it has committed one of them"
        )

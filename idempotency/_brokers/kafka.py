"""What the adapters of both Kafka clients have in common: how a message is named, and what a dead letter carries."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from idempotency._brokers.headers import KEY_HEADERS, REASON, header
from idempotency.errors import ConfigurationError

Headers = list[tuple[str, bytes]]

MOST_WAITING = 2000
"""Messages of a partition that wait here before it is paused; at half of it, it is resumed.

Not sooner: what a client has fetched beyond is dropped by a pause, and a resumed partition is idle for up to a second.
"""


def place(topic: str, partition: int, offset: int) -> str:
    """Return where a message is, such as ``orders:0:42``: the same at every redelivery, another one if sent again."""
    return f"{topic}:{partition}:{offset}"


def named(headers: Iterable[tuple[str, bytes | None]] | None, place: str) -> str:
    """Return what the header ``Idempotency-Key`` or ``id`` says, else the message's place."""
    return header(dict(headers or ())) or place


def dead_headers(headers: Iterable[tuple[str, bytes | None]] | None, place: str, reason: str) -> Headers:
    """Return the headers of a dead letter: the message's own, why it is one, and its name for when it is sent again."""
    own = {REASON: reason.encode()}
    if header(dict(headers or ())) is None:
        own[KEY_HEADERS[0]] = place.encode()
    return [(name, value) for name, value in own_headers(headers) if name not in own] + list(own.items())


def own_headers(headers: Iterable[tuple[str, bytes | None]] | None) -> Headers:
    """Return the headers of a dead letter that is too large with what is added: the message's own."""
    return [(name, value or b"") for name, value in headers or ()]


def check_settings(topics: Collection[str], dead_letter: str, auto_commit: object, reset: object) -> None:
    """Refuse settings that lose messages."""
    # A topic that begins with ^ is a pattern, for librdkafka.
    if dead_letter in topics or any(each[0] == "^" and re.match(each, dead_letter) for each in topics if each):
        raise ConfigurationError(f"the dead letters of {dead_letter!r} cannot go to the same topic")
    if auto_commit:
        raise ConfigurationError("auto-commit must be off: it commits offsets of messages that are still being handled")
    if reset in ("latest", "largest", "end"):
        raise ConfigurationError(
            "the offset reset must be 'earliest': with 'latest' the first messages of a partition are lost, if the "
            "consumer ends before it has committed one of them"
        )

"""What the adapters of NATS have in common: the name of a message, the headers of a dead letter, filters."""

from __future__ import annotations

from collections.abc import Mapping

from nats.aio.msg import Msg

from idempotency._brokers.headers import KEY_HEADERS, REASON, header

MESSAGE_ID = "Nats-Msg-Id"


def named(headers: Mapping[str, str] | None) -> str | None:
    """Return what the header ``Idempotency-Key`` or ``id`` says, else the message id."""
    return header(headers) or (headers or {}).get(MESSAGE_ID) or None


def dead_headers(message: Msg, key: str | None, reason: str, most: int) -> dict[str, str] | None:
    """Return the headers of a dead letter: the message's own, why it is one, and its ``key`` for when it is sent again.

    ``key``: None where it could not be read. ``most``: how many bytes of headers and data the server accepts. It closes
    the connection of whoever sends more, so that a message that is nearly as large is sent without what is added.
    """
    # Other headers of the server's own tell it what to do with the message, which was for the first publish.
    kept = {name: value for name, value in (message.headers or {}).items() if not name.startswith("Nats-")}
    unnamed = header(kept) is None
    added = {REASON: reason, MESSAGE_ID: dead_id(message)}
    identity = (message.headers or {}).get(MESSAGE_ID)
    fitting = (
        kept | ({KEY_HEADERS[0]: key} if unnamed and key is not None else {}) | added,
        # Shorter than the message's own.
        kept | ({KEY_HEADERS[1]: identity} if unnamed and identity else {}),
        None,
    )
    return next(each for each in fitting if each is None or _size(each) + len(message.data) <= most)


def dead_id(message: Msg) -> str:
    """Return the message id of a dead letter: a termination that is lost makes a second one, which the server drops.

    With the time at which the message was stored: a stream that is made anew has the same places again.
    """
    place = message.metadata
    stored = round(place.timestamp.timestamp() * 1_000_000)
    where = filter(None, [place.domain, place.stream, place.consumer])
    return ":".join(["dead", *where, str(place.sequence.stream), str(stored)])


def matches(pattern: str, subject: str) -> bool:
    """Say whether a filter, such as ``orders.*`` or ``orders.>``, lets a subject through."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">" and len(tokens) >= len(wanted):
        del tokens[len(wanted) - 1 :], wanted[-1]
    return len(wanted) == len(tokens) and all(each in ("*", token) for each, token in zip(wanted, tokens, strict=True))


def _size(headers: Mapping[str, str]) -> int:
    lines = ["NATS/1.0", *(f"{name}: {value}" for name, value in headers.items()), ""]
    return sum(len(line.encode()) + 2 for line in lines)

"""Messages of NATS JetStream: what identifies one, the headers of a dead letter, and subject filters."""

from __future__ import annotations

from collections.abc import Mapping

from nats.aio.msg import Msg

from idempotency._brokers.headers import KEY_HEADERS, REASON, identity_header

MESSAGE_ID = "Nats-Msg-Id"


def identity_of(headers: Mapping[str, str] | None) -> str | None:
    """Return the value of the header ``Idempotency-Key`` or ``id``, else the message id."""
    return identity_header(headers) or (headers or {}).get(MESSAGE_ID) or None


def dead_letter_headers(message: Msg, key: str | None, reason: str, max_payload: int) -> dict[str, str] | None:
    """Return the headers of a dead letter: those of the message, the reason, and its ``key``.

    The key is for the case that the dead letter is sent back to its stream. ``key``: None where it could not be read.
    ``max_payload``: the bytes of headers and data that the server accepts. It closes the connection of a client that
    sends more, so that nothing is added to a message that is nearly as large.
    """
    # The server's own headers are instructions for a publish, and were meant for the first one.
    headers = {name: value for name, value in (message.headers or {}).items() if not name.startswith("Nats-")}
    unidentified = identity_header(headers) is None
    added = {REASON: reason, MESSAGE_ID: dead_letter_id(message)}
    message_id = (message.headers or {}).get(MESSAGE_ID)
    choices = (
        headers | ({KEY_HEADERS[0]: key} if unidentified and key is not None else {}) | added,
        # The name of this header is shorter than Nats-Msg-Id, which it replaces.
        headers | ({KEY_HEADERS[1]: message_id} if unidentified and message_id else {}),
        None,
    )
    return next(each for each in choices if each is None or size_of_headers(each) + len(message.data) <= max_payload)


def dead_letter_id(message: Msg) -> str:
    """Return the message id of a dead letter.

    Where the termination of the message is lost, its dead letter is sent twice; the server drops the second one by this
    id. It contains the time at which the message was stored, because a stream that is deleted and made again uses the
    same sequence numbers again.
    """
    metadata = message.metadata
    stored = round(metadata.timestamp.timestamp() * 1_000_000)
    names = filter(None, [metadata.domain, metadata.stream, metadata.consumer])
    return ":".join(["dead", *names, str(metadata.sequence.stream), str(stored)])


def matches(pattern: str, subject: str) -> bool:
    """Return whether a subject matches a filter, such as ``orders.*`` or ``orders.>``."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">" and len(tokens) >= len(wanted):
        del tokens[len(wanted) - 1 :], wanted[-1]
    return len(wanted) == len(tokens) and all(each in ("*", token) for each, token in zip(wanted, tokens, strict=True))


def size_of_headers(headers: Mapping[str, str]) -> int:
    """Return the bytes of headers on the wire, which count towards the server's ``max_payload``."""
    lines = ["NATS/1.0", *(f"{name}: {value}" for name, value in headers.items()), ""]
    return sum(len(line.encode()) + 2 for line in lines)

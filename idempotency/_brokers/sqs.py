"""Messages of Amazon SQS: what identifies one, and how one becomes a dead letter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from idempotency._brokers.headers import KEY_HEADERS, REASON, header

_MOST_ATTRIBUTES = 10


def message_key(queue: str, message: Mapping[str, Any]) -> str:
    """Return what identifies a message of the queue of that name. The format is stored: a change makes every key new.

    The attribute's text; ``orders.fifo customer-7 order-42``: queue, group and deduplication id, none of which has a
    space (its producer may use an id in each group, by the queue's deduplication scope); or the message id.
    """
    named = header(_values(message))
    if named is not None:
        return named
    attributes = message["Attributes"]
    given = attributes.get("MessageDeduplicationId")
    # What SQS derives from the body names no message: two orders may be equal.
    if given and given != hashlib.sha256(message["Body"].encode()).hexdigest():
        return f"{queue} {attributes['MessageGroupId']} {given}"
    identity: str = message["MessageId"]
    return identity


def send_dead_letter(client: Any, url: str, message: Mapping[str, Any], key: str, reason: str) -> None:
    """Send a dead letter: with its identity, since the copy has a new message id, and may be sent back one day."""
    attributes = dict(message.get("MessageAttributes", {}))
    added = {REASON: reason} if header(_values(message)) else {KEY_HEADERS[0]: key, REASON: reason}
    for name, value in added.items():
        if name in attributes or len(attributes) < _MOST_ATTRIBUTES:
            attributes[name] = {"DataType": "String", "StringValue": value}
    ordered = {}
    if url.endswith(".fifo"):
        # As SQS itself does it: by the producer's deduplication id, a message that was sent back and failed again
        # within five minutes would be dropped here, and then deleted there.
        ordered = {
            "MessageGroupId": message["Attributes"]["MessageGroupId"],
            "MessageDeduplicationId": message["MessageId"],
        }
    client.send_message(QueueUrl=url, MessageBody=message["Body"], MessageAttributes=attributes, **ordered)


def _values(message: Mapping[str, Any]) -> dict[str, Any]:
    attributes: Mapping[str, Any] = message.get("MessageAttributes", {})
    return {name: value.get("StringValue") or value.get("BinaryValue") for name, value in attributes.items()}

"""Messages of Amazon SQS: what identifies one, and how one becomes a dead letter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from idempotency._brokers.headers import KEY_HEADERS, REASON, identity_header

_MOST_ATTRIBUTES = 10


def message_key(queue: str, message: Mapping[str, Any]) -> str:
    """Return what identifies a message of the queue of that name. The format is stored: a change makes every key new.

    It is the text of the attribute ``Idempotency-Key`` or ``id``. Else it is queue, group and deduplication id, such as
    ``orders.fifo customer-7 order-42``: none of them has a space, and by the queue's deduplication scope a producer may
    use one id in several groups. Else it is the message id.
    """
    identity = identity_header(_values(message))
    if identity is not None:
        return identity
    attributes = message["Attributes"]
    given = attributes.get("MessageDeduplicationId")
    # An id that SQS derives from the body identifies no message: two orders may be equal.
    if given and given != hashlib.sha256(message["Body"].encode()).hexdigest():
        return f"{queue} {attributes['MessageGroupId']} {given}"
    message_id: str = message["MessageId"]
    return message_id


def send_dead_letter(client: Any, url: str, message: Mapping[str, Any], key: str, reason: str) -> None:
    """Send a dead letter, with its identity: the copy has a new message id, and may be sent back to its queue later."""
    attributes = dict(message.get("MessageAttributes", {}))
    added = {REASON: reason} if identity_header(_values(message)) else {KEY_HEADERS[0]: key, REASON: reason}
    for name, value in added.items():
        if name in attributes or len(attributes) < _MOST_ATTRIBUTES:
            attributes[name] = {"DataType": "String", "StringValue": value}
    ordered = {}
    if url.endswith(".fifo"):
        # SQS itself does the same. With the producer's deduplication id, a message that is sent back and fails again
        # within five minutes would be dropped by the queue for dead letters, and then deleted from its own.
        ordered = {
            "MessageGroupId": message["Attributes"]["MessageGroupId"],
            "MessageDeduplicationId": message["MessageId"],
        }
    client.send_message(QueueUrl=url, MessageBody=message["Body"], MessageAttributes=attributes, **ordered)


def _values(message: Mapping[str, Any]) -> dict[str, Any]:
    attributes: Mapping[str, Any] = message.get("MessageAttributes", {})
    return {name: value.get("StringValue") or value.get("BinaryValue") for name, value in attributes.items()}

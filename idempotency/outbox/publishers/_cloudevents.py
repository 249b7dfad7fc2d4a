"""CloudEvents 1.0 in binary mode: the attributes of the event are headers, and the payload stays as it is.

Consumers that know CloudEvents read the attributes. The headers of the plain format are sent too: this library's
consumers find the identity in ``id``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publishers._topic import check_template

Format = Literal["plain", "cloudevents"]
"""How a message is written: with the headers of Debezium's Outbox Event Router alone, or with those of CloudEvents."""

Prefix = Literal["ce_", "cloudEvents_", "ce-"]
"""Of the names of attributes: in Kafka, in AMQP, and in HTTP and NATS."""

DEFAULT_SOURCE = "/{aggregate_type}"
"""The source of an event by default. With the id it identifies the event."""

ADDED = 6
"""How many headers :func:`cloudevent_headers` makes."""

# What HTTP and NATS carry as it is, beside letters and digits: printable ASCII without space, quote and percent sign.
_UNQUOTED = "!#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


def cloudevent_headers(message: Message, source: str, prefix: Prefix) -> dict[str, str]:
    """Return the attributes of a message as headers; the content type is the row's own header ``content-type``.

    ``source``: a reference to a URI, in which ``{aggregate_type}`` and ``{type}`` are replaced. The aggregate's id is
    the subject.
    """
    filled = source.format(aggregate_type=quote(message.aggregate_type, safe=""), type=quote(message.type, safe=""))
    created = datetime.fromtimestamp(message.created, UTC).isoformat(timespec="milliseconds")
    attributes = {
        "specversion": "1.0",
        "id": message.id,
        "source": filled,
        "type": message.type,
        "subject": message.aggregate_id,
        "time": created.replace("+00:00", "Z"),
    }
    if prefix == "ce-":
        attributes = {name: quote(value, safe=_UNQUOTED) for name, value in attributes.items()}
    return {prefix + name: value for name, value in attributes.items()}


def headers_for(format: Format, source: str, prefix: Prefix) -> Callable[[Message], dict[str, str]]:
    """Return the function that makes the headers of a message; ConfigurationError for another format or source."""
    if format not in ("plain", "cloudevents"):
        raise ConfigurationError(f"format must be 'plain' or 'cloudevents', not {format!r}")
    check_template("source", source)
    if format == "plain":
        return Message.wire_headers
    return lambda message: message.wire_headers() | cloudevent_headers(message, source, prefix)

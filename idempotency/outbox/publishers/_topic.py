"""Where a message goes: the topic, exchange, subject, stream or queue, by its type of aggregate."""

from __future__ import annotations

from collections.abc import Callable

from idempotency._hooks import check_callable
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError

Topic = str | Callable[[Message], str]
"""A name in which ``{aggregate_type}`` and ``{type}`` are replaced, or a function of the message."""

DEFAULT_TOPIC = "outbox.event.{aggregate_type}"
"""The topic by default, as Debezium's Outbox Event Router names it."""


def topic_of(topic: Topic) -> Callable[[Message], str]:
    """Return the function that names the topic of a message; ConfigurationError for a name that cannot be filled in."""
    if not isinstance(topic, str):
        check_callable("topic", topic)
        return topic
    check_template("topic", topic)
    return lambda message: topic.format(aggregate_type=message.aggregate_type, type=message.type)


def check_template(name: str, template: str) -> None:
    """Refuse the value of an option in which names cannot be filled in."""
    try:
        template.format(aggregate_type="order", type="OrderPlaced")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigurationError(
            f"{name} may contain {{aggregate_type}} and {{type}}, and no other braces: {template!r}"
        ) from error

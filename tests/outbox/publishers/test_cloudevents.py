"""Messages as events of CloudEvents 1.0."""

from __future__ import annotations

import pytest

from idempotency.errors import ConfigurationError
from idempotency.outbox import Message
from idempotency.outbox.publishers._cloudevents import ADDED, Format, Prefix, cloudevent_headers, headers_for

ORDER = Message(
    id="0198c2f0-0000-7000-8000-000000000001",
    aggregate_type="shop order",
    aggregate_id="Zoë 7%",
    type="OrderPlaced",
    payload=b"{}",
    headers={"traceparent": "00-1", "ce_id": "of the row"},
    created=1_764_400_000.25,
)


@pytest.mark.parametrize(
    ("prefix", "subject"), [("ce_", "Zoë 7%"), ("cloudEvents_", "Zoë 7%"), ("ce-", "Zo%C3%AB%207%25")]
)
def test_the_attributes_have_the_names_and_the_encoding_of_their_broker(prefix: Prefix, subject: str) -> None:
    headers = cloudevent_headers(ORDER, "/shop/{aggregate_type}", prefix)
    assert headers == {
        f"{prefix}specversion": "1.0",
        f"{prefix}id": "0198c2f0-0000-7000-8000-000000000001",
        # A reference to a URI has no space. In HTTP a percent sign is encoded once more.
        f"{prefix}source": "/shop/shop%2520order" if prefix == "ce-" else "/shop/shop%20order",
        f"{prefix}type": "OrderPlaced",
        f"{prefix}subject": subject,
        f"{prefix}time": "2025-11-29T07:06:40.250Z",
    }
    assert len(headers) == ADDED


def test_the_plain_headers_are_sent_too_and_the_row_cannot_change_an_attribute() -> None:
    headers = headers_for("cloudevents", "/shop", "ce_")(ORDER)
    assert headers["id"] == headers["ce_id"] == "0198c2f0-0000-7000-8000-000000000001"
    assert (headers["eventType"], headers["traceparent"], headers["ce_source"]) == ("OrderPlaced", "00-1", "/shop")


def test_plain_adds_nothing() -> None:
    assert headers_for("plain", "/", "ce_")(ORDER) == {
        "id": "0198c2f0-0000-7000-8000-000000000001",
        "eventType": "OrderPlaced",
        "traceparent": "00-1",
        "ce_id": "of the row",
    }


@pytest.mark.parametrize(("format", "source"), [("xml", "/"), ("cloudevents", "/{aggregate_id}"), ("plain", "/{")])
def test_what_cannot_be_made_is_refused_at_once(format: Format, source: str) -> None:
    with pytest.raises(ConfigurationError):
        headers_for(format, source, "ce_")

"""Lambda behind SQS, by events as Lambda passes them."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from idempotency import idempotent_consumer
from idempotency._brokers.sqs import message_key
from idempotency.adapters.aws_lambda import batch
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.adapters.rigs.sqs_rig import text


def record(identity: str, body: str, queue: str = "orders", attempt: int = 1, **system: str) -> dict[str, Any]:
    return {
        "messageId": identity,
        "receiptHandle": f"handle of {identity}",
        "body": body,
        "attributes": {"ApproximateReceiveCount": str(attempt), "SentTimestamp": "1545082649183", **system},
        "messageAttributes": {},
        "md5OfBody": "",
        "eventSource": "aws:sqs",
        "eventSourceARN": f"arn:aws:sqs:eu-central-1:123456789012:{queue}",
        "awsRegion": "eu-central-1",
    }


def attribute(value: str) -> dict[str, Any]:
    return {"stringValue": value, "stringListValues": [], "binaryListValues": [], "dataType": "String"}


def event(*records: dict[str, Any]) -> dict[str, Any]:
    return {"Records": list(records)}


def failures(answer: dict[str, Any]) -> list[str]:
    assert list(answer) == ["batchItemFailures"]
    return [each["itemIdentifier"] for each in answer["batchItemFailures"]]


class Orders:
    """A consumer that fails for the bodies it is told."""

    def __init__(self, store: Any = None, **options: Any) -> None:
        self.handled: list[str] = []
        self.poison: set[str] = set()

        @idempotent_consumer(store or MemoryStore(), consumer="billing", **options)
        def on_order(record: dict[str, Any]) -> None:
            self.handled.append(record["body"])
            if record["body"] in self.poison:
                raise ValueError(record["body"])

        self.on_order: Any = on_order


class Sender:
    """A client of which a Lambda function needs one verb."""

    def __init__(self, *errors: Exception) -> None:
        self.sent: list[dict[str, Any]] = []
        self._errors = list(errors)

    def send_message(self, **arguments: Any) -> None:
        if self._errors:
            raise self._errors.pop()
        self.sent.append(arguments)


def test_only_what_failed_is_delivered_again() -> None:
    orders = Orders()
    handler = batch(orders.on_order)
    orders.poison = {"tea"}
    records = [record("1", "milk"), record("2", "tea"), record("3", "sugar")]

    assert failures(handler(event(*records), None)) == ["2"]
    orders.poison = set()
    assert failures(handler(event(record("2", "tea", attempt=2)), None)) == []
    assert orders.handled == ["milk", "tea", "sugar", "tea"]


def test_a_redelivered_batch_is_replayed() -> None:
    orders = Orders()
    handler = batch(orders.on_order)
    records = [record("1", "milk"), record("2", "tea"), record("1", "milk")]

    assert failures(handler(event(*records), None)) == []
    assert failures(handler(event(*records), None)) == []
    assert orders.handled == ["milk", "tea"]


def test_after_a_failure_no_message_of_its_group_is_handled() -> None:
    orders = Orders()
    orders.poison = {"a1"}

    def of(body: str) -> dict[str, Any]:
        return record(body, body, "orders.fifo", MessageGroupId=body[0], MessageDeduplicationId=f"order {body}")

    answer = batch(orders.on_order)(event(of("a1"), of("b1"), of("a2"), of("b2"), of("a3")), None)

    assert failures(answer) == ["a1", "a2", "a3"]
    assert orders.handled == ["a1", "b1", "b2"]


def test_a_group_of_a_standard_queue_has_no_order() -> None:
    orders = Orders()
    orders.poison = {"a1"}
    records = [record(body, body, MessageGroupId="tenant") for body in ("a1", "a2")]

    assert failures(batch(orders.on_order)(event(*records), None)) == ["a1"]
    assert orders.handled == ["a1", "a2"]


def test_a_message_that_another_handles_is_delivered_again() -> None:
    orders, found = Orders(), list[Any]()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        orders.handled.append(message["body"])
        found.append(handler(event(record("1", "milk", attempt=2)), None))

    handler = batch(on_order)
    assert failures(handler(event(record("1", "milk")), None)) == []
    assert [failures(each) for each in found] == [["1"]]
    assert orders.handled == ["milk"]


def test_without_its_store_nothing_is_handled_and_all_is_delivered_again() -> None:
    store = FaultyStore()
    store.down = True
    orders = Orders(store)

    assert failures(batch(orders.on_order)(event(record("1", "milk"), record("2", "tea")), None)) == ["1", "2"]
    assert orders.handled == []


def test_a_dead_letter_is_left_to_the_redrive_policy_or_sent() -> None:
    orders, sender = Orders(max_attempts=1), Sender()
    orders.poison = {"tea"}
    spoilt = record("2", "tea")
    spoilt["messageAttributes"] = {
        "tenant": attribute("acme"),
        "image": {"binaryValue": base64.b64encode(b"\x00\xff").decode(), "dataType": "Binary.png"},
    }

    assert failures(batch(orders.on_order)(event(spoilt), None)) == ["2"]
    answer = batch(orders.on_order, dead_letter="https://dead", client=sender)(event(spoilt, record("3", "milk")), None)

    assert failures(answer) == []
    assert sender.sent == [
        {
            "QueueUrl": "https://dead",
            "MessageBody": "tea",
            "MessageAttributes": {
                "tenant": text("acme"),
                "image": {"DataType": "Binary.png", "BinaryValue": b"\x00\xff"},
                "Idempotency-Key": text("2"),
                "Idempotency-Reason": text("exhausted"),
            },
        }
    ]


def test_a_dead_letter_that_cannot_be_sent_counts_as_failed() -> None:
    orders, events = Orders(max_attempts=1, on_event=lambda each: events.append(each.kind)), list[str]()
    orders.poison = {"tea"}
    handler = batch(
        orders.on_order, dead_letter="https://dead", client=Sender(EndpointConnectionError(endpoint_url=""))
    )

    assert failures(handler(event(record("2", "tea")), None)) == ["2"]
    assert "unsettled" in events


def test_an_error_that_stops_a_consumer_is_raised_when_the_rest_is_handled() -> None:
    orders = Orders(key=lambda record: record["body"].strip(), on_refused="stop")

    with pytest.raises(KeyMissingError):
        batch(orders.on_order)(event(record("1", " "), record("2", "milk")), None)
    assert orders.handled == ["milk"]


def test_another_message_under_the_id_of_one_is_a_dead_letter() -> None:
    """Two producers may use one id; the attributes, the time and the message id of a repeated send do not matter."""
    orders, sender = Orders(), Sender()
    order, refund, again = record("1", "order"), record("2", "refund"), record("3", "order", SentTimestamp="1")
    for each in (order, refund, again):
        each["messageAttributes"] = {"id": attribute("1"), "trace": attribute(each["messageId"])}

    answer = batch(orders.on_order, dead_letter="https://dead", client=sender)(event(order, refund, again), None)

    assert failures(answer) == []
    assert orders.handled == ["order"]
    (sent,) = sender.sent
    assert (sent["MessageBody"], sent["MessageAttributes"]["Idempotency-Reason"]) == ("refund", text("key-reused"))


def test_a_message_has_one_key_wherever_it_is_received() -> None:
    """A queue may move from a process that polls to a Lambda function, and back."""
    seen: list[str] = []

    class Recording(MemoryStore):
        def claim_sync(self, claim: Any, /) -> Any:
            seen.append(claim.key)
            return super().claim_sync(claim)

    orders = Orders(Recording())
    named, binary, grouped = record("1", "a"), record("2", "b"), record("3", "c", "orders.fifo")
    named["messageAttributes"] = {"Idempotency-Key": attribute("order-1"), "id": attribute("other")}
    binary["messageAttributes"] = {
        "id": {"binaryValue": base64.b64encode(b"order-2").decode(), "dataType": "Binary"},
    }
    grouped["attributes"] |= {"MessageGroupId": "customer-7", "MessageDeduplicationId": "order-3"}
    batch(orders.on_order)(event(named, binary, grouped, record("4", "d")), None)

    assert seen == ["order-1", "order-2", "orders.fifo customer-7 order-3", "4"]
    polled = {"MessageId": "3", "Body": "c", "Attributes": grouped["attributes"]}
    assert message_key("orders.fifo", polled) == seen[2]


def test_what_cannot_work_is_refused() -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(record: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError, match="must not be a coroutine function"):
        batch(on_order)  # type: ignore[arg-type]
    for half in ({"dead_letter": "https://dead"}, {"client": Sender()}):
        with pytest.raises(ConfigurationError, match="need each other"):
            batch(Orders().on_order, **half)  # type: ignore[arg-type]

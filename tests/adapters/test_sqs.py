"""SQS: what the contract does not ask of every adapter."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from idempotency import Event, Policy, idempotent_consumer
from idempotency.adapters import sqs
from idempotency.adapters.sqs import consume, message_key, send_dead_letter
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.adapters.rigs.orders import until
from tests.adapters.rigs.sqs_rig import connect, count, moto, text
from tests.kit.paths import EXAMPLES
from tests.kit.targets import unique_name

EXAMPLE = EXAMPLES / "consumer_sqs.py"
MISSING = "http://127.0.0.1/123456789012/missing"

Create = Callable[..., str]


class Client:
    """A client that fails when it is told to; ``asked`` is what it was asked, in order."""

    def __init__(self, client: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.errors: dict[str, list[Exception]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(**arguments: Any) -> Any:
            self.asked.append((name, arguments))
            if self.errors.get(name):
                raise self.errors[name].pop(0)
            answer = getattr(self._client, name)(**arguments)
            self.after.get(name, lambda: None)()
            return answer

        return ask

    def hidden(self) -> list[int]:
        """Return for how many seconds messages were hidden."""
        return [asked["VisibilityTimeout"] for name, asked in self.asked if name == "change_message_visibility"]


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    client = connect(moto().url)
    yield client
    client.close()


@pytest.fixture
def client(plain: Any) -> Client:
    return Client(plain)


@pytest.fixture
def create(plain: Any) -> Iterator[Create]:
    """Make queues of this test: ``create(".fifo", VisibilityTimeout="1")``."""
    urls: list[str] = []

    def make(suffix: str = "", **attributes: str) -> str:
        if suffix:
            attributes |= {"FifoQueue": "true"}
        name = unique_name("sqs").replace(".", "_") + suffix
        urls.append(
            plain.create_queue(QueueName=name, Attributes={"VisibilityTimeout": "60", **attributes})["QueueUrl"]
        )
        return urls[-1]

    yield make
    for url in urls:
        plain.delete_queue(QueueUrl=url)


@contextmanager
def consuming(client: Any, url: str, handler: Any, **options: Any) -> Iterator[Future[None]]:
    """Run a consumer, and stop it at the end."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        consumer = thread.submit(consume, client, url, handler, poll=1, stop=stop, **options)
        try:
            yield consumer
        finally:
            stop.set()
    consumer.result()


def send(client: Any, url: str, body: str, group: str = "", identity: str = "", **attributes: str) -> None:
    ordered = {"MessageGroupId": group, "MessageDeduplicationId": identity} if group else {}
    named = {name.replace("_", "-"): text(value) for name, value in attributes.items()}
    client.send_message(QueueUrl=url, MessageBody=body, MessageAttributes=named, **ordered)


def take(client: Any, url: str, seconds: int = 2) -> dict[str, Any] | None:
    """Receive a message if there is one within some seconds."""
    answer = client.receive_message(
        QueueUrl=url,
        WaitTimeSeconds=seconds,
        MessageAttributeNames=["All"],
        MessageSystemAttributeNames=["All"],
    )
    message: dict[str, Any] | None = next(iter(answer.get("Messages", ())), None)
    return message


def in_flight(client: Any, url: str) -> int:
    names = ["ApproximateNumberOfMessagesNotVisible"]
    attributes = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
    return int(attributes[names[0]])


def refused(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "ReceiveMessage")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("attributes", "system", "key"),
    [
        ({}, {}, "id-1"),
        ({"id": text("order-1")}, {}, "order-1"),
        ({"id": text("order-1"), "Idempotency-Key": text("key-1")}, {"MessageDeduplicationId": "d-1"}, "key-1"),
        ({"id": {"DataType": "Number", "StringValue": "42"}}, {}, "42"),
        ({"id": {"DataType": "Binary", "BinaryValue": b"order-1"}}, {}, "order-1"),
        ({"other": text("x")}, {"MessageDeduplicationId": "d-1", "MessageGroupId": "g:1"}, "orders.fifo g:1 d-1"),
        ({}, {"MessageDeduplicationId": hashlib.sha256(b"body").hexdigest(), "MessageGroupId": "g"}, "id-1"),
        ({}, {"MessageGroupId": "a fair queue's tenant"}, "id-1"),
    ],
    ids=["id", "attribute", "header first", "number", "binary", "deduplication id", "derived from the body", "fair"],
)
def test_the_key_is_an_attribute_or_what_the_producer_or_sqs_gave(
    attributes: dict[str, Any], system: dict[str, str], key: str
) -> None:
    message = {"MessageId": "id-1", "Body": "body", "MessageAttributes": attributes, "Attributes": system}
    assert message_key("orders.fifo", message) == key


def test_a_message_whose_deletion_failed_is_replayed_by_its_message_id(client: Client, create: Create) -> None:
    url, events, runs = create(VisibilityTimeout="1"), list[str](), list[str]()

    def hear(event: Event) -> None:
        events.append(event.kind)

    @idempotent_consumer(MemoryStore(), consumer="billing", on_event=hear)
    def on_order(message: dict[str, Any]) -> None:
        runs.append(message["Body"])

    client.errors["delete_message"] = [EndpointConnectionError(endpoint_url="sqs")]
    send(client, url, "order-1")
    with consuming(client, url, on_order):
        until(lambda: "replayed" in events, "the redelivery")
    assert (runs, events) == (["order-1"], ["stored", "unsettled", "replayed"])
    assert count(client, url) == 0


def test_a_handler_may_take_longer_than_the_visibility_timeout(client: Client, create: Create) -> None:
    url, runs, finish = create(VisibilityTimeout="2"), list[str](), threading.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        runs.append(message["Body"])
        assert finish.wait(20)

    send(client, url, "order-1")
    assert take(client, url) is not None, "without an extension"
    assert take(client, url, 4) is not None, "it is delivered again"
    with consuming(client, url, on_order, concurrency=1):
        until(lambda: runs, "it is being handled")
        assert take(client, url, 4) is None
        finish.set()
    assert runs == ["order-1"]
    assert count(client, url) == 0


def test_an_extension_does_not_undo_the_pause(client: Client, create: Create) -> None:
    url, extended = create(VisibilityTimeout="1"), threading.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        raise ValueError("not yet")

    def told() -> None:
        *before, last = client.hidden()
        if last == 50:
            extended.wait(1)
        elif 50 in before:
            extended.set()

    client.after["change_message_visibility"] = told
    send(client, url, "order-1")
    with consuming(client, url, on_order, pause=50):
        until(lambda: 50 in client.hidden(), "it is to be delivered again")
    # On a slow machine it is extended before it has failed, too.
    assert client.hidden()[-1] == 50


def test_dead_letters_keep_their_attributes_and_their_identity(client: Client, create: Create) -> None:
    url, dead, runs = create(), create(), list[str]()

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=2)
    def on_order(message: dict[str, Any]) -> None:
        runs.append(message["MessageId"])
        raise ValueError("poison")

    send(client, url, "order-1", tenant="acme")
    with consuming(client, url, on_order, pause=0, dead_letter=dead):
        until(lambda: count(client, dead), "the dead letter")
    letter = take(client, dead)
    assert letter is not None
    assert len(runs) == 2
    assert letter["Body"] == "order-1"
    assert letter["MessageAttributes"] == {
        "tenant": text("acme"),
        "Idempotency-Key": text(runs[0]),
        "Idempotency-Reason": text("exhausted"),
    }
    assert count(client, url) == 0


def test_a_dead_letter_that_cannot_be_sent_stays_where_it_is(client: Client, create: Create) -> None:
    url, dead, events = create(VisibilityTimeout="1"), create(), list[str]()

    @idempotent_consumer(
        MemoryStore(), consumer="billing", max_attempts=1, on_event=lambda event: events.append(event.kind)
    )
    def on_order(message: dict[str, Any]) -> None:
        raise ValueError("poison")

    client.errors["send_message"] = [refused("KMS.AccessDeniedException", 400)]
    client._client.send_message(QueueUrl=url, MessageBody="order-1")
    with consuming(client, url, on_order, dead_letter=dead):
        until(lambda: "unsettled" in events, "the failure")
        assert (count(client, url), count(client, dead)) == (1, 0)
        until(lambda: count(client, dead), "the dead letter")
    assert count(client, url) == 0


def test_an_attribute_more_than_sqs_allows_is_left_out() -> None:
    sent: list[dict[str, Any]] = []

    class Sender:
        def send_message(self, **arguments: Any) -> None:
            sent.append(arguments)

    full = {f"a{number}": text("x") for number in range(9)}
    for attributes in (full, {**full, "id": text("1")}, {**full, "Idempotency-Reason": text("exhausted")}):
        message = {"MessageId": "1", "Body": "", "Attributes": {}, "MessageAttributes": attributes}
        send_dead_letter(Sender(), "dead", message, "key-1", "key-reused")

    added = [
        {name: each["StringValue"] for name, each in sending["MessageAttributes"].items() if name not in full}
        for sending in sent
    ]
    assert added == [{"Idempotency-Key": "key-1"}, {"id": "1"}, {"Idempotency-Reason": "key-reused"}]


def test_without_a_place_for_dead_letters_the_redrive_policy_takes_them(client: Client, create: Create) -> None:
    dead = create()
    arn = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = f'{{"deadLetterTargetArn": "{arn}", "maxReceiveCount": "3"}}'
    url, runs = create(VisibilityTimeout="1", RedrivePolicy=policy), list[str]()

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=2)
    def on_order(message: dict[str, Any]) -> None:
        runs.append(message["Body"])
        raise ValueError("poison")

    send(client, url, "order-1")
    with consuming(client, url, on_order, pause=0):
        until(lambda: count(client, dead), "SQS moved it")
    assert runs == ["order-1", "order-1"]
    assert count(client, url) == 0


@pytest.mark.parametrize(("redrive", "hidden"), [(False, 1), (True, 7)])
def test_a_store_that_is_away_does_not_use_up_the_redrive_policy(
    client: Client, create: Create, redrive: bool, hidden: int
) -> None:
    dead = create()
    arn = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = {"RedrivePolicy": f'{{"deadLetterTargetArn": "{arn}", "maxReceiveCount": 5}}'} if redrive else {}
    url, store = create(VisibilityTimeout="7", **policy), FaultyStore()
    store.down = True

    # For a lease, the end of the consumer waits for the release of the claim that may have come through.
    @idempotent_consumer(store, consumer="billing", policy=Policy(lease=1.0))
    def on_order(message: dict[str, Any]) -> None:
        raise AssertionError("it must not run")

    send(client, url, "order-1")
    with consuming(client, url, on_order):
        until(client.hidden, "it is to be delivered again")
    assert client.hidden()[0] == hidden
    assert count(client, url) == 1


def test_the_order_of_a_group_is_kept_and_holds_no_other_group_back(client: Client, create: Create) -> None:
    url, handled = create(".fifo"), list[tuple[str, str]]()
    store = MemoryStore()

    @idempotent_consumer(store, consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        handled.append((message["Body"], message["Attributes"]["ApproximateReceiveCount"]))
        if message["Body"] == "a1" and len([body for body, _ in handled if body == "a1"]) < 3:
            raise ValueError("not yet")

    for body, group in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("a3", "a")):
        send(client, url, body, group, f"order-{body}")
    with consuming(client, url, on_order):
        until(lambda: count(client, url) == 0, "all are handled")
    assert [each for each in handled if each[0] != "b1"] == [
        ("a1", "1"),
        ("a1", "2"),
        ("a1", "3"),
        ("a2", "1"),
        ("a3", "1"),
    ]
    assert handled.index(("b1", "1")) < handled.index(("a1", "3"))


def test_a_deduplication_id_is_remembered_for_longer_than_sqs_does(client: Client, create: Create) -> None:
    url, events, runs = create(".fifo"), list[str](), list[str]()

    @idempotent_consumer(MemoryStore(), consumer="billing", on_event=lambda event: events.append(event.kind))
    def on_order(message: dict[str, Any]) -> None:
        runs.append(message["Body"])

    with consuming(client, url, on_order):
        for repeated in ("stored", "replayed"):
            # This server remembers it for as long as the message is in the queue, SQS for five minutes.
            send(client, url, "buy", "customer-7", "order-1")
            until(lambda kind=repeated: kind in events and count(client, url) == 0, repeated)
    assert runs == ["buy"]


def test_a_dead_letter_of_a_group_stays_in_it_and_frees_it(client: Client, create: Create) -> None:
    url, dead, handled = create(".fifo"), create(".fifo"), list[str]()

    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=1)
    def on_order(message: dict[str, Any]) -> None:
        handled.append(message["Body"])
        if message["Body"] == "poison":
            handled.append(message["MessageId"])
            raise ValueError("poison")

    send(client, url, "poison", "customer-7", "order-1")
    send(client, url, "buy", "customer-7", "order-2")
    with consuming(client, url, on_order, dead_letter=dead):
        until(lambda: count(client, url) == 0, "both are settled")
    letter = take(client, dead)
    assert letter is not None
    assert (handled[0], handled[2]) == ("poison", "buy")
    assert letter["Attributes"]["MessageGroupId"] == "customer-7"
    assert letter["Attributes"]["MessageDeduplicationId"] == handled[1]
    assert message_key("any.fifo", letter) == f"{url.rpartition('/')[2]} customer-7 order-1"


def test_no_more_messages_are_held_than_are_handled(client: Client, create: Create) -> None:
    url, begun, finish = create(), list[str](), threading.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        begun.append(message["Body"])
        assert finish.wait(20)

    for number in range(5):
        send(client, url, f"order-{number}")
    with consuming(client, url, on_order, concurrency=2):
        until(lambda: len(begun) == 2, "two are being handled")
        assert in_flight(client, url) == 2
        finish.set()
        until(lambda: count(client, url) == 0, "all are handled")
    assert sorted(begun) == [f"order-{number}" for number in range(5)]


def test_stop_finishes_what_is_in_hand_and_takes_no_more(client: Client, create: Create) -> None:
    url, begun, stop, finish = create(), list[str](), threading.Event(), threading.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        begun.append(message["Body"])
        assert finish.wait(20)

    for number in range(2):
        send(client, url, f"order-{number}")
    with ThreadPoolExecutor(1) as thread:
        consumer = thread.submit(consume, client, url, on_order, concurrency=1, stop=stop)
        until(lambda: begun, "one is being handled")
        stop.set()
        finish.set()
        consumer.result(20)
    assert len(begun) == 1
    assert (count(client, url), in_flight(client, url)) == (1, 0)


def test_what_arrives_after_the_stop_is_given_back_at_once(client: Client, create: Create) -> None:
    url, stop = create(), threading.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        raise AssertionError("it must not run")

    client.after["receive_message"] = stop.set
    send(client, url, "order-1")
    consume(client, url, on_order, stop=stop)
    assert (count(client, url), in_flight(client, url)) == (1, 0)


def test_an_error_of_one_message_stops_the_consumer_when_the_others_are_done(client: Client, create: Create) -> None:
    url, begun, finish = create(), threading.Event(), threading.Event()

    @idempotent_consumer(
        MemoryStore(), consumer="billing", key=lambda message: message["Body"].strip(), on_refused="stop"
    )
    def on_order(message: dict[str, Any]) -> None:
        begun.set()
        assert finish.wait(20)

    send(client, url, "order-1")
    with ThreadPoolExecutor(1) as thread:
        consumer = thread.submit(consume, client, url, on_order, poll=1)
        assert begun.wait(20)
        send(client, url, " ")
        until(lambda: in_flight(client, url) == 2, "both are in hand")
        finish.set()
        with pytest.raises(KeyMissingError):
            consumer.result(20)
    assert count(client, url) == 1


def test_a_poll_that_fails_on_its_way_is_repeated(
    client: Client, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, stop, runs = create(), threading.Event(), list[str]()
    monkeypatch.setattr(sqs, "_POLL_PAUSE", 0.01)

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None:
        runs.append(message["Body"])
        stop.set()

    client.errors["receive_message"] = [
        EndpointConnectionError(endpoint_url="sqs"),
        refused("InternalError", 500),
        refused("RequestThrottled", 403),
        refused("OverLimit", 403),
        refused("TooManyRequests", 429),
    ]
    send(client, url, "order-1")
    consume(client, url, on_order, poll=1, stop=stop)
    assert runs == ["order-1"]
    assert count(client, url) == 0


@pytest.mark.parametrize("error", [refused("AccessDenied", 403), refused("ExpiredToken", 400), NoCredentialsError()])
def test_a_poll_that_cannot_succeed_stops_the_consumer(client: Client, create: Create, error: Exception) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None: ...

    client.errors["receive_message"] = [error]
    with pytest.raises(type(error)):
        consume(client, create(), on_order)


def test_a_queue_that_is_missing_is_told_at_once(client: Client, create: Create) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None: ...

    with pytest.raises(ClientError, match="NonExistentQueue"):
        consume(client, MISSING, on_order)
    with pytest.raises(ClientError, match="NonExistentQueue"):
        consume(client, create(), on_order, dead_letter=MISSING)
    assert {name for name, _ in client.asked} == {"get_queue_attributes"}


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"pause": -1}, {"pause": 50_000}, {"poll": 0}, {"poll": 21}], ids=str
)
def test_options_that_sqs_does_not_know_are_refused(client: Client, options: dict[str, Any]) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    def on_order(message: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError, match=next(iter(options))):
        consume(client, MISSING, on_order, **options)
    assert client.asked == []


def test_a_queue_that_cannot_keep_the_promise_is_refused(client: Client, create: Create) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=4)
    def on_order(message: dict[str, Any]) -> None: ...

    dead = create()
    arn = client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    hasty = create(RedrivePolicy=f'{{"deadLetterTargetArn": "{arn}", "maxReceiveCount": "3"}}')
    with pytest.raises(ConfigurationError, match="max_attempts needs dead_letter="):
        consume(client, create(), on_order)
    with pytest.raises(ConfigurationError, match="maxReceiveCount is 3"):
        consume(client, hasty, on_order)
    with pytest.raises(ConfigurationError, match="VisibilityTimeout is 0"):
        consume(client, create(VisibilityTimeout="0"), on_order, dead_letter=dead)
    again = create()
    with pytest.raises(ConfigurationError, match="same queue"):
        consume(client, again, on_order, dead_letter=again.replace("127.0.0.1", "localhost"))
    with pytest.raises(ConfigurationError, match="have no group"):
        consume(client, create(), on_order, dead_letter=create(".fifo"))


@pytest.mark.parametrize(("retention", "warned"), [(3600, False), (3601, True)])
def test_records_that_are_gone_before_their_messages_are_warned_of(
    client: Client, create: Create, caplog: pytest.LogCaptureFixture, retention: int, warned: bool
) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing", policy=Policy(ttl=3600))
    def on_order(message: dict[str, Any]) -> None: ...

    url, stop = create(MessageRetentionPeriod=str(retention)), threading.Event()
    stop.set()
    consume(client, url, on_order, stop=stop)
    said = [record.getMessage() for record in caplog.records if record.name == "idempotency"]
    assert [each.startswith(f"the queue {url.rpartition('/')[2]} keeps messages for 3601 s") for each in said] == (
        [True] if warned else []
    )


def test_a_handler_that_must_be_awaited_is_refused(client: Client) -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: dict[str, Any]) -> None: ...

    def undecorated(message: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError, match="must not be a coroutine function"):
        consume(client, MISSING, on_order)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="idempotent_consumer"):
        consume(client, MISSING, undecorated)  # type: ignore[arg-type]


@pytest.mark.processes
def test_the_example_runs() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "eu-central-1"}
    environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": moto().url}
    done = subprocess.run(
        [sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 deliveries, 1 invoice\n"

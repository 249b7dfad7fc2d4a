"""The publisher for SQS, on moto."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from idempotency import idempotent_consumer
from idempotency.adapters.sqs import consume
from idempotency.errors import ConfigurationError
from idempotency.outbox import Outcome, Refused, RetryLater, Sent
from idempotency.outbox.publishers.sqs import Sending, SQSPublisher, from_url, in_requests, send_together
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import Receive, new_message
from tests.adapters.rigs.sqs_rig import connect, moto
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy
from tests.outbox.publishers.faults import BehindProxy

DIGEST_OF_A_B = "c8687a08aa5d6ed2044328fa6a697ab8e96dc34291e8c2034ae8c38e6fcc6d65"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    client = connect(moto().url)
    yield client
    client.close()


@pytest.fixture
def create(client: Any) -> Iterator[Callable[[str], str]]:
    urls: list[str] = []

    def create(suffix: str = "") -> str:
        name = unique_name("outbox").replace(".", "_") + suffix
        attributes = {"FifoQueue": "true"} if suffix else {}
        urls.append(client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])
        return urls[-1]

    yield create
    for url in urls:
        client.delete_queue(QueueUrl=url)


def take(client: Any, url: str) -> list[dict[str, Any]]:
    """Receive up to ten messages, and delete them."""
    found: list[dict[str, Any]] = client.receive_message(
        QueueUrl=url,
        MaxNumberOfMessages=10,
        MessageAttributeNames=["All"],
        MessageSystemAttributeNames=["All"],
    ).get("Messages", [])
    if found:
        handles = [{"Id": str(number), "ReceiptHandle": each["ReceiptHandle"]} for number, each in enumerate(found)]
        client.delete_message_batch(QueueUrl=url, Entries=handles)
    return found


def headers_of(message: dict[str, Any]) -> dict[str, str]:
    return {name: each["StringValue"] for name, each in message["MessageAttributes"].items()}


class TestContract(BehindProxy, PublisherContract):
    """On a FIFO queue, through a client that the publisher makes itself."""

    carries_tombstones = False
    carries_bytes = False
    copies = 1
    most = 30
    unroutable = RetryLater

    @pytest.fixture
    def broker_port(self) -> int:
        return moto().port

    @pytest.fixture
    async def publisher(
        self, proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
    ) -> AsyncIterator[SQSPublisher]:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        # A test of a fault waits for its end.
        faulty = {"break_broker", "hang_broker"} & {*request.fixturenames}
        publisher = SQSPublisher(
            lambda message: url if message.aggregate_type == "order" else f"{url[:-5]}_nowhere.fifo",
            delivery_timeout=1 if faulty else 20,
        )
        yield publisher
        await publisher.aclose()

    @pytest.fixture
    def url(self, create: Callable[[str], str]) -> str:
        return create(".fifo")

    @pytest.fixture
    def received(self, client: Any, url: str) -> Receive:
        found: list[Received] = []

        async def received(count: int) -> list[Received]:
            async with asyncio.timeout(20):
                while (arrived := await asyncio.to_thread(take, client, url)) or len(found) < count:
                    found.extend(
                        Received(
                            id=each["Attributes"]["MessageDeduplicationId"],
                            key=each["Attributes"]["MessageGroupId"],
                            headers=headers_of(each),
                            payload=each["Body"].encode(),
                        )
                        for each in arrived
                    )
            return found

        return received

    @pytest.fixture
    def too_large(self) -> int:
        return 1 << 20

    @pytest.mark.parametrize("payload", [b"7", '{"city": "Zürich"}'.encode(), b"x" * 100_000])
    async def test_payload_arrives_as_it_is(self, publisher: Any, received: Receive, payload: bytes) -> None:
        """Without an empty one, which is refused."""
        await super().test_payload_arrives_as_it_is(publisher, received, payload)


async def test_a_standard_queue_has_the_id_as_an_attribute_and_no_group(
    client: Any, create: Callable[[str], str]
) -> None:
    publisher = SQSPublisher(url := create(""), client=client)
    message = new_message(headers={"city": "Zürich"})
    assert await publisher.publish([message, message]) == [Sent(), Sent()]
    await publisher.aclose()
    copies = take(client, url)
    assert [headers_of(each) for each in copies] == [
        {"id": message.id, "eventType": "OrderPlaced", "city": "Zürich"},
    ] * 2
    assert "MessageGroupId" not in copies[0]["Attributes"]


async def test_an_aggregate_s_id_that_cannot_be_a_group_is_its_digest(
    client: Any, create: Callable[[str], str]
) -> None:
    publisher = SQSPublisher(url := create(".fifo"), client=client)
    await publisher.publish([new_message("a b"), new_message("a:b"), new_message("x" * 129)])
    groups = {each["Attributes"]["MessageGroupId"] for each in take(client, url)}
    assert {DIGEST_OF_A_B, "a:b"} < groups
    assert sorted(map(len, groups)) == [3, 64, 64]
    await publisher.aclose()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"payload": b""}, "empty"),
        ({"payload": b"\x00"}, "character"),
        ({"payload": "\uffff".encode()}, "character"),
        ({"headers": {"a b": "1"}}, "attributes of the name 'a b'"),
        ({"headers": {"AWS.trace": "1"}}, "AWS.trace"),
        ({"headers": {"a..b": "1"}}, "a..b"),
        ({"headers": {"empty": ""}}, "'empty' is empty"),
        ({"headers": {"control": "\x01"}}, "character"),
        ({"headers": {f"h{number}": "1" for number in range(9)}}, "11 headers"),
        ({"payload": b"x" * ((1 << 20) - 70)}, "types"),
    ],
)
async def test_what_sqs_does_not_take_is_refused_before_it_is_sent(changes: dict[str, Any], reason: str) -> None:
    publisher = SQSPublisher("https://localhost/1/orders", client=object())
    [outcome] = await publisher.publish([new_message(**changes)])
    assert isinstance(outcome, Refused)
    assert reason in outcome.reason
    await publisher.aclose()


async def test_a_cloud_event_leaves_two_attributes_to_the_message(client: Any, create: Callable[[str], str]) -> None:
    publisher = SQSPublisher(url := create(""), client=client, format="cloudevents", source="/shop")
    fits, too_many = (new_message(headers={f"h{number}": "1" for number in range(count)}) for count in (2, 3))
    assert [type(each) for each in await publisher.publish([fits, too_many])] == [Sent, Refused]
    [received] = take(client, url)
    assert len(headers_of(received)) == 10
    assert headers_of(received)["ce_id"] == headers_of(received)["id"] == fits.id
    await publisher.aclose()


class ScriptedClient:
    """A client whose answers are given; ``asked`` has the bodies of each request."""

    def __init__(self, *answers: dict[str, Any] | str) -> None:
        self.asked: list[list[str]] = []
        self._answers = list(answers)

    def send_message_batch(self, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:  # noqa: N803
        self.asked.append([each["MessageBody"] for each in Entries])
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            raise ClientError({"Error": {"Code": answer}}, "SendMessageBatch")
        return answer


def failed(number: int, code: str, *, sender: bool) -> dict[str, Any]:
    return {"Failed": [{"Id": str(number), "Code": code, "SenderFault": sender}]}


@pytest.mark.parametrize(
    ("code", "sender", "outcome"),
    [
        ("InvalidMessageContents", True, Refused("InvalidMessageContents")),
        ("InternalError", False, RetryLater("InternalError")),
        ("KmsAccessDenied", True, RetryLater("KmsAccessDenied")),
        ("RequestThrottled", True, RetryLater("RequestThrottled")),
    ],
)
def test_one_entry_that_failed_does_not_fail_its_request(code: str, sender: bool, outcome: Outcome) -> None:
    client = ScriptedClient(failed(1, code, sender=sender))
    entries = [{"MessageBody": body} for body in "abc"]
    assert send_together(client, "orders", entries) == [Sent(), outcome, Sent()]


def test_the_message_for_which_a_request_is_refused_is_found() -> None:
    client = ScriptedClient("InvalidParameterValue", {}, "InvalidParameterValue", {})
    assert send_together(client, "orders", [{"MessageBody": body} for body in "abc"]) == [
        Sent(),
        Refused("InvalidParameterValue"),
        Sent(),
    ]
    assert client.asked == [["a", "b", "c"], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize("code", ["ThrottlingException", "AWS.SimpleQueueService.NonExistentQueue", "ExpiredToken"])
def test_a_request_that_may_succeed_later_is_not_refused(code: str) -> None:
    assert send_together(ScriptedClient(code), "orders", [{"MessageBody": "a"}]) == [RetryLater(code)]


async def test_the_rest_of_a_key_is_held_back_when_an_entry_has_failed() -> None:
    client = ScriptedClient(failed(0, "InternalError", sender=False), {})
    publisher = SQSPublisher("https://localhost/1/orders.fifo", client=client)
    batch = [
        new_message("order-1", payload=b"1a"),
        new_message("order-1", payload=b"1b"),
        new_message("order-2", payload=b"2a"),
        new_message("order-2", payload=b"2b"),
    ]
    first, held, *others = await publisher.publish(batch)
    assert first == RetryLater("InternalError")
    assert isinstance(held, RetryLater)
    assert held.held
    assert others == [Sent(), Sent()]
    # The heads of both keys go in one request.
    assert client.asked == [["1a", "2a"], ["2b"]]
    await publisher.aclose()


async def test_requests_have_ten_messages_and_a_mebibyte_and_one_queue() -> None:
    def sending(url: str, size: int) -> Sending:
        return Sending(url, {}, size, asyncio.get_running_loop().create_future())

    small = [sending("a", 100) for _ in range(11)]
    other = sending("b", 100)
    large = [sending("c", 600_000), sending("c", 400_000), sending("c", 600_000)]
    requests = in_requests([*small, other, *large])
    assert requests == [small[:10], small[10:], [other], large[:2], large[2:]]


def test_a_message_that_is_published_twice_takes_effect_once(client: Any, create: Callable[[str], str]) -> None:
    effects: list[str] = []
    stop = threading.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    def bill(message: dict[str, Any]) -> None:
        effects.append(message["Body"])
        if message["Body"] == "last":
            stop.set()

    async def publish() -> None:
        publisher = SQSPublisher(url, client=client)
        message = new_message(payload=b"order")
        assert await publisher.publish([message]) == [Sent()]
        assert await publisher.publish([message, new_message("order-2", payload=b"last")]) == [Sent(), Sent()]
        await publisher.aclose()

    url = create("")
    asyncio.run(publish())
    consume(client, url, bill, concurrency=1, poll=1, stop=stop)
    assert effects == ["order", "last"]


def test_the_url_of_a_queue_names_its_region() -> None:
    publisher = from_url("sqs://sqs.eu-north-1.amazonaws.com/123/orders.fifo", {"delivery_timeout": 5.0})
    assert publisher.delivery_timeout == 5
    assert publisher._region[1] == "eu-north-1"  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="sqs://"):
        from_url("sqs://orders", {})

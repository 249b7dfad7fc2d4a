"""Messages that go to a function of the same process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from idempotency import ConfigurationError, idempotent_consumer
from idempotency._outbox.message import Message
from idempotency.outbox.publisher import Duplicate, Refused, RetryLater, Sent
from idempotency.outbox.publishers.function import FunctionPublisher
from idempotency.stores.memory import MemoryStore
from idempotency.testing import PublisherContract, Received
from idempotency.testing.publishers import Fault, Receive, new_message


class Application:
    """A function that keeps the messages, refuses large ones, and can be away or hang."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.well = asyncio.Event()
        self.well.set()
        self.away = False

    async def handle(self, message: Message) -> object:
        await self.well.wait()
        if self.away:
            raise ConnectionError
        if len(message.payload or b"") > 1_000_000:
            return Refused("it is too large")
        if message.aggregate_type == "nowhere":
            return RetryLater("nobody is there", after=5)
        self.messages.append(message)
        return None


class TestContract(PublisherContract):
    unroutable = RetryLater

    @pytest.fixture
    def application(self) -> Application:
        return Application()

    @pytest.fixture
    def publisher(self, application: Application) -> FunctionPublisher:
        return FunctionPublisher(application.handle, delivery_timeout=0.5)

    @pytest.fixture
    def received(self, application: Application) -> Receive:
        async def received(count: int) -> list[Received]:
            assert len(application.messages) >= count
            return [
                Received(id=each.id, key=each.aggregate_id, headers=each.wire_headers(), payload=each.payload)
                for each in application.messages
            ]

        return received

    @pytest.fixture
    def too_large(self) -> int:
        return 1_000_001

    @pytest.fixture
    def break_broker(self, application: Application) -> Fault:
        async def go() -> None:
            application.away = True

        return go

    @pytest.fixture
    def hang_broker(self, application: Application) -> Fault:
        async def go() -> None:
            application.well.clear()

        return go

    @pytest.fixture
    def mend_broker(self, application: Application) -> Fault:
        async def go() -> None:
            application.away = False
            application.well.set()

        return go


async def test_function_has_so_many_messages_at_a_time_as_it_is_given() -> None:
    running, most = 0, 0

    async def handle(message: Message) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    batch = [new_message(f"order-{number}") for number in range(20)]
    assert await FunctionPublisher(handle, concurrency=3).publish(batch) == [Sent()] * 20
    assert most == 3


async def test_outcome_that_a_function_returns_is_the_outcome() -> None:
    async def handle(message: Message) -> RetryLater:
        return RetryLater("closed for lunch", after=3600)

    assert await FunctionPublisher(handle).publish([new_message()]) == [RetryLater("closed for lunch", after=3600)]


async def test_idempotent_consumer_handles_a_message_once_by_its_id() -> None:
    handled = list[str]()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: Message) -> None:
        handled.append(message.id)

    publisher, message = FunctionPublisher(on_order), new_message()
    assert await publisher.publish([message]) == [Sent()]
    assert await publisher.publish([message]) == [Duplicate()]
    assert handled == [message.id]


async def test_idempotent_consumer_that_fails_is_tried_again_until_its_last_attempt() -> None:
    @idempotent_consumer(MemoryStore(), consumer="billing", max_attempts=2)
    async def on_order(message: Message) -> None:
        raise ValueError(message.payload)

    publisher, message = FunctionPublisher(on_order), new_message()
    assert await publisher.publish([message]) == [RetryLater("ValueError")]
    assert await publisher.publish([replace(message, attempt=2)]) == [Refused("exhausted")]


async def test_message_that_the_consumer_is_handling_is_tried_again() -> None:
    handling, end = asyncio.Event(), asyncio.Event()

    @idempotent_consumer(MemoryStore(), consumer="billing")
    async def on_order(message: Message) -> None:
        handling.set()
        await end.wait()

    publisher, message = FunctionPublisher(on_order), new_message()
    first = asyncio.ensure_future(publisher.publish([message]))
    await handling.wait()
    [second] = await publisher.publish([message])
    end.set()

    assert isinstance(second, RetryLater)
    assert second.reason == "in-progress"
    assert second.after is not None
    assert await first == [Sent()]


async def test_error_of_a_function_is_named_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """Its traceback is in the log of the process, as that of a handler of messages."""

    async def handle(message: Message) -> None:
        raise ValueError(message.payload)

    assert await FunctionPublisher(handle).publish([new_message()]) == [RetryLater("ValueError")]
    [record] = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError


def test_function_that_is_not_async_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="coroutine function"):
        FunctionPublisher(print)  # type: ignore[arg-type]

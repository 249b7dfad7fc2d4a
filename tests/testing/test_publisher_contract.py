"""The contract of publishers finds what is wrong with a publisher."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from idempotency._outbox.message import Message, time_ordered_id
from idempotency.outbox.publisher import Outcome, Refused, RetryLater, Sent
from idempotency.testing import PublisherContract, Received

LARGE = 1000


class Right:
    """A publisher to a list. What is wrong with it is written in the subclasses."""

    delivery_timeout = 0.1

    def __init__(self) -> None:
        self.list: list[Message] = []
        self.is_away = False
        self.is_closed = False

    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        if self.is_closed:
            raise RuntimeError("the publisher is closed")
        return [self.outcome(message) for message in batch]

    def outcome(self, message: Message) -> Outcome:
        if self.is_away:
            return RetryLater("away")
        if len(message.payload or b"") >= LARGE or message.aggregate_type == "nowhere":
            return Refused("it is not taken")
        self.list.append(self.written(message))
        return Sent()

    def written(self, message: Message) -> Message:
        return message

    async def aclose(self) -> None:
        self.is_closed = True

    async def received(self, count: int) -> list[Received]:
        if len(self.list) < count:
            raise AssertionError(f"only {len(self.list)} arrived")
        return [
            Received(id=each.id, key=each.aggregate_id, headers=each.wire_headers(), payload=each.payload)
            for each in self.list
        ]

    async def break_broker(self) -> None:
        self.is_away = True

    async def mend_broker(self) -> None:
        self.is_away = False


class Contract(PublisherContract):
    """What a list does."""

    unroutable = Refused


class DropsHeaders(Right):
    def written(self, message: Message) -> Message:
        return replace(message, headers={})


class MakesIds(Right):
    def written(self, message: Message) -> Message:
        return replace(message, id=time_ordered_id())


class MakesText(Right):
    def written(self, message: Message) -> Message:
        return replace(message, payload=(message.payload or b"").decode(errors="replace").encode())


class Reverses(Right):
    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        return (await super().publish(batch[::-1]))[::-1]


class SendsTwice(Right):
    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        await super().publish(batch)
        return await super().publish(batch)


class ConfirmsEverything(Right):
    def outcome(self, message: Message) -> Outcome:
        super().outcome(message)
        return Sent()


class RefusesWhileAway(Right):
    def outcome(self, message: Message) -> Outcome:
        return Refused("away") if self.is_away else super().outcome(message)


class RefusesTheRest(Right):
    async def publish(self, batch: Sequence[Message], /) -> list[Outcome]:
        outcomes = await super().publish(batch)
        refused = [each for each in outcomes if isinstance(each, Refused)]
        return [*refused * len(batch)][: len(batch)] or outcomes


class StaysOpen(Right):
    async def aclose(self) -> None:
        """Stay open."""


Case = Callable[[Right], Awaitable[None]]
contract = Contract()


async def contents(publisher: Right) -> None:
    await contract.test_message_arrives_with_id_key_type_and_headers(publisher, publisher.received)


async def payloads(publisher: Right) -> None:
    await contract.test_bytes_arrive_as_they_are_or_are_refused(publisher, publisher.received)


async def tombstones(publisher: Right) -> None:
    await contract.test_tombstone_arrives_or_is_refused(publisher, publisher.received)


async def repetition(publisher: Right) -> None:
    await contract.test_repeated_message_has_the_same_id(publisher, publisher.received)


async def order(publisher: Right) -> None:
    await contract.test_messages_of_one_key_arrive_in_order(publisher, publisher.received, 10)


async def size(publisher: Right) -> None:
    await contract.test_too_large_message_is_refused_and_the_others_are_sent(publisher, publisher.received, LARGE)


async def route(publisher: Right) -> None:
    await contract.test_unroutable_message_is_not_sent_and_the_others_are(publisher, publisher.received)


async def absence(publisher: Right) -> None:
    await contract.test_broker_that_is_away_confirms_nothing_until_it_is_back(
        publisher, publisher.received, publisher.break_broker, publisher.mend_broker
    )


async def end(publisher: Right) -> None:
    await contract.test_closed_publisher_publishes_nothing(publisher, publisher.received)


FOUND = [
    (DropsHeaders, contents),
    (MakesIds, contents),
    (MakesIds, repetition),
    (MakesText, payloads),
    (MakesText, tombstones),
    (Reverses, order),
    (SendsTwice, order),
    (SendsTwice, repetition),
    (ConfirmsEverything, size),
    (ConfirmsEverything, route),
    (ConfirmsEverything, absence),
    (RefusesWhileAway, absence),
    (RefusesTheRest, size),
    (RefusesTheRest, route),
    (StaysOpen, end),
]


@pytest.mark.parametrize(("wrong", "case"), FOUND, ids=lambda each: each.__name__)
async def test_contract_finds_what_is_wrong(wrong: type[Right], case: Case) -> None:
    await case(Right())
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        await case(wrong())

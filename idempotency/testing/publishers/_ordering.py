"""The contract of order: messages of one key arrive in the order in which they were emitted."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

from idempotency.outbox.publisher import Publisher, Sent
from idempotency.testing.publishers._common import Contract, Receive, emitted, first_deliveries, new_message


class OrderContract(Contract):
    """Check the order of each key, in one batch and in several."""

    most: ClassVar[int] = 200
    """The messages of a batch; fewer where a broker takes its time for each."""

    @pytest.mark.parametrize("keys", [1, 10])
    async def test_messages_of_one_key_arrive_in_order(
        self, publisher: Publisher, received: Receive, keys: int
    ) -> None:
        """A batch is received in its order for each key, and each message once."""
        batch = [new_message(f"order-{number % keys}", payload=b"%d" % number) for number in range(self.most)]

        outcomes = await publisher.publish(batch)

        assert list(outcomes) == [Sent()] * self.most
        arrived = await received(self.most)
        assert len(arrived) == self.most
        assert first_deliveries(arrived, batch) == emitted(batch)

    async def test_batches_arrive_in_their_order(self, publisher: Publisher, received: Receive) -> None:
        """What is published after a batch is confirmed arrives after it."""
        batch = [new_message() for _ in range(20)]

        for message in batch:
            assert list(await publisher.publish([message])) == [Sent()]

        assert [each.id for each in await received(20)] == [message.id for message in batch]

    async def test_batches_at_once_have_their_own_outcomes(self, publisher: Publisher, received: Receive) -> None:
        """Batches of different keys that are published at once do not mix."""
        batches = [[new_message(f"order-{number}") for _ in range(20)] for number in range(5)]

        outcomes = await asyncio.gather(*map(publisher.publish, batches))

        assert [list(each) for each in outcomes] == [[Sent()] * 20] * 5
        messages = [message for batch in batches for message in batch]
        assert first_deliveries(await received(100), messages) == emitted(messages)

    async def test_message_published_twice_at_once_is_confirmed_twice(
        self, publisher: Publisher, received: Receive
    ) -> None:
        """Two relays may publish one message at the same time: each has its outcome."""
        message = new_message()

        outcomes = await asyncio.gather(publisher.publish([message]), publisher.publish([message]))

        kinds = sorted(type(outcome).__name__ for [outcome] in outcomes)
        assert kinds == sorted(["Sent", self.repeated.__name__])
        assert {each.id for each in await received(self.copies)} == {message.id}

"""The contract of refusals: what the broker never takes is refused, and the rest of its batch is sent."""

from __future__ import annotations

import asyncio

import pytest

from idempotency.outbox.publisher import Publisher, Refused, RetryLater, Sent
from idempotency.testing.publishers._common import Contract, Receive, new_message


class RefusalContract(Contract):
    """Check messages that are too large, and those that lead nowhere."""

    async def test_too_large_message_is_refused_and_the_others_are_sent(
        self, publisher: Publisher, received: Receive, too_large: int
    ) -> None:
        """It is refused at once, with a reason that does not contain it; the others of its key are sent."""
        large = new_message(payload=b"x" * too_large)
        others = [new_message(), new_message("order-2"), new_message()]

        outcomes = await publisher.publish([others[0], large, *others[1:]])

        assert isinstance(refused := outcomes[1], Refused)
        assert 0 < len(refused.reason) < 500
        assert [outcomes[0], *outcomes[2:]] == [Sent()] * 3
        arrived = [each.id for each in await received(3)]
        assert sorted(arrived) == sorted(each.id for each in others)
        assert arrived.index(others[0].id) < arrived.index(others[2].id)

    async def test_batches_at_once_do_not_share_a_refusal(
        self, publisher: Publisher, received: Receive, too_large: int
    ) -> None:
        """A message that is refused in one batch does not change the outcomes of another."""
        large = new_message("order-1", payload=b"x" * too_large)
        others = [new_message("order-2") for _ in range(20)]

        [[refused], outcomes] = await asyncio.gather(publisher.publish([large]), publisher.publish(others))

        assert isinstance(refused, Refused)
        assert list(outcomes) == [Sent()] * 20
        assert [each.id for each in await received(20)] == [each.id for each in others]

    async def test_unroutable_message_is_not_sent_and_the_others_are(
        self, publisher: Publisher, received: Receive
    ) -> None:
        """A message that no queue, topic or stream would take is not lost silently."""
        if self.unroutable is None:
            pytest.skip("the broker takes every message")
        nowhere, others = new_message(aggregate_type="nowhere"), [new_message(), new_message("order-2")]

        outcomes = await publisher.publish([others[0], nowhere, others[1]])

        assert type(outcomes[1]) is self.unroutable
        assert [outcomes[0], outcomes[2]] == [Sent()] * 2
        assert {each.id for each in await received(2)} == {each.id for each in others}

    async def test_message_is_held_back_while_an_earlier_one_of_its_key_waits(self, publisher: Publisher) -> None:
        """After a message that is to be retried, the others of its key are not tried."""
        if self.unroutable is not RetryLater:
            pytest.skip("no message is to be retried while the broker is well")
        batch = [new_message(aggregate_type="nowhere"), new_message(aggregate_type="nowhere")]

        [first, second] = await publisher.publish(batch)

        assert isinstance(first, RetryLater)
        assert not first.held
        assert isinstance(second, RetryLater)
        assert second.held

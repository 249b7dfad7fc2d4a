"""The contract of failures: a message is confirmed, or it is not; none that was confirmed is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from idempotency.outbox.publisher import Publisher, RetryLater, Sent
from idempotency.testing.publishers._common import (
    PATIENCE,
    Contract,
    Fault,
    Receive,
    confirmed,
    deliver,
    emitted,
    everything,
    first_deliveries,
    new_message,
    publish,
)

LONGEST_TIMEOUT = 5.0


class FailureContract(Contract):
    """Check brokers that break, hang and come back, cancellation, and the end."""

    async def test_broker_that_is_away_confirms_nothing_until_it_is_back(
        self, publisher: Publisher, received: Receive, break_broker: Fault, mend_broker: Fault
    ) -> None:
        """While it is away nothing is confirmed or refused; then the same publisher goes on."""
        before, batch = new_message(), [new_message() for _ in range(3)]
        assert list(await publisher.publish([before])) == [Sent()]

        await break_broker()
        outcomes = await publish(publisher, batch)
        await mend_broker()
        await deliver(publisher, batch)

        assert all(isinstance(outcome, RetryLater) for outcome in outcomes)
        messages = [before, *batch]
        assert first_deliveries(await received(4), messages) == emitted(messages)

    async def test_broker_that_is_away_at_first_is_used_when_it_is_there(
        self, publisher: Publisher, received: Receive, break_broker: Fault, mend_broker: Fault
    ) -> None:
        """The first publish may fail without harm to the next ones."""
        message = new_message()

        await break_broker()
        [outcome] = await publish(publisher, [message])
        await mend_broker()
        await deliver(publisher, [message])

        assert isinstance(outcome, RetryLater)
        assert (await received(1))[0].id == message.id

    async def test_broker_that_hangs_confirms_nothing_in_time(
        self, publisher: Publisher, received: Receive, hang_broker: Fault, mend_broker: Fault
    ) -> None:
        """The wait for a confirmation ends with the delivery time-out, and the message is published again later."""
        if publisher.delivery_timeout > LONGEST_TIMEOUT:
            pytest.skip(f"the delivery_timeout of the publisher is longer than {LONGEST_TIMEOUT} seconds")
        before, batch = new_message(), [new_message(), new_message(), new_message("order-2")]
        await publisher.publish([before])

        await hang_broker()
        started = time.monotonic()
        outcomes = await publish(publisher, batch)
        waited = time.monotonic() - started
        await mend_broker()
        await deliver(publisher, batch)

        assert all(isinstance(outcome, RetryLater) for outcome in outcomes)
        assert waited < publisher.delivery_timeout + 3
        messages = [before, *batch]
        assert first_deliveries(await received(4), messages) == emitted(messages)

    @pytest.mark.parametrize("after", [0, 30, 300])
    async def test_connection_that_breaks_in_a_batch_loses_nothing_confirmed(
        self,
        publisher: Publisher,
        received: Receive,
        cut_replies: Callable[[int], None],
        mend_broker: Fault,
        after: int,
    ) -> None:
        """What is confirmed has arrived; what is not is published again, in order."""
        batch = [new_message(f"order-{number % 5}") for number in range(50)]
        await publisher.publish([first := new_message()])

        cut_replies(after)
        outcomes = await publish(publisher, batch)
        await mend_broker()
        waiting = [each for each, outcome in zip(batch, outcomes, strict=True) if not confirmed(outcome)]
        sent = {each.id for each in batch} - {each.id for each in waiting}
        arrived = {each.id for each in await received(1 + len(sent))}
        await deliver(publisher, waiting)

        assert waiting or after
        assert sent <= arrived
        messages = [first, *batch]
        assert first_deliveries(await everything(received, 51), messages) == emitted(messages)

    async def test_cancelled_publish_does_no_harm(self, publisher: Publisher, received: Receive) -> None:
        """A publish that is cancelled in the middle leaves a publisher that works."""
        batch = [new_message() for _ in range(30)]
        for steps in (0, 1, 5, 20):
            publishing = asyncio.ensure_future(publisher.publish(batch))
            for _ in range(steps):
                await asyncio.sleep(0)
            publishing.cancel()
            with suppress(asyncio.CancelledError):
                await publishing

        await asyncio.wait_for(deliver(publisher, batch), PATIENCE)

        assert first_deliveries(await everything(received, 30), batch) == emitted(batch)

    async def test_closed_publisher_publishes_nothing(self, publisher: Publisher, received: Receive) -> None:
        """A publish after the end raises; a second end does no harm."""
        message = new_message()
        await publisher.publish([message])

        await publisher.aclose()
        await publisher.aclose()

        with pytest.raises(RuntimeError, match="closed"):
            await publisher.publish([new_message()])
        assert [each.id for each in await received(1)] == [message.id]

    async def test_publisher_that_was_never_used_can_be_closed(self, publisher: Publisher) -> None:
        """The end needs no connection."""
        await publisher.aclose()

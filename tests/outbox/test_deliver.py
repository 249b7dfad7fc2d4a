"""What becomes of each message of a batch, and when its attempt counts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from idempotency.outbox import Duplicate, Message, Outcome, Refused, RetryLater, Sent
from idempotency.outbox._deliver import Delivery, ExponentialBackoff, Judged
from idempotency.outbox._statements import Row
from idempotency.outbox.events import RelayEvent, RelayHooks
from idempotency.outbox.publisher import in_chains
from tests.kit.relays import ScriptedPublisher

HELD = RetryLater("an earlier one", held=True)


def row(seq: int, attempts: int = 0) -> Row:
    message = Message(
        id=f"id-{seq}", aggregate_type="order", aggregate_id=str(seq), type="T", payload=b"", attempt=attempts + 1
    )
    return Row(seq, 0, attempts > 0, message)


def delivery(publisher: Any = None, events: list[RelayEvent] | None = None, attempts: int = 3) -> Delivery:
    def backoff(failures: int) -> float | None:
        return None if failures >= attempts else 10.0 * failures

    noted: list[RelayEvent] = [] if events is None else events
    return Delivery(publisher or ScriptedPublisher(), backoff, RelayHooks(noted.append), "relay")


def seqs(rows: Sequence[Row]) -> list[int]:
    return [each.seq for each in rows]


def test_each_outcome_has_its_consequence() -> None:
    rows = [row(1), row(2), row(3), row(4), row(5), row(6, attempts=2)]
    outcomes: list[Outcome] = [Sent(), Duplicate(), Refused("too large"), RetryLater("busy"), HELD, RetryLater("busy")]
    judged = delivery().judge(rows, outcomes)
    assert judged.settlement.gone == [1, 2]
    assert judged.settlement.dead == {"too large": [3], "given up after 3 attempts: busy": [6]}
    assert judged.settlement.retry == {(1, 10_000): [4]}
    assert (seqs(judged.blocking), seqs(judged.untouched), judged.stalled) == ([4], [5], False)


def test_a_message_waits_as_long_as_its_broker_asks() -> None:
    outcomes = [Sent(), RetryLater("busy", after=2), RetryLater("busy", after=90)]
    judged = delivery().judge([row(1), row(2), row(3)], outcomes)
    assert judged.settlement.retry == {(1, 10_000): [2], (1, 90_000): [3]}


@pytest.mark.parametrize(
    ("asked", "milliseconds"),
    [(math.inf, 86_400_000), (1e18, 86_400_000), (math.nan, 10_000), (-5.0, 10_000)],
)
def test_a_broker_that_asks_for_no_sensible_time_stops_nothing(asked: float, milliseconds: int) -> None:
    judged = delivery().judge([row(1), row(2)], [Sent(), RetryLater("busy", after=asked)])
    assert judged.settlement.retry == {(1, milliseconds): [2]}


@pytest.mark.parametrize("returned", [math.inf, math.nan, "soon"])
def test_a_backoff_that_fails_costs_the_others_of_its_batch_nothing(returned: Any) -> None:
    under_test = Delivery(ScriptedPublisher(), lambda _: returned, RelayHooks(), "relay")
    judged = under_test.judge([row(1), row(2)], [Sent(), RetryLater("busy")])
    assert judged.settlement.retry == {(1, 60_000): [2]}


def test_every_reason_can_be_stored() -> None:
    judged = delivery().judge([row(1), row(2, attempts=2)], [Refused("a\0b\ud800"), RetryLater("\0", after=1)])
    assert judged.settlement.dead == {"a?b?": [1], "given up after 3 attempts: ?": [2]}


def test_a_broker_that_is_away_exhausts_nothing() -> None:
    under_test = delivery()
    fresh, tried = row(1), row(2, attempts=1)
    away: list[Outcome] = [RetryLater("connection lost")] * 2
    for _ in range(10):
        judged = under_test.judge([fresh, tried], away)
        assert (judged.settlement.gone, judged.settlement.dead) == ([], {})
        # The one that had failed before is put off, so that it does not stand in the way; its attempt does not count.
        assert judged.settlement.retry == {(1, 10_000): [2]}
        assert (seqs(judged.untouched), judged.stalled) == ([1], True)


def test_an_attempt_counts_if_another_message_got_through_since_the_last_one() -> None:
    under_test = delivery()
    assert retried(under_test.judge([row(1), row(2)], [RetryLater("no"), Sent()])) == 1
    assert retried(under_test.judge([row(1, attempts=1)], [RetryLater("no")])) == 1
    under_test.judge([row(3)], [Sent()])
    assert retried(under_test.judge([row(1, attempts=1)], [RetryLater("no")])) == 2


def test_a_first_attempt_while_nothing_got_through_is_the_one_before_the_next() -> None:
    """Also of a message that is tried alone, such as a row that the log has passed, and that has a new number then."""
    under_test = delivery()
    under_test.judge([row(-1), row(2)], [RetryLater("no"), RetryLater("no")])
    under_test.renumber({-1: 7})
    assert seqs(under_test.judge([row(7)], [RetryLater("no")]).untouched) == [7]
    under_test.judge([row(3)], [Sent()])
    assert retried(under_test.judge([row(7)], [RetryLater("no")])) == 1
    assert retried(under_test.judge([row(2)], [RetryLater("no")])) == 1


def test_a_message_that_is_held_back_is_not_tried() -> None:
    """So what was confirmed before it was held back counts, when it is tried again."""
    under_test = delivery()
    under_test.judge([row(1), row(2)], [RetryLater("no"), Sent()])
    under_test.judge([row(3)], [Sent()])
    assert retried(under_test.judge([row(1, attempts=1)], [HELD])) == 1
    assert retried(under_test.judge([row(1, attempts=1)], [RetryLater("no")])) == 2


def test_when_messages_were_tried_is_known_of_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that was tried first it is forgotten: its next attempt does not count by what came between."""
    monkeypatch.setattr("idempotency.outbox._deliver._MOST_TRIED", 2)
    under_test = delivery()
    failed: list[Outcome] = [RetryLater("no")]
    for seq in (1, 2, 3):
        assert retried(under_test.judge([row(seq, attempts=1)], failed)) == 1
    under_test.judge([row(4)], [Sent()])
    assert [retried(under_test.judge([row(seq, attempts=1)], failed)) for seq in (3, 2, 1)] == [2, 2, 1]


def test_a_refusal_says_nothing_about_the_broker() -> None:
    judged = delivery().judge([row(1), row(2)], [Refused("not valid"), RetryLater("connection lost")])
    assert (judged.settlement.dead, seqs(judged.untouched), judged.stalled) == ({"not valid": [1]}, [2], True)


async def test_a_publisher_that_fails_has_confirmed_nothing() -> None:
    events: list[RelayEvent] = []

    class Broken(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            raise OSError("secret")

    outcomes = await delivery(Broken(), events).publish([row(1), row(2)], lambda: 9.0)
    assert outcomes == [RetryLater("OSError")] * 2
    assert [(event.kind, event.count, event.reason) for event in events] == [("unavailable", 2, "OSError")]


async def test_that_nothing_gets_through_is_announced_once() -> None:
    """By the publisher that fails, or else by what it answers; what is held back is not at fault."""
    rows = [row(1), row(2)]
    missing, failing = list[RelayEvent](), list[RelayEvent]()
    answering = ScriptedPublisher(lambda message: HELD if message.aggregate_id == "2" else RetryLater("no stream"))

    class Broken(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            raise OSError

    for publisher, events in ((answering, missing), (Broken(), failing)):
        under_test = delivery(publisher, events)
        for _ in range(2):
            under_test.judge(rows, await under_test.publish(rows, lambda: 9.0))

    assert [(event.kind, event.count, event.reason) for event in missing] == [
        ("unavailable", 1, "no stream"),
        ("retry", 1, "an earlier one"),
    ] * 2
    assert [(event.kind, event.count, event.reason) for event in failing] == [
        ("unavailable", 2, "OSError"),
        ("retry", 2, "OSError"),
    ] * 2


async def test_a_wrong_number_of_outcomes_confirms_nothing() -> None:
    class Forgetful(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            return [Sent()]

    [first, second] = await delivery(Forgetful()).publish([row(1), row(2)], lambda: 9.0)
    assert first == second == RetryLater("ConfigurationError: the publisher returned 1 outcomes for 2 messages")


WRONG: list[tuple[Any, str]] = [
    (None, "NoneType, which is no outcome"),
    (Sent, "type, which is no outcome"),
    ("sent", "str, which is no outcome"),
    (ValueError("secret"), "ValueError, which is no outcome"),
    (Refused(None), "Refused, with a field of another type than it has"),  # type: ignore[arg-type]
    (Refused(b"secret"), "Refused, with a field of another type than it has"),  # type: ignore[arg-type]
    (RetryLater(ValueError()), "RetryLater, with a field of another type than it has"),  # type: ignore[arg-type]
    (RetryLater("busy", after="soon"), "RetryLater, with a field of another type than it has"),  # type: ignore[arg-type]
    (RetryLater("busy", held=None), "RetryLater, with a field of another type than it has"),  # type: ignore[arg-type]
]
"""What a publisher of one's own may return by mistake, and how it is described."""


@pytest.mark.parametrize(("returned", "described"), WRONG)
async def test_what_is_no_outcome_confirms_nothing_of_its_message(returned: Any, described: str) -> None:
    """The message is retried, and given up after its attempts, as one that the broker does not take."""

    class Wrong(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            return [Sent(), returned]

    reason = f"ConfigurationError: the publisher returned a {described}"
    rows, under_test = [row(1), row(2, attempts=1)], delivery(Wrong())
    outcomes = await under_test.publish(rows, lambda: 9.0)
    assert outcomes == [Sent(), RetryLater(reason)]
    judged = under_test.judge(rows, outcomes)
    assert (judged.settlement.gone, judged.settlement.retry) == ([1], {(2, 20_000): [2]})
    judged = under_test.judge([row(1), row(2, attempts=2)], outcomes)
    assert judged.settlement.dead == {f"given up after 3 attempts: {reason}": [2]}


async def test_a_publisher_that_returns_no_outcomes_has_confirmed_nothing() -> None:
    class Forgetful(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Any:
            return None

    class Raising(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Any:
            raise Refused("too large")  # type: ignore[misc]

    for publisher in (Forgetful(), Raising()):
        assert await delivery(publisher).publish([row(1)], lambda: 9.0) == [RetryLater("TypeError")]


async def test_a_driver_that_cancels_its_own_work_does_not_end_the_relay() -> None:
    async def cancelled(message: Message) -> Outcome:
        if message.aggregate_id == "1":
            raise asyncio.CancelledError
        return Sent()

    class Cancelled(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            raise asyncio.CancelledError

    rows = [row(1), row(2)]
    assert await delivery(Cancelled()).publish(rows, lambda: 9.0) == [RetryLater("ConnectionAbortedError")] * 2
    assert await in_chains([each.message for each in rows], cancelled) == [RetryLater("CancelledError"), Sent()]


async def test_chains_end_when_their_batch_is_cancelled() -> None:
    sending = asyncio.Event()

    async def send(_: Message) -> Outcome:
        sending.set()
        await asyncio.sleep(60)
        return Sent()

    batch = asyncio.ensure_future(in_chains([row(1).message], send))
    await sending.wait()
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch


async def test_a_publisher_is_cancelled_when_the_lease_is_over() -> None:
    cancelled = asyncio.Event()

    class Slow(ScriptedPublisher):
        async def publish(self, batch: Sequence[Message]) -> Sequence[Outcome]:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            return []

    ends: Callable[[], float] = iter([0.05, 0.0]).__next__
    outcomes = await delivery(Slow()).publish([row(1)], ends)
    assert outcomes == [RetryLater("TimeoutError")]
    assert cancelled.is_set()


def test_one_event_tells_of_each_kind_of_outcome() -> None:
    events: list[RelayEvent] = []
    rows = [row(1), row(2), row(3), row(4, attempts=2)]
    delivery(events=events).judge(rows, [Sent(), Sent(), Refused("too large"), RetryLater("busy")])
    assert [(event.kind, event.count, event.reason, event.relay) for event in events] == [
        ("published", 2, "", "relay"),
        ("refused", 1, "too large", "relay"),
        ("dead", 1, "busy", "relay"),
    ]


def test_the_default_backoff_doubles_up_to_five_minutes_and_ends() -> None:
    backoff = ExponentialBackoff()
    for failures, longest in ((1, 1.0), (2, 2.0), (9, 256.0), (10, 300.0), (19, 300.0)):
        pause = backoff(failures)
        assert pause is not None
        assert 0.75 * longest <= pause <= longest
    assert backoff(20) is None


def retried(judged: Judged) -> int:
    [(attempts, _)] = judged.settlement.retry
    return attempts

"""What the contract's tests have in common: messages, what a consumer receives, and publishing as a relay does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from idempotency._outbox.message import Message, time_ordered_id
from idempotency.outbox.publisher import Duplicate, Outcome, Publisher, RetryLater, Sent

PATIENCE = 20.0
"""Seconds after which a test fails because something has not happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message, as a consumer of the broker receives it.

    ``id``: from the broker's own place for identities; where it has none, the header ``id``. ``key``: from the broker's
    own place for keys, such as the key of a record; None where it has none. ``headers`` are text, without what the
    broker or its client adds. ``payload``: None for a tombstone.
    """

    id: str
    key: str | None
    headers: Mapping[str, str]
    payload: bytes | None


Receive = Callable[[int], Awaitable[Sequence[Received]]]
Fault = Callable[[], Awaitable[None]]


def new_message(key: str = "order-1", **changes: Any) -> Message:
    """Make a message with an id that does not repeat."""
    fields: dict[str, Any] = {"aggregate_type": "order", "type": "OrderPlaced", "payload": b'{"total": 7}'}
    return Message(**{"id": time_ordered_id(), "aggregate_id": key, **fields, **changes})


def confirmed(outcome: Outcome) -> bool:
    """Return whether the broker has the message."""
    return isinstance(outcome, Sent | Duplicate)


async def publish(publisher: Publisher, batch: Sequence[Message]) -> Sequence[Outcome]:
    """Publish; an error means that every message is to be retried."""
    try:
        outcomes = await publisher.publish(batch)
    except Exception as error:
        return [RetryLater(repr(error))] * len(batch)
    assert len(outcomes) == len(batch)
    return outcomes


async def deliver(publisher: Publisher, batch: Sequence[Message]) -> None:
    """Publish, as a relay does, until every message is confirmed or refused."""
    deadline = time.monotonic() + PATIENCE
    waiting = list(batch)
    while True:
        outcomes = await publish(publisher, waiting)
        waiting = [each for each, outcome in zip(waiting, outcomes, strict=True) if isinstance(outcome, RetryLater)]
        if not waiting:
            return
        assert time.monotonic() < deadline, f"{len(waiting)} of {len(batch)} are not confirmed: {outcomes}"
        await asyncio.sleep(0.05)


def first_deliveries(received: Sequence[Received], batch: Sequence[Message]) -> dict[tuple[str, str], list[str]]:
    """Return the ids of each key in the order in which they were received first."""
    keys = {message.id: message.key for message in batch}
    order: dict[tuple[str, str], list[str]] = {}
    for id_ in dict.fromkeys(each.id for each in received):
        order.setdefault(keys[id_], []).append(id_)
    return order


def emitted(batch: Sequence[Message]) -> dict[tuple[str, str], list[str]]:
    """Return the ids of each key in the order in which they were emitted."""
    order: dict[tuple[str, str], list[str]] = {}
    for message in batch:
        order.setdefault(message.key, []).append(message.id)
    return order


async def everything(received: Receive, count: int) -> Sequence[Received]:
    """Wait until ``count`` different messages have been received; return them with their copies."""
    arrived = await received(count)
    while len({each.id for each in arrived}) < count:
        arrived = await received(len(arrived) + 1)
    return arrived


class Contract:
    """What every part of the contract is given."""

    carries_keys: ClassVar[bool] = True
    """Whether ``Received.key`` is the aggregate's id; else it is None."""
    carries_tombstones: ClassVar[bool] = True
    """Whether a message without a payload arrives; else it is refused."""
    carries_bytes: ClassVar[bool] = True
    """Whether a payload that is no text arrives; else it is refused."""
    repeated: ClassVar[type[Outcome]] = Sent
    """The outcome of a message that was sent before."""
    copies: ClassVar[int] = 2
    """How often a message is received that is published twice."""
    unroutable: ClassVar[type[Outcome] | None] = None
    """The outcome of a message of the aggregate type ``nowhere``; None: it goes where the others go."""

    @pytest.fixture
    def publisher(self) -> Any:
        """Override to give an open publisher."""
        raise NotImplementedError("give the fixture publisher")

    @pytest.fixture
    def received(self) -> Receive:
        """Override to give a function that waits for messages."""
        raise NotImplementedError("give the fixture received")

    @pytest.fixture
    def too_large(self) -> int:
        """Override to give the size of a payload that the broker refuses."""
        pytest.skip("the fixture too_large is not given")

    @pytest.fixture
    def break_broker(self) -> Fault:
        """Override to give a function that makes the broker unreachable."""
        pytest.skip("the fixture break_broker is not given")

    @pytest.fixture
    def hang_broker(self) -> Fault:
        """Override to give a function after which the broker answers nothing."""
        pytest.skip("the fixture hang_broker is not given")

    @pytest.fixture
    def cut_replies(self) -> Callable[[int], None]:
        """Override to give a function that aborts the connection after so many bytes of replies."""
        pytest.skip("the fixture cut_replies is not given")

    @pytest.fixture
    def mend_broker(self) -> Fault:
        """Override to give a function that undoes the faults."""
        pytest.skip("the fixture mend_broker is not given")

"""What a relay asks of a publisher, one for each broker: one outcome for each message of a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from idempotency._outbox.message import Message


@dataclass(frozen=True, slots=True)
class Sent:
    """The broker has confirmed the message."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The broker has confirmed that it had the message before."""


@dataclass(frozen=True, slots=True)
class RetryLater:
    """The message is not confirmed, and may be sent again.

    ``after``: seconds that the broker asks to wait, at most a day, None where it says nothing. ``reason``: what went
    wrong, without the payload. ``held``: the message was not tried, because an earlier one of its key was not
    confirmed.
    """

    reason: str
    after: float | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker will never take the message: it is too large, cannot be routed, or is not valid there."""

    reason: str


Outcome = Sent | Duplicate | RetryLater | Refused

HELD = RetryLater("an earlier message of its key is not confirmed", held=True)


class Publisher(Protocol):
    """Publish messages to one broker, with its own confirmation, and the id in its own place for identities.

    :meth:`Message.wire_headers` returns the headers that go with a message.
    """

    @property
    def delivery_timeout(self) -> float:
        """Return after how many seconds a message is given up; a relay's lease must be longer."""
        ...

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """Publish the messages, and return one outcome for each, in their order.

        Messages of one key go in their order: after one that is not confirmed, the others of its key are held back.
        An error, such as a lost connection, means that no message of the batch is known to be confirmed.
        """
        ...

    async def aclose(self) -> None:
        """Close what the publisher has opened itself. After it, :meth:`publish` raises RuntimeError."""
        ...


async def in_chains(batch: Sequence[Message], send: Callable[[Message], Awaitable[Outcome]]) -> list[Outcome]:
    """Send the messages of different keys at once, and those of one key one after the other.

    After a message that is to be retried, the others of its key are held back. After one that is refused, they go on:
    it goes to the dead table. An error of ``send`` means that its message is to be retried.
    """
    outcomes: list[Outcome] = [HELD] * len(batch)
    chains: dict[tuple[str, str], list[int]] = {}
    for position, message in enumerate(batch):
        chains.setdefault(message.key, []).append(position)

    async def one_after_the_other(positions: list[int]) -> None:
        for position in positions:
            try:
                outcomes[position] = await send(batch[position])
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                outcomes[position] = RetryLater("CancelledError")
            except Exception as error:
                outcomes[position] = RetryLater(type(error).__name__)
            if isinstance(outcomes[position], RetryLater):
                return

    await asyncio.gather(*map(one_after_the_other, chains.values()))
    return outcomes


def _is_cancelled() -> bool:
    """Return whether the task that runs was cancelled, and not only something for which it waits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

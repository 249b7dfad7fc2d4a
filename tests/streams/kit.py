"""An account that is made of events, and what tests ask of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from idempotency.streams import Position, RecordedEvent, Streams
from tests.kit.ledger import Ledger

KINDS = ("sqlite", "postgres18", "mariadb")
"""PostgreSQL is a private server: on a shared one, transactions of others delay what is read."""


@dataclass(frozen=True)
class Deposited:
    """Money came."""

    amount: int


@dataclass(frozen=True)
class Withdrawn:
    """Money went."""

    amount: int
    why: str = ""


@dataclass(frozen=True)
class Account:
    """The state that tests load."""

    balance: int = 0
    events: int = 0


TYPES: Sequence[type] = (Deposited, Withdrawn)
NEW = Account()


def apply(account: Account, event: Any) -> Account:
    """Return the account after an event."""
    change = event.amount if isinstance(event, Deposited) else -event.amount
    return Account(account.balance + change, account.events + 1)


async def append(ledger: Ledger, streams: Streams, stream: str, *amounts: int, **options: Any) -> Any:
    """Append deposits in a transaction of their own."""
    async with ledger.sessions.begin() as session:
        return await streams.append(session, stream, [Deposited(amount) for amount in amounts], **options)


async def all_of(ledger: Ledger, streams: Streams, after: Position = Position()) -> list[RecordedEvent]:  # noqa: B008
    """Read all events in a transaction of its own."""
    async with ledger.sessions() as session:
        return [event async for event in streams.read_all(session, after=after)]


def shown(events: list[RecordedEvent]) -> list[tuple[str, int]]:
    """Return streams and versions."""
    return [(event.stream, event.version) for event in events]

"""Message handlers that write into a ledger."""

from __future__ import annotations

from typing import Any

from idempotency import idempotent_consumer
from idempotency.consumer import DeadLetter, Delivered, ExhaustedError
from tests.kit.ledger import Ledger

POISON = ValueError("poison")


def id_of(message: dict[str, Any]) -> str:
    """Read what identifies a message."""
    return str(message.get("id", ""))


def billing(ledger: Ledger, consumer: str = "billing", **options: Any) -> Any:
    """Make a joined consumer that has one effect."""

    @idempotent_consumer(ledger.store, consumer=consumer, key=id_of, session=ledger.sessions, **options)
    async def on_order(message: dict[str, Any], session: Any) -> dict[str, str]:
        await session.execute(ledger.insert(f"{consumer} {message['id']}"))
        return {"billed": message["id"]}

    return on_order


def poison(store: Any, runs: list[int], **options: Any) -> Any:
    """Make a consumer that always fails."""

    @idempotent_consumer(store, consumer="c", key=id_of, **options)
    async def handle(message: dict[str, Any]) -> None:
        runs.append(1)
        raise POISON

    return handle


async def redeliver(handle: Any, attempt: int | None) -> Delivered:
    """Deliver a message again, at once."""
    delivered: Delivered = await handle.deliver({"id": "1"}, attempt=attempt)
    return delivered


def redeliver_sync(handle: Any, attempt: int | None) -> Delivered:
    """Deliver a message again, at once."""
    delivered: Delivered = handle.deliver({"id": "1"}, attempt=attempt)
    return delivered


def is_refused(delivered: Delivered) -> bool:
    """Say whether a message became a dead letter without being handled once more."""
    return (
        isinstance(delivered, DeadLetter)
        and delivered.reason == "exhausted"
        and isinstance(delivered.error, ExhaustedError)
    )

"""A message of the outbox, and a slot of PostgreSQL: shown, sent at once, given up, sent again, or forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from uuid import UUID

from idempotency.web._stuck import error_class
from idempotency.web._things import Offer, Part, Thing, changed
from idempotency.web._words import Clock, ago, hidden, short, size

if TYPE_CHECKING:
    from idempotency.outbox import OutboxEntry, OutboxOperations

_SHOWN = 20
_COLUMNS = ("id", "state", "age", "attempt", "type")


class Messages:
    """The messages of an outbox."""

    def __init__(self, outbox: OutboxOperations) -> None:
        self._outbox = outbox

    async def ids(self, id: str) -> list[str]:
        """Return the id of a message, if there is one."""
        found = await self._outbox.message(id) if _is_uuid(id) else None
        return [] if found is None else [found.id]

    async def look(self, id: str, clock: Clock) -> Thing | None:
        """Return the message of an id."""
        message = await self._outbox.message(id) if _is_uuid(id) else None
        if message is None:
            return None
        of_key = await self._outbox.messages(key=message.key, limit=_SHOWN)
        rows = [[each.id, each.state, ago(each.age), str(each.attempts), each.type] for each in of_key]
        part = Part(
            title=f"Messages of the same key that wait, the first {_SHOWN}",
            columns=_COLUMNS,
            rows=rows,
            links=[f"message/{each.id}" for each in of_key],
        )
        return Thing(
            kind="message",
            id=message.id,
            facts=_facts(message, of_key, clock),
            offers=list(self._offers(message)),
            secrets={"key": message.key},
            part=part if rows else None,
        )

    def _offers(self, message: OutboxEntry) -> Iterator[Offer]:
        if message.state == "dead":
            yield self._redrive(message)
        else:
            if message.due_in is not None:
                yield self._retry(message)
            yield self._give_up(message)
        yield self._forget(message)

    def _retry(self, message: OutboxEntry) -> Offer:
        async def act(*_: object) -> str:
            return changed(await self._outbox.retry(message.id), "a relay sends it now")

        return Offer(name="retry now", help="Let a relay send it at once.", act=act)

    def _give_up(self, message: OutboxEntry) -> Offer:
        async def act(operator: str, form: Mapping[str, str]) -> str:
            reason = f"given up by {operator}: {form.get('reason', '')}"
            return changed(await self._outbox.give_up(message.id, reason), "it is dead")

        words = "Send it no more. It can be redriven later, and the messages behind it go on now."
        return Offer(name="move to dead", help=words, act=act, seen=_seen(message))

    def _redrive(self, message: OutboxEntry) -> Offer:
        async def act(*_: object) -> str:
            return changed(await self._outbox.redrive([message.id]) == 1, "it waits again, at the end of its key")

        words = "Send it again, after what waits now of its key."
        return Offer(name="redrive", help=words, act=act, seen=_seen(message))

    def _forget(self, message: OutboxEntry) -> Offer:
        async def act(*_: object) -> str:
            return changed(await self._outbox.forget(message.id), "forgotten")

        return Offer(name="forget", help="Delete it for good. It is never sent.", act=act, seen=_seen(message))


class Slots:
    """The slots of the relays that read the log of PostgreSQL. An operator drops one in the database."""

    def __init__(self, outbox: OutboxOperations) -> None:
        self._outbox = outbox

    async def look(self, id: str, _: Clock) -> Thing | None:
        """Return the slot of a name."""
        slot = (await self._outbox.slots()).get(id)
        if slot is None:
            return None
        facts = {
            "kind": "slot",
            "name": id,
            "state": "lost" if slot.lost else "read by a relay" if slot.active else "unread",
            "retained": "not known" if slot.retained is None else size(slot.retained),
            "before it is lost": "any amount" if slot.safe is None else f"{size(max(0, slot.safe))} more",
            "lost": slot.lost or "no",
            "log": slot.status or "not known",
            "read until": slot.confirmed or "nothing yet",
            "read last": slot.inactive_since or "not known",
        }
        return Thing(kind="slot", id=id, facts=facts)


def _seen(message: OutboxEntry) -> str:
    return "dead" if message.state == "dead" else "waits"


def _facts(message: OutboxEntry, of_key: list[OutboxEntry], clock: Clock) -> dict[str, str]:
    return {
        "kind": "outbox row",
        "type": message.type,
        "aggregate": f"{message.aggregate_type}, id {hidden(message.aggregate_id)}",
        "state": message.state,
        "waits for": _waits(message, of_key, clock),
        "attempts": str(message.attempts),
        "last error": error_class(message.reason) or "not known",
        "emitted": f"{clock.at(-message.age)}, {ago(message.age)}",
    }


def _waits(message: OutboxEntry, of_key: list[OutboxEntry], clock: Clock) -> str:
    if message.state == "dead":
        return "operator: it was given up"
    if message.due_in is not None:
        return f"{'retry' if message.attempts else 'its time'} {clock.due(message.due_in)}"
    if message.state == "blocked" and of_key[0].id != message.id:
        return f"key blocked by outbox row {short(of_key[0].id)}"
    return "a relay"


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True

"""The audit in Redis: a stream of bounded length, ``{prefix}:1:{audit}``.

An action has two entries: one that begins it, and one with its outcome. Both have its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from idempotency.errors import StoreError
from idempotency.stores._auditing import AUDITED, Action
from idempotency.stores.redis._clients import Clients
from idempotency.stores.redis._wire import Command, Durability, Script

_WRITE, _READ = Script("audit_write"), Script("audit_read")
_MOST = b"%d" % (2 * AUDITED)
_PAGE = 1000
"""Entries that are read by one command."""


class AuditInRedis:
    """The audit of a :class:`~idempotency.stores.redis.RedisStore`, which sets the attributes."""

    _clients: Clients
    _durability: Durability | None
    _prefix: bytes

    async def write_down(self, action: Action, /) -> None:
        """See :meth:`idempotency.stores.base.Auditing.write_down`."""
        parts = {"operator": action.operator, "action": action.name, "thing": action.thing, "reason": action.reason}
        await self._write_entry(action.id, parts)

    async def write_outcome(self, id: str, outcome: str, /) -> None:
        """See :meth:`idempotency.stores.base.Auditing.write_outcome`."""
        await self._write_entry(id, {"outcome": outcome})

    async def actions(self, limit: int = 100) -> list[Action]:
        """See :meth:`idempotency.stores.base.Auditing.actions`."""
        found: dict[str, Action] = {}
        outcomes: dict[str, str] = {}
        start = b"+"
        while len(found) < limit:
            now, entries = await self._clients.run((_READ, (b"1", self._stream, start, b"%d" % _PAGE)))
            # The newest come first, so that the outcome of an action is read before the action.
            for place, values in entries:
                fields = _fields(values)
                if "outcome" in fields:
                    outcomes[fields["id"]] = fields["outcome"]
                else:
                    found[fields["id"]] = _action(fields, outcomes, now - int(place.partition(b"-")[0]))
            if len(entries) < _PAGE:
                break
            start = b"(" + entries[-1][0]
        return list(found.values())[:limit]

    @property
    def _stream(self) -> bytes:
        return self._prefix + b"{audit}"

    async def _write_entry(self, id: str, fields: dict[str, str]) -> None:
        values = [_bytes(part) for field in ({"id": id} | fields).items() for part in field]
        command: Command = _WRITE, (b"1", self._stream, _MOST, *values)
        if self._durability is None:
            await self._clients.run(command)
            return
        _, copies = await self._run_durably(command, self._durability)
        if not self._durability.met(copies):
            raise self._too_few(copies)

    async def _run_durably(self, command: Command, durability: Durability) -> list[Any]:
        raise NotImplementedError

    def _too_few(self, copies: Any) -> StoreError:
        raise NotImplementedError


def _action(fields: dict[str, str], outcomes: dict[str, str], age: int) -> Action:
    return Action(
        id=fields["id"],
        operator=fields["operator"],
        name=fields["action"],
        thing=fields["thing"],
        reason=fields["reason"],
        outcome=outcomes.get(fields["id"]),
        age=max(0, age) / 1000,
    )


def _fields(values: Sequence[bytes]) -> dict[str, str]:
    texts = [value.decode("utf-8", "surrogatepass") for value in values]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

"""Order within a key: after a message that is to be retried, the later ones of its key wait."""

from __future__ import annotations

from collections.abc import Iterable

from idempotency.outbox._statements import Head, Key, Row


class Blocked:
    """The keys with a message that is to be retried, and where these messages are.

    Only the owner of a key's bucket changes this, so it is known in memory. A new owner reads it from the table.
    """

    def __init__(self, heads: Iterable[Head] = ()) -> None:
        self._heads: dict[Key, set[int]] = {}
        for head in heads:
            self.add(head.seq, head.key)

    @property
    def keys(self) -> list[Key]:
        """Return the keys, those first that were blocked first."""
        return list(self._heads)

    def add(self, seq: int, key: Key) -> None:
        """Block a key after the message ``seq``."""
        self._heads.setdefault(key, set()).add(seq)

    def remove(self, seq: int, key: Key) -> bool:
        """Unblock a key after the message ``seq``, which will not be retried; return whether it was blocked there."""
        heads = self._heads.get(key, set())
        if seq not in heads:
            return False
        heads.remove(seq)
        if not heads:
            del self._heads[key]
        return True

    def waits(self, row: Row) -> bool:
        """Return whether the row has to wait for an earlier one of its key."""
        heads = self._heads.get(row.message.key)
        return heads is not None and min(heads) < row.seq

"""The audit in the memory of one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from idempotency.stores._auditing import AUDITED, Action


class AuditInMemory:
    """The audit of a :class:`~idempotency.stores.memory.MemoryStore`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._now = clock
        self._actions: deque[tuple[Action, float]] = deque(maxlen=AUDITED)

    async def write_down(self, action: Action, /) -> None:
        """See :meth:`idempotency.stores.base.Auditing.write_down`."""
        self._actions.appendleft((action, self._now()))

    async def write_outcome(self, id: str, outcome: str, /) -> None:
        """See :meth:`idempotency.stores.base.Auditing.write_outcome`."""
        for place, (action, began) in enumerate(self._actions):
            if action.id == id:
                self._actions[place] = replace(action, outcome=outcome), began
                return

    async def actions(self, limit: int = 100) -> list[Action]:
        """See :meth:`idempotency.stores.base.Auditing.actions`."""
        now = self._now()
        return [replace(action, age=now - began) for action, began in islice(self._actions, limit)]

"""The first renewals of leases: one timer of an event loop for many, as most leases end before they are renewed."""

from __future__ import annotations

import asyncio
from contextvars import Context, copy_context
from typing import Protocol
from weakref import WeakKeyDictionary

_EARLY = 0.001
"""Seconds by which a timer may be early."""


class Renewable(Protocol):
    """A lease, as it is seen here."""

    def renew_soon(self) -> None:
        """Begin to renew the lease."""
        ...


class FirstRenewals:
    """The leases of one event loop that are renewed for the first time after ``pause`` seconds.

    Each is renewed in the context in which it was added. There is no timer before the next iteration of the event loop,
    since operations that wait for nothing end before it.
    """

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._due: dict[Renewable, tuple[float, Context]] = {}  # in the order of the times
        self._timer: asyncio.Handle | None = None
        self._is_planned = False

    def add(self, loop: asyncio.AbstractEventLoop, lease: Renewable) -> None:
        """Renew ``lease`` after the pause."""
        self._due[lease] = loop.time() + self._pause, copy_context()
        if self._timer is None and not self._is_planned:
            self._is_planned = True
            loop.call_soon(self._renew)

    def discard(self, lease: Renewable) -> None:
        """Forget a lease, and with the last one the timer."""
        self._due.pop(lease, None)
        if self._timer is not None and not self._due:
            self._timer.cancel()
            self._timer = None

    def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer, self._is_planned = None, False
        while self._due:
            lease, (due, context) = next(iter(self._due.items()))
            if due > loop.time() + _EARLY:
                # In an empty context: that of one request would be held for all that follow it.
                self._timer = loop.call_at(due, self._renew, context=Context())
                return
            del self._due[lease]
            context.run(lease.renew_soon)


_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[float, FirstRenewals]] = WeakKeyDictionary()


def renew_after(pause: float, lease: Renewable) -> FirstRenewals:
    """Renew ``lease`` after ``pause`` seconds, unless it is discarded from what this returns."""
    loop = asyncio.get_running_loop()
    by_pause = _by_loop.get(loop)
    if by_pause is None:
        by_pause = _by_loop[loop] = {}
    renewals = by_pause.get(pause)
    if renewals is None:
        renewals = by_pause[pause] = FirstRenewals(pause)
    renewals.add(loop, lease)
    return renewals

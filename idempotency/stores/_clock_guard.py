"""Bound what a step of the store's clock does: a live owner may look as if its lease were over.

The store's clock judges each lease, and every lease looks over when it steps forward: until the owner's next heartbeat,
which comes within a third of the lease. The clock of this process cannot step. So each claim says which end of a lease
is plausible, by the store's clock as an earlier answer showed it and by the time that has passed here since then. The
store takes over no record whose lease ends later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import NamedTuple

from idempotency._rules import Claim, Record, State

ANY = 2**53 - 1
"""Milliseconds by a store's clock that are later than any lease: nothing is known of that clock."""

_NOTICED = 0.5
"""Seconds of a step that is noticed. Two thirds of a lease remain when its owner renews it: no smaller step ends a
lease of 0.75 seconds or more."""

_ROUNDING = 0.1
"""Seconds by which a lease may end after the store's time when a claim is sent. A live one lasts for longer."""

_DRIFT = 0.001
"""Seconds by which two clocks may differ more after each second: NTP adjusts each by at most half of it."""

_MOST_DRIFT = 5.0
"""Seconds that are the most by which they may differ more, however long nothing was claimed. Else a process that has
claimed nothing for a night would not notice a step as long as a lease."""

_STEPS = 3
"""Steps that are guarded against in one row. More are several servers whose clocks differ, of which one answers now
and another then: a guard would withhold keys from claims for ever."""

_MOMENT = 1.0
"""Seconds after an answer in which another that agrees is not noted: the clocks hardly drift in that time."""

_UNIT = 0.001
"""Seconds: Redis tells whole milliseconds of its clock."""

_CALM = 600.0
"""Seconds without a step that end a row; a lease, if it is longer, for which a key is withheld after each step."""


class Asked(NamedTuple):
    """What a claim is sent with. ``latest``: the last plausible end of a lease, in milliseconds by the store's clock.

    ``sent``: the time here, before the claim was sent, in seconds.
    """

    sent: float
    latest: int


class _Anchor(NamedTuple):
    """What is known of the store's clock. Times are seconds by the clock of this process.

    ``ahead``: how far the store's clock is ahead of it, at most. ``seen``: the time of the last answer. ``moved``: the
    time of the last step, in either direction; ``steps``: the times of the last steps forward, at most of one more than
    are guarded against.
    """

    ahead: float
    seen: float
    moved: float = -inf
    steps: tuple[float, ...] = ()

    def drift(self, now: float) -> float:
        return min(_DRIFT * (now - self.seen), _MOST_DRIFT)

    def too_many(self, now: float, lease: float) -> bool:
        """Return whether there were more steps in one row than are guarded against, for claims with this lease."""
        calm = max(_CALM, lease)
        return len(self.steps) > _STEPS and all(after - step <= calm for step, after in pairwise((*self.steps, now)))

    def withheld(self, now: float, lease: float) -> float:
        """Return for how long, in seconds, claims with this lease take nothing over: live owners must renew first."""
        return self.steps[-1] + lease - now if self.steps and not self.too_many(now, lease) else 0.0

    def latest(self, now: float, lease: float) -> int:
        if self.steps:
            if self.too_many(now, lease):
                return ANY
            if self.withheld(now, lease) > 0:
                return 0  # a lease of 0 ends at 0
        return int((self.ahead + now + self.drift(now) + _ROUNDING) * 1000)

    def is_confirmed_by(self, asked: Asked, clock: float, now: float) -> bool:
        """Return whether :meth:`after` would change ``ahead`` by a unit at most, and ``seen`` by less than a second."""
        return now - self.seen < _MOMENT and clock - now - _UNIT <= self.ahead <= clock - asked.sent + _UNIT

    def after(self, asked: Asked, clock: float, now: float) -> _Anchor:
        """Return the anchor after an answer that came now: the store's clock was read between the claim and now."""
        if asked.sent < self.moved:
            return self  # it may have been read before the step
        least, most, noticed = clock - now, clock - asked.sent, _NOTICED + self.drift(now)
        if least > self.ahead + noticed:
            return _Anchor(most, now, now, (*self.steps[-_STEPS:], now))
        moved = now if most < self.ahead - noticed else self.moved
        return _Anchor(min(max(self.ahead, least), most), now, moved, self.steps)


class ClockGuard:
    """What one store object knows of its server's clock, for all of its tasks and threads. It knows nothing at first.

    The anchor is one value that is replaced as a whole. So there is no lock: two threads at the same time can lose one
    anchor, and the next answer makes it again.
    """

    __slots__ = ("_anchor", "_monotonic")

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._anchor: _Anchor | None = None

    def ask(self, claim: Claim) -> Asked:
        """Return what ``claim`` is sent with, now."""
        now, anchor = self._monotonic(), self._anchor
        return Asked(now, ANY if anchor is None else anchor.latest(now, claim.lease))

    def read(self, asked: Asked, claim: Claim, record: Record, clock: float) -> Record:
        """Return the record that answers ``claim``; ``clock`` is the store's, in milliseconds, when it was read.

        After a step, the lease of another owner may only look over. Then the record has as much of a lease as is needed
        until that owner has renewed it.
        """
        now, anchor, clock = self._monotonic(), self._anchor, clock / 1000
        if anchor is None:
            self._anchor = anchor = _Anchor(clock - asked.sent, now)
        elif not anchor.is_confirmed_by(asked, clock, now):
            self._anchor = anchor = anchor.after(asked, clock, now)
        if anchor.steps and record.state is State.RUNNING and record.lease_left <= 0:
            withheld = anchor.withheld(now, claim.lease)
            return replace(record, lease_left=withheld) if withheld > 0 else record
        return record

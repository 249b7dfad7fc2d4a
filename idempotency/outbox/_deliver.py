"""Publish a batch, and decide what becomes of each of its messages. Every relay does it in this way."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import assert_never

from idempotency._durations import DAY, milliseconds, seconds
from idempotency._outbox.message import TRACE_HEADER
from idempotency.errors import ConfigurationError
from idempotency.outbox._statements import Row, Settlement
from idempotency.outbox.events import RelayEvent, RelayEventKind, RelayHooks
from idempotency.outbox.publisher import Duplicate, Outcome, Publisher, Refused, RetryLater, Sent

Backoff = Callable[[int], float | None]
"""A function that is given how often a message has failed, and returns the seconds until the next try; None: never."""

_CANCEL = 1.0
"""Seconds in which a publisher has to end when it is cancelled."""

_SLACK = 0.5
"""Seconds more than its delivery time-out that a publisher has for its answer."""

_UNCOUNTED = 60.0
"""Seconds until a message is tried again that has no attempt to lose, and whose last one did not count."""

_MOST_TRACES = 100
"""Trace contexts of messages in one event."""

_MOST_TRIED = 100_000
"""Messages of which it is known when they were tried last. An older attempt counts by what its batch confirms."""

MOST_REASON = 500
"""Characters of a reason that are stored."""

_logger = logging.getLogger("idempotency")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialBackoff:
    """Wait ``first`` seconds, then twice as long each time, up to ``most``; after ``attempts`` failures give up.

    The time is shortened at random by up to a quarter, so that not all messages are retried in one moment.
    """

    first: float = 1.0
    most: float = 300.0
    attempts: int = 20

    def __call__(self, failures: int) -> float | None:
        """Return the seconds until the next try; None: never."""
        if failures >= self.attempts:
            return None
        pause = min(self.most, self.first * 2.0 ** min(failures - 1, 60))
        return pause * random.uniform(0.75, 1)  # noqa: S311 - it spreads load


@dataclass(slots=True)
class Judged:
    """What becomes of a batch. ``settlement`` is to be written.

    ``blocking``: rows that are to be retried. ``untouched``: rows that stay as they are. ``stalled``: whether some of
    these failed, and no message got through, so that the broker may be away.
    """

    settlement: Settlement = field(default_factory=Settlement)
    blocking: list[Row] = field(default_factory=list)
    untouched: list[Row] = field(default_factory=list)
    stalled: bool = False

    @property
    def dead(self) -> set[int]:
        """Return which rows are given up, by ``seq``."""
        return {seq for seqs in self.settlement.dead.values() for seq in seqs}


class Delivery:
    """Publish through one publisher, and count the attempts.

    An attempt of a message counts if the broker has confirmed another message since the attempt before, or in the same
    batch; or if the broker itself has asked to wait. So a broker that is away exhausts nothing.
    """

    def __init__(self, publisher: Publisher, backoff: Backoff, hooks: RelayHooks, relay: str) -> None:
        self._publisher = publisher
        self._backoff = backoff
        self._hooks = hooks
        self._relay = relay
        self._confirmations = 0
        self._tried: dict[int, int] = {}
        self._announced: set[int] = set()
        self._took = 0.0  # seconds of the slowest part of the batch that is published

    async def publish(self, rows: Sequence[Row], lease_remaining: Callable[[], float]) -> list[Outcome]:
        """Publish a batch, and return one outcome for each row; a publisher that fails has confirmed nothing.

        ``lease_remaining``: for how many seconds the relay may go on. When there are none, the publisher is cancelled.
        """
        readable = [row for row in rows if row.refused is None]
        outcomes = iter(await self._publish(readable, lease_remaining) if readable else ())
        return [next(outcomes) if row.refused is None else Refused(row.refused) for row in rows]

    async def _publish(self, rows: Sequence[Row], lease_remaining: Callable[[], float]) -> list[Outcome]:
        began = monotonic()
        try:
            return _checked(await self._in_time(rows, lease_remaining), len(rows))
        except Exception as error:
            detail = f": {error}" if isinstance(error, ConfigurationError) else ""
            reason = f"{type(error).__name__}{detail}"
            self.announce("unavailable", rows, reason)
            self._announced.update(row.seq for row in rows)
            return [RetryLater(reason)] * len(rows)
        finally:
            self._took = max(self._took, monotonic() - began)

    async def _in_time(self, rows: Sequence[Row], lease_remaining: Callable[[], float]) -> Sequence[Outcome]:
        end = monotonic() + self._publisher.delivery_timeout + _SLACK
        publishing = asyncio.ensure_future(self._publisher.publish([row.message for row in rows]))
        try:
            while not publishing.done():
                remaining = min(end - monotonic(), lease_remaining())
                if remaining <= 0:
                    raise TimeoutError
                await asyncio.wait({publishing}, timeout=remaining)
            if publishing.cancelled():
                # A driver does that when it loses its connection. It must not look as if the relay were cancelled.
                raise ConnectionAbortedError
            return publishing.result()
        finally:
            if not publishing.done():
                publishing.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({publishing}, timeout=_CANCEL)

    def judge(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> Judged:
        """Decide what becomes of each row, and count its attempt."""
        judged = Judged()
        before = self._confirmations
        self._confirmations += any(isinstance(outcome, Sent | Duplicate) for outcome in outcomes)
        pauses: dict[int, float | None] = {}
        for row, outcome in zip(rows, outcomes, strict=True):
            match outcome:
                case Sent() | Duplicate():
                    judged.settlement.gone.append(row.seq)
                case Refused(reason):
                    judged.settlement.dead.setdefault(stored_reason(reason), []).append(row.seq)
                case RetryLater():
                    tried = self._tried.get(row.seq, before)
                    counts = not outcome.held and (self._confirmations > tried or outcome.after is not None)
                    self._retry(judged, row, outcome, counts, pauses)
                case _:
                    assert_never(outcome)
        self._remember(rows, outcomes, judged)
        self._announce_all(rows, outcomes, judged)
        return judged

    def _remember(self, rows: Sequence[Row], outcomes: Sequence[Outcome], judged: Judged) -> None:
        """Note when the messages were tried that are to be retried. Those that were held back were not tried."""
        dead = judged.dead
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, RetryLater) and outcome.held:
                continue
            self._tried.pop(row.seq, None)
            if isinstance(outcome, RetryLater) and row.seq not in dead:
                self._tried[row.seq] = self._confirmations
        # Those that were tried first: others may have been deleted by hand, or be another relay's now.
        for seq in list(islice(self._tried, max(0, len(self._tried) - _MOST_TRIED))):
            del self._tried[seq]

    def _retry(
        self, judged: Judged, row: Row, outcome: RetryLater, counts: bool, pauses: dict[int, float | None]
    ) -> None:
        attempts = row.attempts + counts
        if not attempts:
            judged.untouched.append(row)
            judged.stalled |= not outcome.held
            return
        if attempts not in pauses:
            pauses[attempts] = self._pause_after(attempts)
        pause = pauses[attempts]
        if pause is None and counts:
            reason = f"given up after {attempts} attempts: {outcome.reason}"
            judged.settlement.dead.setdefault(stored_reason(reason), []).append(row.seq)
            return
        delay = milliseconds(max(_UNCOUNTED if pause is None else pause, _asked(outcome.after)))
        judged.settlement.retry.setdefault((attempts, delay), []).append(row.seq)
        judged.blocking.append(row)

    def _pause_after(self, attempts: int) -> float | None:
        try:
            pause = self._backoff(attempts)
            return None if pause is None else seconds("what backoff returns", pause)
        except Exception:
            # The outcomes of the whole batch are still to be written.
            _logger.exception("the function backoff failed")
            return _UNCOUNTED

    def renumber(self, written: Mapping[int, int]) -> None:
        """Note that messages of the log are rows now: their ``seq`` by the number that each had."""
        for number in self._tried.keys() & written.keys():
            self._tried[written[number]] = self._tried.pop(number)

    def forget(self) -> None:
        """Forget when messages were tried: they may be another relay's now."""
        self._tried.clear()
        self._announced.clear()

    def announce(
        self,
        kind: RelayEventKind,
        rows: Sequence[Row] = (),
        reason: str = "",
        count: int = 0,
        seconds: float | None = None,
    ) -> None:
        """Deliver an event about some rows, or about ``count`` buckets."""
        created = min((row.message.created for row in rows), default=None)
        oldest = 0.0 if created is None else max(0.0, time.time() - created)
        self._hooks.deliver(
            RelayEvent(
                kind=kind,
                relay=self._relay,
                count=len(rows) or count,
                oldest=oldest,
                reason=reason,
                seconds=seconds,
                traces=_traces(rows) if self._hooks.hooks else (),
            )
        )

    def _announce_all(self, rows: Sequence[Row], outcomes: Sequence[Outcome], judged: Judged) -> None:
        dead = judged.dead
        # Such as a stream that does not exist: the attempt does not count, so that only this event tells of it.
        stalled = {row.seq for row in judged.untouched} - self._announced
        self._announced.difference_update(row.seq for row in rows)
        by_kind: dict[RelayEventKind, tuple[list[Row], str]] = {}
        for row, outcome in zip(rows, outcomes, strict=True):
            kind = _kind_of(outcome, row.seq in dead, row.seq in stalled)
            reason = outcome.reason if isinstance(outcome, RetryLater | Refused) else ""
            by_kind.setdefault(kind, ([], reason))[0].append(row)
        took, self._took = self._took, 0.0
        for kind, (concerned, reason) in by_kind.items():
            self.announce(kind, concerned, reason, seconds=took)


def _traces(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the trace contexts in which messages were emitted."""
    found = (row.message.headers[TRACE_HEADER] for row in rows if TRACE_HEADER in row.message.headers)
    return tuple(islice(found, _MOST_TRACES))


def _checked(outcomes: Sequence[object], count: int) -> list[Outcome]:
    """Return the outcomes of a publisher; ConfigurationError unless there are ``count`` of them.

    What is no outcome confirms nothing: its message is to be retried.
    """
    found = list(outcomes)
    if len(found) != count:
        raise ConfigurationError(f"the publisher returned {len(found)} outcomes for {count} messages")
    return [_outcome_in(each) for each in found]


def _outcome_in(returned: object) -> Outcome:
    match returned:
        case Sent() | Duplicate() | Refused(str()) | RetryLater(str(), None | int() | float(), bool()):
            return returned
        case Refused() | RetryLater():
            what = "with a field of another type than it has"
        case _:
            what = "which is no outcome"
    # Only the name of the type: what is in it may be the payload.
    return RetryLater(f"ConfigurationError: the publisher returned a {type(returned).__name__}, {what}")


def stored_reason(reason: str) -> str:
    """Return a reason as every database can store it: without NUL, and as text in UTF-8."""
    return reason[:MOST_REASON].replace("\0", "?").encode(errors="replace").decode()


def _asked(after: float | None) -> float:
    """Return for how many seconds a broker asks to wait."""
    # Not a number is not more than 0. What is too long would be refused by the database, with the rest of the batch.
    return min(after, DAY) if after is not None and after > 0 else 0.0


def _kind_of(outcome: Outcome, dead: bool, stalled: bool) -> RelayEventKind:
    match outcome:
        case Sent():
            return "published"
        case Duplicate():
            return "duplicate"
        case Refused():
            return "refused"
        case RetryLater():
            return "dead" if dead else "unavailable" if stalled and not outcome.held else "retry"

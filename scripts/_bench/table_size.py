"""The cost of one verb while the table grows."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random
from statistics import median
from time import perf_counter_ns

from measure import Case, medians
from record_size import logged
from subjects import RESULT, Subject, claim_of

from idempotency._rules import Claim

_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)

_CHUNK = 50_000
_PURGED = 1000
_PURGES = 7
_SAMPLES = 500

_numbers = count()
_random = Random(1)


@dataclass(frozen=True)
class Cost:
    """A median in microseconds, with a table of some size, and one with the smallest table at the same time."""

    large: float
    small: float


@dataclass(frozen=True)
class Costs:
    """The costs at one size; that of a purge is per row.

    ``logged`` is in bytes: what a claim and its completion write to the log of the server. The more records there are,
    the more often they are the first after a checkpoint to change a page, which is then logged as a whole.
    """

    size: int
    claim: Cost
    complete: Cost
    replay: Cost
    purge: Cost | None
    logged: Cost | None


async def measure(subject: Subject, reference: Subject, largest: int) -> AsyncIterator[Costs]:
    """Fill ``subject`` to one size after another and measure, interleaved with ``reference``, which stays small."""
    filled = 0
    await _fill(reference, 0, _SIZES[0])
    largest = min(largest, subject.most)
    for size in sorted({size for size in _SIZES if size < largest} | {largest}):
        await _fill(subject, filled, size)
        filled = size
        took = await _medians(subject, reference, size)
        yield Costs(
            size=size,
            claim=Cost(took["claim"], took["small claim"]),
            complete=Cost(took["complete"], took["small complete"]),
            replay=Cost(took["replay"], took["small replay"]),
            purge=await _purges(subject, reference) if subject.purges else None,
            logged=await _logged(subject, reference),
        )


async def _medians(subject: Subject, reference: Subject, size: int) -> dict[str, float]:
    new, small = _New(), _New()
    for claims, store in ((new, subject.store), (small, reference.store)):
        await store.claim(claims.claim())
    return await medians(
        [
            Case("claim", new.claim, subject.store.claim),
            Case("complete", new.claimed, partial(_complete, subject)),
            Case("replay", partial(_old, size), subject.store.claim),
            Case("small claim", small.claim, reference.store.claim),
            Case("small complete", small.claimed, partial(_complete, reference)),
            Case("small replay", partial(_old, _SIZES[0]), reference.store.claim),
        ],
        _SAMPLES,
    )


class _New:
    """Claims of new keys, each to be completed later."""

    def __init__(self) -> None:
        self._claims: deque[Claim] = deque()

    def claim(self) -> Claim:
        self._claims.append(claim_of(f"new-{next(_numbers)}"))
        return self._claims[-1]

    def claimed(self) -> Claim:
        return self._claims.popleft()


async def _complete(subject: Subject, claim: Claim) -> None:
    await subject.store.complete(claim, RESULT)


async def _fill(subject: Subject, first: int, end: int) -> None:
    for start in range(first, end, _CHUNK):
        await subject.fill([_key(number) for number in range(start, min(start + _CHUNK, end))])
    await subject.settle()


async def _logged(subject: Subject, reference: Subject) -> Cost | None:
    large, small = await logged(subject), await logged(reference)
    return None if large is None or small is None else Cost(large, small)


async def _purges(subject: Subject, reference: Subject) -> Cost:
    large, small = [], []
    for _ in range(_PURGES):
        large.append(await _purge(subject))
        small.append(await _purge(reference))
    return Cost(median(large), median(small))


async def _purge(subject: Subject) -> float:
    await subject.fill_expired([f"old-{next(_numbers)}" for _ in range(_PURGED)])
    started = perf_counter_ns()
    purged = await subject.store.purge(_PURGED)
    took = perf_counter_ns() - started
    if purged != _PURGED:
        raise RuntimeError(f"purged {purged} records of {_PURGED}")
    return took / 1000 / _PURGED


def _old(size: int) -> Claim:
    return claim_of(_key(_random.randrange(size)))


def _key(number: int) -> str:
    return f"filled-{number}"

"""The cost of one verb while the table grows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random
from statistics import median
from time import perf_counter_ns

from measure import Case, medians
from subjects import Subject, claim_of

from idempotency._rules import Claim

_SIZES = (1_000, 10_000, 100_000, 1_000_000)

_CHUNK = 50_000
_PURGED = 1000
_PURGES = 7
_SAMPLES = 500

_numbers = count()
_random = Random(1)


@dataclass(frozen=True)
class Cost:
    """A median in microseconds with a table of some size, and one with the smallest table at the same time."""

    large: float
    small: float


@dataclass(frozen=True)
class Costs:
    """The costs at one size; that of a purge is per row."""

    size: int
    claim: Cost
    replay: Cost
    purge: Cost | None


async def measure(subject: Subject, reference: Subject, largest: int) -> AsyncIterator[Costs]:
    """Fill ``subject`` to one size after another and measure, interleaved with ``reference``, which stays small."""
    filled = 0
    await _fill(reference, 0, _SIZES[0])
    for size in (size for size in _SIZES if size <= largest):
        await _fill(subject, filled, size)
        filled = size
        took = await medians(
            [
                Case("claim", _new, subject.store.claim),
                Case("replay", partial(_old, size), subject.store.claim),
                Case("small claim", _new, reference.store.claim),
                Case("small replay", partial(_old, _SIZES[0]), reference.store.claim),
            ],
            _SAMPLES,
        )
        yield Costs(
            size=size,
            claim=Cost(took["claim"], took["small claim"]),
            replay=Cost(took["replay"], took["small replay"]),
            purge=await _purges(subject, reference) if subject.purges else None,
        )


async def _fill(subject: Subject, first: int, end: int) -> None:
    for start in range(first, end, _CHUNK):
        await subject.fill([_key(number) for number in range(start, min(start + _CHUNK, end))])
    await subject.settle()


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


def _new() -> Claim:
    return claim_of(f"new-{next(_numbers)}")


def _old(size: int) -> Claim:
    return claim_of(_key(_random.randrange(size)))


def _key(number: int) -> str:
    return f"filled-{number}"

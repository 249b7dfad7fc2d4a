"""What ``idempotency purge``, which deletes many expired records, costs the claims that arrive meanwhile."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import quantiles

from subjects import RESULT, Subject, claim_of

_RATE = 100
"""How many operations begin in a second, whether those before have ended or not."""

_PARTS = 10
_QUIET = 4.0
_SLICE = 0.25

_numbers = count()


@dataclass(frozen=True)
class Waits:
    """How long claims took from when they were due, in microseconds."""

    median: float
    p99: float


@dataclass(frozen=True)
class BesidePurge:
    """``quiet`` and ``again`` are every other window without a purge: by how much these differ is noise."""

    purged: int
    seconds: float
    quiet: Waits
    again: Waits
    busy: Waits


async def measure(subject: Subject, command: Sequence[str], expired: int) -> BesidePurge:
    """Purge ``expired`` records by ``command`` in parts, with a window of the same steady load before each."""
    quiet: list[list[float]] = []
    busy: list[list[float]] = []
    for part in range(_PARTS):
        await subject.fill_expired([f"expired-{part}-{number}" for number in range(expired // _PARTS)])
        await subject.settle()
        await _load(subject, _SLICE)
        quiet.append(await _load(subject, _QUIET))
        busy += await _purge(subject, command)
    return BesidePurge(
        purged=expired // _PARTS * _PARTS,
        seconds=len(busy) * _SLICE,
        quiet=_waits(quiet[::2]),
        again=_waits(quiet[1::2]),
        busy=_waits(busy),
    )


async def _purge(subject: Subject, command: Sequence[str]) -> list[list[float]]:
    """Return the waits from the first deleted batch to the end of the process, in slices."""
    oldest = await subject.oldest()
    purge = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL)
    ended = asyncio.ensure_future(purge.wait())
    while await subject.oldest() == oldest and not ended.done():
        await _load(subject, _SLICE)
    waits: list[list[float]] = []
    while not ended.done():
        waits.append(await _load(subject, _SLICE))
    if purge.returncode:
        raise RuntimeError(f"the purge ended with status {purge.returncode}")
    return waits


async def _load(subject: Subject, seconds: float) -> list[float]:
    """Begin operations at a steady rate, and return how long each claim took from when it was due."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def operation(due: float) -> float:
        claim = claim_of(f"live-{next(_numbers)}")
        await asyncio.sleep(due - loop.time())
        await subject.store.claim(claim)
        waited = loop.time() - due
        await subject.store.complete(claim, RESULT)
        return waited * 1e6

    return await asyncio.gather(*(operation(start + number / _RATE) for number in range(round(seconds * _RATE))))


def _waits(windows: Sequence[Sequence[float]]) -> Waits:
    cuts = quantiles([wait for window in windows for wait in window], n=100)
    return Waits(cuts[49], cuts[98])

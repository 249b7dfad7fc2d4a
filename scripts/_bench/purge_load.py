"""What ``idempotency purge``, which deletes many expired records, costs the claims that arrive meanwhile."""

from __future__ import annotations

import asyncio
import re
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import quantiles

from subjects import RESULT, Subject, claim_of

_RATE = 100
"""How many operations begin in a second, whether those before have ended or not."""

_WINDOW = 2.0
_CHUNK = 50_000

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
    """Purge ``expired`` records by ``command``, and stop it for every other window of a steady load."""
    for start in range(0, expired, _CHUNK):
        await subject.fill_expired([f"expired-{number}" for number in range(start, min(start + _CHUNK, expired))])
    await subject.settle()
    # The server settles too: it has written all of that.
    await _load(subject, 2 * _WINDOW)
    oldest = await subject.oldest()
    purge = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    try:
        while await subject.oldest() == oldest and purge.returncode is None:
            await _load(subject, 0.2)
        quiet, busy = await _windows(subject, purge)
    finally:
        if purge.returncode is None:
            purge.send_signal(signal.SIGCONT)
    said, _ = await purge.communicate()
    found = re.fullmatch(rb"purged (\d+) records?\n", said)
    if found is None:
        raise RuntimeError(f"the purge ended with status {purge.returncode}")
    return BesidePurge(
        purged=int(found[1]),
        seconds=len(busy) * _WINDOW,
        quiet=_waits(quiet[::2]),
        again=_waits(quiet[1::2]),
        busy=_waits(busy),
    )


async def _windows(subject: Subject, purge: Process) -> tuple[list[list[float]], list[list[float]]]:
    """Return the waits of each window without the purge and with it, until the purge ends."""
    quiet: list[list[float]] = []
    busy: list[list[float]] = []
    ended = asyncio.ensure_future(purge.wait())
    while not ended.done():
        purge.send_signal(signal.SIGSTOP)
        quiet.append(await _load(subject, _WINDOW))
        purge.send_signal(signal.SIGCONT)
        waits = await _load(subject, _WINDOW)
        if not ended.done():
            busy.append(waits)
    return quiet, busy


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

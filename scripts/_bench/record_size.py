"""How many bytes a server stores for a record, and how many it logs for a claim and its completion."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from subjects import RESULT, Subject, claim_of

_RECORDS = 100_000
_LOGGED = 500

_numbers = count()


@dataclass(frozen=True)
class RecordSize:
    """Bytes per record, by what the server stores them for."""

    parts: dict[str, float]

    @property
    def above_result(self) -> float:
        """Return what is stored, without the result itself."""
        return sum(self.parts.values()) - len(RESULT)


async def measure(subject: Subject) -> RecordSize | None:
    """Fill ``subject``, which is empty; None if its server does not say what it uses."""
    before = await subject.stored()
    if not before:
        return None
    await subject.fill([f"filled-{number}" for number in range(_RECORDS)])
    await subject.settle()
    after = await subject.stored()
    return RecordSize({part: (size - before[part]) / _RECORDS for part, size in after.items()})


async def logged(subject: Subject) -> float | None:
    """Return how many bytes of log a claim and its completion write, the result included; None without a log."""
    before = await subject.logged()
    if before is None:
        return None
    for _ in range(_LOGGED):
        claim = claim_of(f"logged-{next(_numbers)}")
        await subject.store.claim(claim)
        await subject.store.complete(claim, RESULT)
    after = await subject.logged()
    return None if after is None else (after - before) / _LOGGED

"""What is wrong with what readers got, compared with what writers know: of each transaction, how it ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

Batch = tuple[str, int]
"""A writer, and which of its transactions."""

_NO_BATCH = -1


@dataclass
class Attempt:
    """One transaction. ``end``: "committed"; "refused" or "undone"; "begun" where its process does not know."""

    stream: str
    size: int
    end: str = "begun"


class Delivered(NamedTuple):
    """One event as a reader got it."""

    position: tuple[int, int]
    stream: str
    version: int
    batch: Batch
    number: int


@dataclass(frozen=True)
class Wrong:
    """How many events are wrong, over all readers.

    ``lost``: they are committed, or another reader got them. ``rolled_back``: they never were, and were read. ``torn``:
    of a transaction that may have committed, a part is there. ``disordered``: before what they follow.
    """

    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    rolled_back: int = 0
    torn: int = 0

    @property
    def ok(self) -> bool:
        return not any(astuple(self))


def attempts_in(directory: Path) -> dict[Batch, Attempt]:
    """Read what all writers have noted."""
    found: dict[Batch, Attempt] = {}
    for path in sorted(directory.glob("writer-*")):
        writer = path.name.removeprefix("writer-")
        for line in path.read_text().splitlines():
            number, end, *rest = line.split()
            if end == "begun":
                found[writer, int(number)] = Attempt(rest[0], int(rest[1]))
            else:
                found[writer, int(number)].end = end
    return found


def delivered_in(path: Path) -> list[Delivered]:
    """Read what a reader has noted."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        if not line.startswith("="):
            position, stream, version, writer, batch, number = line.split()
            place, seq = position.split(".")
            found.append(Delivered((int(place), int(seq)), stream, int(version), (writer, int(batch)), int(number)))
    return found


def compare(attempts: dict[Batch, Attempt], readers: Sequence[Sequence[Delivered]]) -> Wrong:
    """Return what is wrong in what all readers got."""
    there = {batch for batch, attempt in attempts.items() if attempt.end == "committed"}
    # If a transaction's end is not known, it is enough that all readers get it, or none.
    there |= {each.batch for reader in readers for each in reader if attempts[each.batch].end == "begun"}
    wrong = Counter[str]()
    for reader in readers:
        got = Counter((each.batch, each.number) for each in reader)
        wrong["doubled"] += sum(got.values()) - len(got)
        wrong["disordered"] += _disordered(reader)
        of_batch: dict[Batch, int] = defaultdict(int)
        for batch, _ in got:
            of_batch[batch] += 1
        wrong["rolled_back"] += sum(count for batch, count in of_batch.items() if batch not in there)
        for batch in there:
            missing = attempts[batch].size - of_batch[batch]
            torn = attempts[batch].end == "begun" and of_batch[batch]
            wrong["torn" if torn else "lost"] += missing
    # Each in an order that can be, but not in the same.
    wrong["disordered"] += sum(list(reader) != list(readers[0]) for reader in readers) if not wrong.total() else 0
    return Wrong(**wrong)


def _disordered(reader: Sequence[Delivered]) -> int:
    """Count events that are not after the one before, the one before in their stream, or in their writer's order."""
    position, versions, ends, found = (0, 0), Counter[str](), dict[str, tuple[int, int]](), 0
    for each in reader:
        writer, batch = each.batch
        last = ends.get(writer, (_NO_BATCH, 0))
        in_writer = (batch, each.number) == (last[0], last[1] + 1) or (batch > last[0] and each.number == 0)
        in_stream = each.version == versions[each.stream] + 1
        found += not (each.position > position and in_stream and in_writer)
        position, versions[each.stream], ends[writer] = each.position, each.version, (batch, each.number)
    return found

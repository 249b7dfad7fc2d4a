"""What is compared of a message whose client has decoded it: the same at each delivery, in any process."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from idempotency.adapters._body import as_bytes

Pair = namedtuple("Pair", ["first", "second"])


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Line:
    """A line of an order."""

    item: str
    count: Any = 1


class Order(BaseModel):
    """An order, as an annotation of a task reads it."""

    item: str
    at: datetime | None = None


class Opaque:
    """An object that shows nothing of itself, and whose ``repr`` is another in each process."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"order", b"order"),
        (bytearray(b"order"), b"order"),
        (memoryview(b"order"), b"order"),
        (None, b""),
        ("order \ud800", b"order \xed\xa0\x80"),
        ([(), {}], b"[[], {}]"),
        ([("A-1", 5), {"b": 1, "a": 1.5}], b'[["A-1", 5], {"a": 1.5, "b": 1}]'),
    ],
)
def test_bytes_and_plain_values_are_compared_as_they_are(value: object, expected: bytes) -> None:
    """Raw bodies are not touched, and of plain values the order of names does not matter."""
    assert as_bytes(value) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda other: b"\xff" + bytes([other]),
        lambda other: {"a", "b", other},
        lambda other: frozenset({1, other}),
        lambda other: Decimal(f"1.{other}"),
        lambda other: UUID(int=other),
        lambda other: datetime(2024, 1, 1, other, tzinfo=UTC),
        lambda other: date(2024, 1, 1 + other),
        lambda other: time(other),
        lambda other: timedelta(other),
        lambda other: list(Colour)[other],
        lambda other: Line("tea", other),
        lambda other: Line("tea", Opaque() if other else 0),
        lambda other: Order(item="tea", at=datetime(2024, 1, 1, other)),
        lambda other: Pair(1, other),
        lambda other: OrderedDict(b=1, a=other),
        lambda other: MappingProxyType({"a": other}),
    ],
)
def test_values_that_are_no_json_are_compared(make: Callable[[int], Any]) -> None:
    """What pickle, YAML, or an annotation made of an argument is the same if it is equal, and else another."""
    first, again, other = (as_bytes([make(each)]) for each in (0, 0, 1))

    assert first is not None
    assert first == again != other


def test_an_object_that_shows_nothing_is_never_another_one() -> None:
    """Its delivery again makes an object anew, which must not look like another message; the rest is compared."""
    assert as_bytes([Opaque(), 1]) == as_bytes([Opaque(), 1]) != as_bytes([Opaque(), 2])


def test_what_cannot_be_written_down_is_not_compared() -> None:
    """Nothing is compared rather than something else at each delivery."""
    endless: list[Any] = []
    endless.append(endless)

    assert as_bytes({(1, 2): 3}) is None
    assert as_bytes(endless) is None


def test_a_set_is_the_same_in_another_process() -> None:
    """Its order there is another."""
    program = "from idempotency.adapters._body import as_bytes; print(as_bytes([{str(n) for n in range(50)}]))"
    found = {
        subprocess.check_output(
            [sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    }
    assert len(found) == 1

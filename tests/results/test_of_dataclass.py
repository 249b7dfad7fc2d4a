"""Dataclasses as JSON: what the function made for a class reads and writes, and what it leaves to the general one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from idempotency.errors import UnreadableError
from idempotency.streams import Versioned


@dataclass(frozen=True)
class Paid:
    amount: int
    currency: str = "EUR"


@dataclass(kw_only=True)
class Named:
    name: str


@dataclass(init=False)
class Reversed:
    first: int
    second: int

    def __init__(self, second: int, first: int) -> None:
        self.first, self.second = first, second


@dataclass
class Weighed:
    kilograms: float
    note: None = None


@dataclass
class Nested:
    paid: Paid
    tags: list[str] = field(default_factory=list)


@dataclass
class Counted(list[int]):
    number: int


@dataclass
class Capital:
    name: str

    def __post_init__(self) -> None:
        self.name = self.name.upper()


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        (Paid, '{"amount":5,"currency":"USD"}', Paid(5, "USD")),
        (Paid, '{"currency":"USD","amount":5}', Paid(5, "USD")),
        (Paid, ' {"amount": 5, "currency": "USD"} ', Paid(5, "USD")),
        (Paid, b'{"amount":5,"currency":"USD"}', Paid(5, "USD")),
        (Paid, '{"amount":5}', Paid(5, "EUR")),
        (Paid, '{"amount":5,"by":"card"}', Paid(5, "EUR")),
        (Paid, '{"amount":5,"currency":"USD","by":"card"}', Paid(5, "USD")),
        (Named, '{"name":"a"}', Named(name="a")),
        (Reversed, '{"first":1,"second":2}', Reversed(first=1, second=2)),
        (Weighed, '{"kilograms":5,"note":null}', Weighed(5)),
        (Weighed, '{"kilograms":1.5,"by":1}', Weighed(1.5)),
        (Nested, '{"paid":{"amount":5},"tags":["a"]}', Nested(Paid(5), ["a"])),
        (Capital, '{"name":"a"}', Capital("A")),
    ],
)
def test_json_is_read(kind: type, data: str, expected: object) -> None:
    """Fields may be in any order; what is missing has its default, and what the class does not know is ignored."""
    assert Versioned(kind).load(1, data) == expected


@pytest.mark.parametrize(
    "data",
    [
        '{"amount":true,"currency":"USD"}',
        '{"amount":5.0,"currency":"USD"}',
        '{"amount":5,"currency":null}',
        '{"currency":"USD"}',
        '{"currency":"USD","by":"card"}',
        '["amount","currency"]',
        '"amount"',
        "null",
        '{"amount":5,"currency":"USD"} x',
        '{"amount":5,"currency":"USD"',
        "",
    ],
)
def test_other_json_is_unreadable(data: str) -> None:
    """A field of another type, a missing one, and what is no object of JSON, are an UnreadableError."""
    with pytest.raises(UnreadableError, match="what is stored is no Paid of version 1"):
        Versioned(Paid).load(1, data)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Paid(5), b'{"amount":5,"currency":"EUR"}'),
        (Named(name="ä"), b'{"name":"\\u00e4"}'),
        (Reversed(first=1, second=2), b'{"first":1,"second":2}'),
        (Weighed(5), b'{"kilograms":5,"note":null}'),
        (Weighed(1.5), b'{"kilograms":1.5,"note":null}'),
        (Nested(Paid(5), ["a"]), b'{"paid":{"amount":5,"currency":"EUR"},"tags":["a"]}'),
        (Capital("a"), b'{"name":"A"}'),
    ],
)
def test_values_are_written_in_the_order_of_their_fields(value: Any, expected: bytes) -> None:
    """The stored form is the same for every kind of dataclass."""
    assert Versioned(type(value)).dump(value) == expected


def _changed() -> Capital:
    value = Capital("a")
    value.name = "b"
    return value


def _counted() -> Counted:
    value = Counted(1)
    value.append(5)
    return value


class _Larger(Paid):
    pass


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Paid, Paid(True)),
        (Paid, Paid(5, 1)),  # type: ignore[arg-type]
        (Paid, _Larger(5)),
        (Paid, {"amount": 5, "currency": "EUR"}),
        (Weighed, Weighed(float("nan"))),
        (Capital, _changed()),
        (Counted, _counted()),
    ],
)
def test_what_would_not_come_back_is_not_written(kind: type, value: object) -> None:
    """A value of another type, one that its class changes, and one with more than its fields, are refused."""
    with pytest.raises((TypeError, ValueError)):
        Versioned(kind).dump(value)

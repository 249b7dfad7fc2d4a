"""Results as bytes: what comes back equals what went in, or is refused."""

from __future__ import annotations

import enum
import functools
import typing
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType, NotRequired, TypedDict, TypeVar
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, computed_field, field_serializer

from idempotency._results.codec import results_of
from idempotency.errors import ConfigurationError, UnreadableError

OrderId = NewType("OrderId", int)
T = TypeVar("T")


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Size(enum.StrEnum):
    SMALL = "s"


class Point(tuple[int, int], enum.Enum):
    ORIGIN = (0, 0)


class Flags(enum.Flag):
    A = 1


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal
    colour: Colour = Colour.RED


@dataclass
class Order:
    id: OrderId
    lines: list[Line]
    parent: Order | None = None
    seen: dict[str, datetime] = field(default_factory=dict)


@dataclass
class SpecialOrder(Order):
    gift: bool = False


class Address(TypedDict):
    street: str
    zip: NotRequired[int]


class Receipt(BaseModel):
    number: int
    total: Decimal = Field(alias="grandTotal")
    at: datetime

    @computed_field
    def text(self) -> str:
        return f"{self.total}"


class Renamed(BaseModel):
    number: int = Field(validation_alias="no", serialization_alias="num")
    at: datetime = Field(validation_alias="when")


class Closed(BaseModel, extra="forbid"):
    number: int

    @computed_field
    def text(self) -> str:
        return f"{self.number}"


class OneWay(BaseModel):
    at: date

    @field_serializer("at")
    def write(self, at: date) -> str:
        return f"the {at.day}th"


@dataclass
class Status:
    id: int
    state: str = field(init=False, default="new")


@dataclass
class Cents:
    amount: int

    def __post_init__(self) -> None:
        self.amount *= 100


@dataclass
class Hashed:
    id: int
    secret: InitVar[str]


class Sent(TypedDict):
    parcel: int


class Opaque:
    pass


class Days(timedelta):
    pass


class Text(str):
    __slots__ = ()


@dataclass
class Interval:
    """What other libraries call a time span: it has the attributes of a timedelta."""

    days: int
    seconds: int = 0
    microseconds: int = 0


@dataclass
class Rounded:
    amount: Decimal

    def __post_init__(self) -> None:
        self.amount = self.amount.normalize()


class Loose(BaseModel):
    data: Any


def paid() -> Status:
    """Make a status that its own fields do not tell."""
    status = Status(1)
    status.state = "paid"
    return status


def unrounded() -> Rounded:
    """Make an amount that comes back equal, but with other digits."""
    rounded = Rounded(Decimal("1.10"))
    rounded.amount = Decimal("1.10")
    return rounded


def returning(annotation: Any) -> Any:
    """Make a function with this return annotation."""

    def function() -> None: ...

    function.__annotations__["return"] = annotation
    return function


NOW = datetime(2026, 11, 23, 1, 2, 3, 456789, tzinfo=UTC)

KEPT = [
    (None, None),
    (bool, True),
    (int, 2**80),
    (float, 0.1),
    (float, 3),
    (float, 2**53 + 1),
    (float | None, 3),
    (str, "naïve \ud800 text"),
    (bytes, b"\x00\xff"),
    (list[bytes], [b"\x00\xff", b""]),
    (list[int], [1, 2]),
    (list, [1, [None, {"a": 1.5}]]),
    (dict, {"a": [True]}),
    (Any, {"a": None}),
    (set[str], {"a", "b"}),
    (frozenset[int], frozenset({1})),
    (dict[str, list[int]], {"a": [1]}),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], (1, 2, 3)),
    (tuple[()], ()),
    (int | None, None),
    (int | None, 5),
    (int | str, "5"),
    (int | str | None, None),
    (float | int, 3),
    (float | int, 10**400),
    (Address | Sent, {"parcel": 1}),
    (Line | Order, Line("a", Decimal("1.10"))),
    (Status, Status(1)),
    (Literal["a", 1], 1),
    (Annotated[int, "positive"], 1),
    (OrderId, OrderId(7)),
    (datetime, NOW),
    (datetime, datetime(2026, 1, 1)),
    (date, date(2026, 1, 1)),
    (time, time(1, 2, 3)),
    (timedelta, timedelta(days=-1, microseconds=5)),
    (Decimal, Decimal("1.10")),
    (UUID, UUID(int=5)),
    (Colour, Colour.BLUE),
    (Size, Size.SMALL),
    (Size | None, Size.SMALL),
    (Point, Point.ORIGIN),
    (tuple, (1, "a")),
    (set, {1}),
    (frozenset, frozenset({1})),
    (typing.List, [1]),  # noqa: UP006
    (typing.Dict, {"a": 1}),  # noqa: UP006
    (typing.Tuple, (1, 2)),  # noqa: UP006
    (Renamed, Renamed(no=1, when=NOW)),
    (list[Renamed | Closed], [Renamed(no=1, when=NOW), Closed(number=1)]),
    (Order, Order(OrderId(1), [Line("a", Decimal("0.3"), Colour.BLUE)], Order(OrderId(2), []), {"x": NOW})),
    (list[Address], [{"street": "Elm"}, {"street": "Oak", "zip": 1}]),
    (Receipt, Receipt(number=1, grandTotal=Decimal("9.90"), at=NOW)),
    (list[Receipt] | None, [Receipt(number=1, grandTotal=Decimal("9.90"), at=NOW)]),
]


@pytest.mark.parametrize(("annotation", "value"), KEPT)
def test_what_went_in_comes_back(annotation: Any, value: Any) -> None:
    """A value of the annotated type comes back equal, and of the same type."""
    results = results_of(returning(annotation))

    found = results.decode(results.encode(value))

    assert found == value
    assert type(found) is type(value)


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
DECIMALS = st.decimals(allow_nan=True, allow_infinity=True) | st.sampled_from(
    [Decimal("-0.00"), Decimal("NaN123"), Decimal("-sNaN"), Decimal("-Infinity"), Decimal("1E+30")]
)
NESTED = dict[str, list[tuple[float, Decimal | None, bytes]]]


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.tuples(st.just(float), FLOATS | st.integers()),
        st.tuples(st.just(float | int), FLOATS | st.integers()),
        st.tuples(st.just(Decimal), DECIMALS),
        st.tuples(st.just(str), st.text(st.characters())),
        st.tuples(st.just(timedelta), st.timedeltas()),
        st.tuples(st.just(UUID | date | None), st.uuids() | st.dates() | st.none()),
        st.tuples(st.just(tuple[bytes, ...]), st.lists(st.binary(max_size=9), max_size=3).map(tuple)),
        st.tuples(st.just(Line), st.builds(Line, st.text(), DECIMALS, st.sampled_from(Colour))),
        st.tuples(
            st.just(NESTED),
            st.dictionaries(
                st.text(),
                st.lists(st.tuples(FLOATS, st.none() | DECIMALS, st.binary(max_size=9)), max_size=2),
                max_size=2,
            ),
        ),
    )
)
def test_any_value_comes_back_the_same(each: tuple[Any, Any]) -> None:
    """Types, signs of zero, digits of a Decimal and the order of a dict are those that went in."""
    annotation, value = each
    results = results_of(returning(annotation))

    assert repr(results.decode(results.encode(value))) == repr(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, True),
        (int, "1"),
        (str, None),
        (float, float("nan")),
        (bytes, bytearray(b"x")),
        (list[int], [1, "2"]),
        (list[int], (1, 2)),
        (tuple[int, str], (1,)),
        (dict[str, int], {1: 1}),
        (dict, {"a": (1,)}),
        (int | str, 1.5),
        (Literal["a"], "b"),
        (Literal[1], True),
        (Order, SpecialOrder(OrderId(1), [])),
        (Order, Order(OrderId(1), [1])),  # type: ignore[list-item]
        (Address, {"street": "Elm", "town": "x"}),
        (Colour, "r"),
        (OneWay, OneWay(at=date(2026, 1, 5))),
        (Status, paid()),
        (Cents, Cents(5)),
        (None, 0),
        (timedelta, Days(1)),
        (timedelta, Interval(1)),
        (Rounded, unrounded()),
        (Loose, Loose(data=Colour)),
        (Loose, Loose(data=Text("a"))),
        (Loose, Loose(data=NOW)),
    ],
)
def test_what_would_not_come_back_is_not_kept(annotation: Any, value: Any) -> None:
    """A value that is not exactly of the annotated type is refused, never changed."""
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
        results_of(returning(annotation)).encode(value)


@pytest.mark.parametrize("value", [(1,), {1: 2}, {1, 2}, b"x", NOW, Colour.RED, object(), float("inf")])
def test_without_an_annotation_only_json_is_kept(value: Any) -> None:
    """A function without a return annotation keeps what JSON itself knows, and nothing that it would change."""

    def function(): ...

    results = results_of(function)

    assert results.decode(results.encode({"a": [1, None]})) == {"a": [1, None]}
    with pytest.raises((TypeError, ValueError)):
        results.encode(value)


@pytest.mark.parametrize(
    "annotation", [Opaque, list[Opaque], dict[int, str], T, Flags, "Missing", Literal[b"x"], type, Hashed]
)
def test_an_annotation_that_cannot_be_kept_is_refused(annotation: Any) -> None:
    """What no value of could be kept is refused before the function ever runs."""
    with pytest.raises(ConfigurationError, match="codec="):
        results_of(returning(annotation))


def test_only_the_return_annotation_is_looked_up() -> None:
    """A parameter whose type is imported for type checkers alone does not matter."""

    def function(session: Nowhere) -> int: ...  # type: ignore[name-defined]  # noqa: F821

    assert results_of(function).decode(results_of(function).encode(1)) == 1


def test_a_wrapped_function_is_looked_through() -> None:
    """The annotation is that of the function inside decorators."""

    def function() -> Decimal: ...

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any: ...

    results = results_of(wrapper)
    assert results.decode(results.encode(Decimal("1.0"))) == Decimal("1.0")


def test_the_bytes_are_as_they_always_were() -> None:
    """The stored form is a contract: version, kind, value."""
    assert results_of(returning(Line)).encode(Line("a", Decimal("1.10"))) == (
        b'\x01j{"sku":"a","price":"1.10","colour":"RED"}'
    )
    assert results_of(returning(bytes)).encode(b"raw") == b"\x01braw"
    assert results_of(returning(int | str)).encode("x") == b'\x01j[1,"x"]'
    assert results_of(returning(timedelta)).encode(timedelta(1, 2, 3)) == b"\x01j[1,2,3]"


@pytest.mark.parametrize(
    "data", [b"", b"\x01", b"\x02j1", b"\x01b1", b"\x01x1", b"\x01j", b"\x01jnull", b"\x01j{", b'\x01j"1"']
)
def test_other_bytes_are_unreadable(data: bytes) -> None:
    """What this function cannot have recorded is an UnreadableError, never a value."""
    with pytest.raises(UnreadableError):
        results_of(returning(int)).decode(data)


def test_a_changed_class_is_unreadable() -> None:
    """A record that lacks what the class needs today is not guessed at."""
    with pytest.raises(UnreadableError):
        results_of(returning(Line)).decode(b'\x01j{"sku":"a"}')
    with pytest.raises(UnreadableError):
        results_of(returning(Receipt)).decode(b'\x01j{"number":1}')


def test_a_codec_of_the_callers_own() -> None:
    """``codec=`` decides alone, whatever the annotation."""

    class Latin:
        def encode(self, value: str) -> bytes:
            return value.encode("latin-1")

        def decode(self, data: bytes) -> str:
            return data.decode("latin-1")

    results = results_of(returning(Opaque), Latin())

    assert results.encode("é") == b"\x01c\xe9"
    assert results.decode(b"\x01c\xe9") == "é"
    with pytest.raises(UnicodeEncodeError):
        results.encode("€")
    with pytest.raises(UnreadableError):
        results_of(returning(int)).decode(results.encode("é"))


@dataclass
class Node:
    value: int
    below: Node | None = None


def test_a_deep_result_takes_no_longer_than_it_is_large() -> None:
    """The depth of classes within classes is not an exponent: this would take longer than anybody waits."""
    deep = Node(0)
    for value in range(1, 41):
        deep = Node(value, deep)
    results = results_of(returning(Node))

    assert results.decode(results.encode(deep)) == deep

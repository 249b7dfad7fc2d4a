"""Changes of what is stored: which are allowed, by verdicts that were written before the code."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired, TypedDict
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field

from idempotency._results.by_annotation import dump, load, shape_of
from idempotency.contracts._rules import changes_between
from idempotency.contracts._schema import schema_of


@dataclass
class Item:
    sku: str


@dataclass
class ItemWithNote:
    sku: str
    note: str = ""


@dataclass
class ItemByNumber:
    sku: int


@dataclass
class Order:
    id: str
    amount: int


@dataclass
class WithDefault:
    id: str
    amount: int
    note: str = ""


@dataclass
class OtherDefault:
    """Another text about the class."""

    id: str
    amount: int
    note: str = field(default_factory=lambda: "none")


@dataclass
class WithRequired:
    id: str
    amount: int
    note: str


@dataclass
class Reordered:
    amount: int
    id: str


@dataclass
class AmountAsText:
    id: str
    amount: str


@dataclass
class AmountAsFloat:
    id: str
    amount: float


@dataclass
class WithoutAmount:
    id: str


@dataclass
class Renamed:
    id: str
    total: int


@dataclass
class Optional:
    id: str
    amount: int | None


@dataclass
class Nested:
    items: list[Item]


@dataclass
class NestedWithNote:
    items: list[ItemWithNote]


@dataclass
class NestedByNumber:
    items: list[ItemByNumber]


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class OtherValues(enum.Enum):
    BLUE = 2
    RED = 1


class MoreColours(enum.Enum):
    RED = "r"
    BLUE = "b"
    GREEN = "g"


class Row(TypedDict):
    id: str


class RowWithNote(TypedDict):
    id: str
    note: NotRequired[str]


class Model(BaseModel):
    amount: int = Field(ge=0)


class Documented(BaseModel):
    """A documented model."""

    amount: int = Field(ge=0, description="in cents", examples=[5])


class Tightened(BaseModel):
    amount: int = Field(ge=1)


class Widened(BaseModel):
    amount: int


class ModelWithNote(Model):
    note: str = ""


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    amount: int


class ClosedWithNote(Closed):
    note: str = ""


@dataclass
class Tree:
    below: list[Tree]
    beside: Tree | None


@dataclass
class TreeWithNote:
    below: list[TreeWithNote]
    beside: TreeWithNote | None
    note: str = ""


@dataclass
class TreeByNumber:
    below: list[TreeByNumber]
    beside: TreeByNumber | None
    number: int


ALLOWED = {
    "a field with a default is added": (Order, WithDefault),
    "a field with a default is removed": (WithDefault, Order),
    "a default and a docstring are changed": (WithDefault, OtherDefault),
    "fields are reordered": (Order, Reordered),
    "a class in a list has a new field with a default": (Nested, NestedWithNote),
    "values of an enum are changed, whose names are stored": (Colour, OtherValues),
    "a key that is not required is added": (Row, RowWithNote),
    "literals are reordered": (Literal["a", 1], Literal[1, "a"]),
    "a description is added to a model": (Model, Documented),
    "a field with a default is added to a model": (Model, ModelWithNote),
    "a class that contains itself has a new field with a default": (Tree, TreeWithNote),
    "Optional is written in the other order": (int | None, None | int),
    "a literal becomes an enum of the same names": (Literal["RED", "BLUE"], Colour),
    "a set becomes a frozenset, a list a tuple of any length": (
        tuple[set[int], list[int]],
        tuple[frozenset[int], tuple[int, ...]],
    ),
    "an annotation is decorated": (Decimal, Annotated[Decimal, "money"]),
}

REFUSED = {
    "a required field is added": (Order, WithRequired, ["note: required field added"]),
    "a required field is removed": (Order, WithoutAmount, ["amount: required field removed"]),
    "a type is changed": (Order, AmountAsText, ["amount: type changed"]),
    "int becomes float": (Order, AmountAsFloat, ["amount: type widened"]),
    "float becomes int": (AmountAsFloat, Order, ["amount: type narrowed"]),
    "a field may be null": (Order, Optional, ["amount: type widened"]),
    "a default is removed": (WithDefault, WithRequired, ["note: optional field made required"]),
    "a default is given": (WithRequired, WithDefault, ["note: required field made optional"]),
    "a field is renamed": (Order, Renamed, ["amount: required field removed", "total: required field added"]),
    "a nested type is changed": (Nested, NestedByNumber, ["items[].sku: type changed"]),
    "a member of an enum is added": (Colour, MoreColours, ["value added"]),
    "a member of an enum is removed": (MoreColours, Colour, ["value removed"]),
    "a literal is added": (Literal["a"], Literal["a", "b"], ["value added"]),
    "a literal is of another type": (Literal[1], Literal[True], ["value added", "value removed"]),
    "a union is widened": (int | str, int | str | bool, ["type widened"]),
    "the members of a union change places": (int | str, str | int, ["[0]: type changed", "[1]: type changed"]),
    "text becomes a datetime": (str, datetime, ["format changed", "type widened"]),
    "a constraint is tightened": (Model, Tightened, ["amount: constraint tightened"]),
    "a constraint is widened": (Model, Widened, ["amount: constraint widened"]),
    "a field is added to a model that forbids others": (
        Closed,
        ClosedWithNote,
        ["note: field added, and earlier readers forbid unknown fields"],
    ),
    "a class that contains itself has a new required field": (Tree, TreeByNumber, ["number: required field added"]),
    "a list becomes a set": (list[int], set[int], ["constraint tightened"]),
    "a place of a tuple is added": (tuple[int, str], tuple[int, str, str], ["number of items changed"]),
    "anything becomes text": (Any, str, ["type narrowed"]),
    "a literal becomes text": (Literal["a"], str, ["type widened"]),
    "a member of a union that is None changes places": (
        int | str | None,
        None | int | str,
        ["[0]: type changed", "[1]: type changed", "[2]: type changed"],
    ),
    "a dict gets a type for its values": (dict, dict[str, int], ["*: type narrowed"]),
    "values of a dict are of another type": (dict[str, int], dict[str, str], ["*: type changed"]),
    "items of a list may be null": (list[int], list[int | None], ["[]: type widened"]),
    "a place of a tuple is of another type": (tuple[int, str], tuple[int, int], ["[1]: type changed"]),
    "a tuple gets any length": (tuple[int, int], tuple[int, ...], ["number of items changed"]),
    "a Decimal becomes a float": (Decimal, float, ["type changed"]),
    "a Decimal becomes text": (Decimal, str, ["format changed"]),
    "an id becomes text": (UUID, str, ["format changed"]),
    "bytes become text": (bytes, str, ["format changed"]),
    "a datetime becomes a date": (datetime, date, ["format changed", "type narrowed"]),
    "an int becomes a bool": (int, bool, ["type changed"]),
}


@pytest.mark.parametrize("change", ALLOWED)
def test_an_allowed_change(change: str) -> None:
    """Earlier code reads what later code writes, and later code what earlier code wrote."""
    old, new = ALLOWED[change]

    assert changes_between(schema_of(old, "it"), schema_of(new, "it")) == []


@pytest.mark.parametrize("change", REFUSED)
def test_a_refused_change(change: str) -> None:
    """Each is named by its field and rule."""
    old, new, expected = REFUSED[change]

    assert [str(each) for each in changes_between(schema_of(old, "it"), schema_of(new, "it"))] == expected


@pytest.mark.parametrize(
    ("old", "new", "written", "read"),
    [
        (Order, WithDefault, Order("a", 1), WithDefault("a", 1)),
        (WithDefault, Order, WithDefault("a", 1, "x"), Order("a", 1)),
        (Nested, NestedWithNote, Nested([Item("a")]), NestedWithNote([ItemWithNote("a")])),
        (NestedWithNote, Nested, NestedWithNote([ItemWithNote("a", "x")]), Nested([Item("a")])),
        (Colour, OtherValues, Colour.RED, OtherValues.RED),
        (RowWithNote, Row, {"id": "a", "note": "x"}, {"id": "a"}),
        (ModelWithNote, Model, ModelWithNote(amount=1, note="x"), Model(amount=1)),
        (Model, ModelWithNote, Model(amount=1), ModelWithNote(amount=1)),
    ],
)
def test_the_library_reads_across_an_allowed_change(old: Any, new: Any, written: Any, read: Any) -> None:
    """The rules are true of the reader: what one class wrote is read as the other, unknown fields are ignored."""
    stored = dump(shape_of(old, "it").to_json(written))

    assert shape_of(new, "it").from_json(load(stored)) == read

"""Changes of pydantic models: which are allowed, by verdicts that were written before the code."""

from __future__ import annotations

import enum
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, create_model

from idempotency._results.by_annotation import dump, load, shape_of
from idempotency.contracts._rules import changes_between
from idempotency.contracts._schema import schema_of

T = TypeVar("T")


class Size(enum.Enum):
    SMALL = "s"


class SizeOfOtherName(enum.Enum):
    LITTLE = "s"


class SizeOfOtherValue(enum.Enum):
    SMALL = "small"


class Item(BaseModel):
    sku: str


class Article(BaseModel):
    sku: str


class Cat(BaseModel):
    kind: Literal["cat"]


class CatWithNote(Cat):
    note: str = ""


class Dog(BaseModel):
    kind: Literal["dog"]


class Bird(BaseModel):
    kind: Literal["bird"]


class Tree(BaseModel):
    below: list[Tree]


class TreeWithNote(BaseModel):
    below: list[TreeWithNote]
    note: str = ""


class TreeByNumber(BaseModel):
    below: list[TreeByNumber]
    number: int


class Page(BaseModel, Generic[T]):
    rows: list[T]


class Numbers(RootModel[list[int]]):
    pass


class Texts(RootModel[list[str]]):
    pass


OPEN, CLOSED = ConfigDict(extra="allow"), ConfigDict(extra="forbid")


def of(kind: Any, default: Any = ..., config: ConfigDict | None = None, **others: Any) -> Any:
    """Return a model with a field ``a`` of this type, and others."""
    return create_model("Model", __config__=config, a=(kind, default), **others)


def pets(*members: Any) -> Any:
    """Return a union whose members are told apart by their ``kind``."""
    union: Any = members[0]
    for each in members[1:]:
        union = union | each
    return of(Annotated[union, Field(discriminator="kind")])


def bound(kind: Any, **constraints: Any) -> Any:
    return of(Annotated[kind, Field(**constraints)])


ALLOWED = {
    "a nested model has another name": (of(Item), of(Article)),
    "one of two models that were one has another name": (of(Item, b=(Item, ...)), of(Article, b=(Item, ...))),
    "a model that contains itself has a new field with a default": (Tree, TreeWithNote),
    "a member of an enum is renamed, whose value is stored": (of(Size), of(SizeOfOtherName)),
    "a default is changed": (of(int, 1), of(int, 2)),
    "a member of a union that is told apart has a new field with a default": (pets(Cat, Dog), pets(CatWithNote, Dog)),
    "members of a union that is told apart are reordered": (pets(Cat, Dog), pets(Dog, Cat)),
    "members of a union of other JSON types are reordered": (of(int | str), of(str | int)),
    "a class below an optional field has a new field with a default": (of(Cat | None), of(CatWithNote | None)),
    "anything may be null": (of(Any), of(Any | None)),
    "a generic model is another one of the same fields": (Page[Item], Page[Article]),
    "unknown fields are forbidden, and none was ever written": (of(int), of(int, config=CLOSED)),
    "the alias that is read alone is changed": (bound(int, validation_alias="x"), bound(int, validation_alias="y")),
    "an extra of the schema is changed": (
        of(int, config=ConfigDict(json_schema_extra={"x": 1})),
        of(int, config=ConfigDict(json_schema_extra={"x": 2})),
    ),
}

REFUSED = {
    "the value of a member of an enum": (of(Size), of(SizeOfOtherValue), ["a: value added", "a: value removed"]),
    "null, instead of a default": (of(int | None, None), of(int, 0), ["a: type narrowed"]),
    "a union is widened": (of(int | str), of(int | str | bool), ["a: type widened"]),
    "a union loses a model that another one reads": (of(Item | Article), of(Item), ["a: type narrowed"]),
    "texts of a union change places": (of(date | str), of(str | date), ["a: format changed"]),
    "a union that is told apart is widened": (pets(Cat, Dog), pets(Cat, Dog, Bird), ["a: type widened"]),
    "a class below an optional field": (of(Tree | None), of(TreeByNumber | None), ["a.number: required field added"]),
    "the argument of a generic model": (Page[int], Page[str], ["rows[]: type changed"]),
    "the type of a root": (Numbers, Texts, ["[]: type changed"]),
    "int becomes float": (of(int), of(float), ["a: type widened"]),
    "values of a dict": (of(dict[str, int]), of(dict[str, str]), ["a.*: type changed"]),
    "keys of a dict become numbers": (of(dict[str, int]), of(dict[int, int]), ["a (key): type narrowed"]),
    "keys of a dict become any text": (of(dict[UUID, int]), of(dict[str, int]), ["a (key): type widened"]),
    "a greatest number is lowered": (bound(int, le=9), bound(int, le=8), ["a: constraint tightened"]),
    "a greatest number is raised": (bound(int, le=9), bound(int, le=10), ["a: constraint widened"]),
    "a pattern is given": (of(str), bound(str, pattern="^a"), ["a: constraint tightened"]),
    "a pattern is removed": (bound(str, pattern="^a"), of(str), ["a: constraint widened"]),
    "a Decimal gets a least value": (of(Decimal), bound(Decimal, ge=0), ["a: constraint tightened"]),
    "a Decimal gets places": (of(Decimal), bound(Decimal, decimal_places=2), ["a: constraint tightened"]),
    "a Decimal gets digits": (of(Decimal), bound(Decimal, max_digits=4), ["a: constraint tightened"]),
    "a Decimal becomes text": (of(Decimal), of(str), ["a: format changed"]),
    "a datetime becomes a date": (of(datetime), of(date), ["a: format changed"]),
    "bytes become text": (of(bytes), of(str), ["a: format changed"]),
    "an alias is changed": (
        bound(int, alias="x"),
        bound(int, alias="y"),
        ["x: required field removed", "y: required field added"],
    ),
    "a field is renamed, and the alias that is read alone is not": (
        bound(int, validation_alias="x"),
        create_model("Model", b=(int, Field(validation_alias="x"))),
        ["a: required field removed", "b: required field added"],
    ),
    "unknown fields were written, and are forbidden": (
        of(int, config=OPEN),
        of(int, config=CLOSED),
        ["*: field removed, and unknown fields are forbidden now"],
    ),
    "a field is added whose name may have been written with anything": (
        of(int, config=OPEN),
        of(int, config=OPEN, b=(int, 0)),
        ["b: type narrowed"],
    ),
}


@pytest.mark.parametrize("change", ALLOWED)
def test_an_allowed_change_of_a_model(change: str) -> None:
    """Earlier code reads what later code writes, and later code what earlier code wrote."""
    old, new = ALLOWED[change]

    assert changes_between(schema_of(old, "it"), schema_of(new, "it")) == []


@pytest.mark.parametrize("change", REFUSED)
def test_a_refused_change_of_a_model(change: str) -> None:
    """Each is named by its field and rule."""
    old, new, expected = REFUSED[change]

    assert [str(each) for each in changes_between(schema_of(old, "it"), schema_of(new, "it"))] == expected


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ("the value of a member of an enum", {"a": Size.SMALL}),
        ("keys of a dict become numbers", {"a": {"x": 1}}),
        ("a Decimal gets places", {"a": Decimal("1.234")}),
        ("an alias is changed", {"x": 1}),
        ("a field is renamed, and the alias that is read alone is not", {"x": 1}),
        ("a field is added whose name may have been written with anything", {"a": 1, "b": "x"}),
    ],
)
def test_later_code_cannot_read_across_a_refused_change(change: str, written: dict[str, Any]) -> None:
    """The verdict is true of the library: it could not read what the earlier model has written."""
    old, new, _ = REFUSED[change]
    stored = load(dump(shape_of(old, "it").to_json(old(**written))))

    with pytest.raises(ValueError, match="validation error"):
        shape_of(new, "it").from_json(stored)


def test_an_alias_that_is_read_alone_is_not_stored() -> None:
    """So it may be changed: the name of the field is stored."""
    old, new = ALLOWED["the alias that is read alone is changed"]

    stored = load(dump(shape_of(old, "it").to_json(old(x=1))))

    assert shape_of(new, "it").from_json(stored) == new(y=1)

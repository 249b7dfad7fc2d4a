"""Write Python values as JSON and read them, by their annotation. A value that would not come back equal is refused."""

from __future__ import annotations

import base64
import dataclasses
import enum
import inspect
import json
import types
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from json.scanner import make_scanner
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints, is_typeddict

from idempotency._results.compare import is_pydantic, same
from idempotency._results.models import read_model, write_model
from idempotency._results.of_dataclass import reader_of, writer_of
from idempotency._results.times import read_time, write_time
from idempotency.errors import ConfigurationError

_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES = (list, tuple, set, frozenset)


@dataclass(frozen=True, slots=True)
class Shape:
    """How values of one type go to JSON and come back. ``to_json`` raises TypeError or ValueError for another value.

    ``unchanged``: the type, if its values are their own JSON.
    """

    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]
    unchanged: type | None = None


_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))

scan: Any = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]
"""Read the JSON value in a text that begins at an index; return it and where it ends. It may raise StopIteration."""


def dump(value: Any) -> bytes:
    """Write JSON. NaN and the infinities are refused, since JSON has no such numbers."""
    return _encoder.encode(value).encode()


def load(data: bytes | str) -> Any:
    """Read JSON."""
    if isinstance(data, str):
        # json.loads looks for spaces around the value, which takes longer than to read a small one.
        try:
            value, end = scan(data, 0)
        except (ValueError, StopIteration):
            value, end = None, -1
        if end == len(data):
            return value
    return json.loads(data)


def shape_of(annotation: Any, where: str) -> Shape:
    """Find the shape of an annotation; raise ConfigurationError, which names ``where`` it is, if there is none."""
    return _Finder(where).find(annotation)


class UnnamedTypeError(TypeError):
    """A value is not plain JSON, and no annotation names its type. ``what`` it is, and the ``remedy``, are text."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} is no plain JSON value, and no annotation names it")
        self.what = what
        self.remedy = remedy


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        return {_plain_key(key): _plain(each) for key, each in value.items()}
    if kind is list:
        return [_plain(each) for each in value]
    if kind not in _PLAIN:
        name = kind.__qualname__
        raise UnnamedTypeError(f"a {name}", f"annotate what it returns, such as -> {name}")
    return value


def _plain_key(key: Any) -> str:
    if type(key) is not str:
        raise UnnamedTypeError(f"a dict with a key of type {type(key).__qualname__}", "let its keys be text")
    return key


PLAIN = Shape(_plain, _plain)
"""The types of JSON itself: None, bool, int, float, str, lists, and dicts with text for keys."""


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        # A subclass would come back as its base.
        if type(value) is not kind:
            raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
        return value

    return check


def _float(value: Any) -> float:
    # Where a float is expected, an int may be returned (PEP 484). It comes back as one.
    return value if type(value) is int else float(_exactly(float)(value))


def _by_text(kind: Any, write: Callable[[Any], str], read: Callable[[str], Any]) -> Shape:
    check, text = _exactly(kind), _exactly(str)
    return Shape(lambda value: write(check(value)), lambda found: read(text(found)))


def _time(kind: Any) -> Shape:
    check = _exactly(kind)
    return Shape(lambda value: write_time(check(value)), lambda found: read_time(kind, found))


def _days(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


_SIMPLE: dict[Any, Shape] = {
    **{kind: Shape(_exactly(kind), _exactly(kind), kind) for kind in (type(None), bool, int, str)},
    None: Shape(_exactly(type(None)), _exactly(type(None))),
    float: Shape(_float, _float, float),
    Any: PLAIN,
    object: PLAIN,
    dict: PLAIN,
    list: PLAIN,
    bytes: _by_text(bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    datetime: _time(datetime),
    date: _by_text(date, date.isoformat, date.fromisoformat),
    time: _time(time),
    timedelta: Shape(lambda value: _days(_exactly(timedelta)(value)), lambda found: timedelta(*found)),
    Decimal: _by_text(Decimal, str, Decimal),
    uuid.UUID: _by_text(uuid.UUID, str, uuid.UUID),
}


class _Finder:
    """Find the shapes of one annotation. A class that contains itself is found once."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._classes: dict[type, Shape] = {}

    def find(self, annotation: Any) -> Shape:
        annotation = bare(annotation)
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (*_SEQUENCES, dict) and not arguments and annotation != tuple[()]:
            # List of typing, and the like, without arguments.
            origin, annotation = None, origin
        if annotation in (tuple, set, frozenset):
            return self._sequence(annotation, (Any, ...))
        if origin in (Union, types.UnionType):
            return self._union(arguments)
        if origin is Literal:
            return self._literal(arguments)
        if origin in _SEQUENCES:
            return self._sequence(origin, arguments)
        if origin is dict:
            return self._dict(arguments)
        if origin is None:
            if annotation in _SIMPLE:
                return _SIMPLE[annotation]
            if isinstance(annotation, type):
                return self._class(annotation)
        raise self._refusal(annotation)

    def _refusal(self, annotation: Any) -> ConfigurationError:
        name = annotation.__qualname__ if isinstance(annotation, type) else repr(annotation)
        return ConfigurationError(f"{self._where} returns {name}, which cannot be recorded: give codec=")

    def _union(self, members: tuple[Any, ...]) -> Shape:
        shapes = [self.find(member) for member in members if member is not type(None)]
        if len(shapes) < len(members) and len(shapes) == 1:
            shape = shapes[0]
            return Shape(
                lambda value: None if value is None else shape.to_json(value),
                lambda found: None if found is None else shape.from_json(found),
            )
        # The number of the member is written before the value.
        shapes = [self.find(member) for member in members]
        # Float is tried last: it takes an int too, which may be another member.
        tried = sorted(enumerate(shapes), key=lambda each: bare(members[each[0]]) is float)
        return Shape(lambda value: _numbered(tried, value), lambda found: shapes[found[0]].from_json(found[1]))

    def _literal(self, values: tuple[Any, ...]) -> Shape:
        if not all(type(value) in _PLAIN for value in values):
            raise self._refusal(Literal[values])
        known = {(type(value), value) for value in values}

        def check(value: Any) -> Any:
            if (type(value), value) not in known:
                raise ValueError("not one of the literals")
            return value

        return Shape(check, check)

    def _sequence(self, kind: Any, arguments: tuple[Any, ...]) -> Shape:
        check = _exactly(kind)
        if kind is tuple and not (len(arguments) == 2 and arguments[1] is ...):
            shapes = [self.find(each) for each in arguments]
            return Shape(
                lambda value: [shape.to_json(each) for shape, each in zip(shapes, check(value), strict=True)],
                lambda found: tuple(shape.from_json(each) for shape, each in zip(shapes, found, strict=True)),
            )
        shape = self.find(arguments[0])
        listed = _exactly(list)
        return Shape(
            lambda value: [shape.to_json(each) for each in check(value)],
            lambda found: kind(shape.from_json(each) for each in listed(found)),
        )

    def _dict(self, arguments: tuple[Any, ...]) -> Shape:
        if bare(arguments[0]) is not str:
            raise self._refusal(types.GenericAlias(dict, arguments))
        check, text, shape = _exactly(dict), _exactly(str), self.find(arguments[1])
        return Shape(
            lambda value: {text(key): shape.to_json(each) for key, each in check(value).items()},
            lambda found: {key: shape.from_json(each) for key, each in check(found).items()},
        )

    def _class(self, kind: type) -> Shape:
        known = self._classes.get(kind)
        if known is not None:
            return known
        # Entered before its fields are found, so that the type of a field may be the class itself.
        made: list[Shape] = []
        self._classes[kind] = Shape(lambda value: made[0].to_json(value), lambda found: made[0].from_json(found))
        if issubclass(kind, enum.Enum) and not issubclass(kind, enum.Flag):
            # Not kind.__getitem__, which in an enum of text is the method that gets a character.
            shape = _by_text(kind, lambda value: value.name, partial(enum.EnumType.__getitem__, kind))
        elif is_pydantic(kind):
            check = _exactly(kind)
            shape = Shape(lambda value: write_model(check(value)), lambda found: read_model(kind, found))
        elif is_typeddict(kind):
            shape = self._typed_dict(kind)
        elif dataclasses.is_dataclass(kind):
            shape = self._dataclass(kind)
        else:
            raise self._refusal(kind)
        made.append(shape)
        return shape

    def _fields(self, kind: type, names: Iterable[str]) -> dict[str, Shape]:
        try:
            hints = get_type_hints(kind, include_extras=True)
        except Exception as error:
            raise ConfigurationError(f"{self._where} returns {kind.__qualname__}: {error}; give codec=") from error
        return {name: self.find(hints[name]) for name in names}

    def _dataclass(self, kind: type) -> Shape:
        check = _exactly(kind)
        given = [field.name for field in dataclasses.fields(kind) if field.init]
        known = frozenset(given)
        fields = self._fields(kind, [field.name for field in dataclasses.fields(kind)])
        unchanged = {name: fields[name].unchanged for name in given}
        for each in inspect.signature(kind).parameters.values():
            if each.name not in given and each.default is inspect.Parameter.empty:
                raise ConfigurationError(
                    f"{self._where} returns {kind.__qualname__}, whose parameter {each.name} is not stored: give codec="
                )

        def to_json(value: Any) -> Any:
            found = written(check(value))
            # Its __post_init__ may change the fields.
            if not same(from_json({name: found[name] for name in given}), value):
                raise ValueError(f"{kind.__name__} does not come back as it was")
            return {name: found[name] for name in given}

        def written(value: Any) -> dict[str, Any]:
            return {name: shape.to_json(getattr(value, name)) for name, shape in fields.items()}

        def from_any(found: Any) -> Any:
            # Fields that this code does not know are those of later code.
            return kind(**{name: fields[name].from_json(each) for name, each in found.items() if name in known})

        from_json = reader_of(kind, unchanged, {name: fields[name].from_json for name in given}, from_any)
        if len(given) < len(fields) or issubclass(kind, (*_SEQUENCES, dict)):
            # Not all that its values are is in the fields that are given.
            return Shape(to_json, from_json)
        return Shape(writer_of(kind, unchanged, to_json), from_json)

    def _typed_dict(self, kind: Any) -> Shape:
        # Missing keys are not refused: a type checker finds them. The keys that are there are recorded.
        check = _exactly(dict)
        fields = self._fields(kind, kind.__annotations__)
        return Shape(
            lambda value: {name: fields[name].to_json(each) for name, each in check(value).items()},
            lambda found: {name: fields[name].from_json(each) for name, each in check(found).items() if name in fields},
        )


def bare(annotation: Any) -> Any:
    """Remove what only names or decorates a type."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        elif getattr(get_origin(annotation), "__name__", "") in ("Required", "NotRequired"):
            annotation = get_args(annotation)[0]
        else:
            return annotation


def _numbered(shapes: list[tuple[int, Shape]], value: Any) -> list[Any]:
    unnamed = None
    for number, shape in shapes:
        # Any exception means that the value does not belong to this member.
        with suppress(Exception):
            try:
                return [number, shape.to_json(value)]
            except UnnamedTypeError as error:
                # The member names no type, so the code is at fault.
                unnamed = error
    if unnamed is not None:
        raise unnamed
    raise TypeError(f"{type(value).__name__} is not a member of the union")

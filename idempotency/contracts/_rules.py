"""Which changes of a schema are safe: each side must read all that the other one writes.

The reader is that of :mod:`idempotency._results.by_annotation`, or pydantic's: it ignores fields that it does not know,
unless a model forbids them, and gives a field that is missing its default. A writer writes the fields of its schema
and no others. What it may omit is what is not required: so a field with a default counts as one that may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Schema = Any

_NUMBERS_AT_LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_NUMBERS_AT_MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties", "maxDigits")
_EXACT = ("pattern", "multipleOf", "uniqueItems", "decimalPlaces")
_FORMS = ("format", "contentEncoding")
_TYPES: dict[type, str] = {
    **{type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"},
    **{list: "array", dict: "object"},
}


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """A change that is not safe: the ``field``, such as ``items[].sku``, empty for all of the value, and the rule."""

    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}" if self.field else self.rule


class Words(NamedTuple):
    """How a difference is named: where new code reads what old code wrote, and where old code reads new."""

    missing: str
    optional: str
    type: str
    value: str
    constraint: str
    unknown: str


_NEW_READS = Words(
    "required field added",
    "optional field made required",
    "type narrowed",
    "value removed",
    "constraint tightened",
    "field removed, and unknown fields are forbidden now",
)
_OLD_READS = Words(
    "required field removed",
    "required field made optional",
    "type widened",
    "value added",
    "constraint widened",
    "field added, and earlier readers forbid unknown fields",
)
_BOTH = "type changed"


def changes_between(old: Schema, new: Schema) -> list[Change]:
    """Return what makes the change from one schema to another unsafe, in either direction; empty: it is safe."""
    forwards = {*_Comparison(new, old, _NEW_READS).compare()}
    backwards = {*_Comparison(old, new, _OLD_READS).compare()}
    both = {
        each.field
        for each in forwards
        if each.rule == _NEW_READS.type and Change(each.field, _OLD_READS.type) in backwards
    }
    of_type = {_NEW_READS.type, _OLD_READS.type}
    others = {each for each in forwards | backwards if each.field not in both or each.rule not in of_type}
    return sorted(others | {Change(field, _BOTH) for field in both})


class _Comparison:
    """What one schema cannot read of what another one writes."""

    def __init__(self, reader: Schema, writer: Schema, words: Words, inside: frozenset[Any] = frozenset()) -> None:
        self._reader, self._writer, self._words = reader, writer, words
        self._inside = inside

    def compare(self) -> Iterator[Change]:
        """Return what cannot be read, of the whole."""
        return self._compare("", self._reader, self._writer)

    def _compare(self, field: str, reader: Schema, writer: Schema) -> Iterator[Change]:
        classes = _class_of(reader), _class_of(writer)
        if None in classes:
            yield from self._resolve(field, reader, writer)
        elif classes not in self._inside:  # else a class that contains itself
            before, self._inside = self._inside, self._inside | {classes}
            found = list(self._resolve(field, reader, writer))
            self._inside = before
            yield from found

    def _resolve(self, field: str, reader: Schema, writer: Schema) -> Iterator[Change]:
        reader, writer = _resolved(self._reader, reader), _resolved(self._writer, writer)
        if _is_anything(reader):
            return
        if _is_anything(writer):
            yield Change(field, self._words.type)
        elif "oneOf" in reader or "oneOf" in writer:
            yield from self._marked_unions(field, _alternatives(reader), _alternatives(writer))
        elif "anyOf" in reader or "anyOf" in writer:
            yield from self._unions(field, _alternatives(reader), _alternatives(writer))
        elif (values := _values(reader)) is not None or _values(writer) is not None:
            yield from self._literals(field, reader, writer, values)
        else:
            yield from self._plain(field, reader, writer)

    def _fits(self, reader: Schema, writer: Schema) -> bool:
        comparison = _Comparison(self._reader, self._writer, self._words, self._inside)
        return not list(comparison._compare("", reader, writer))

    def _marked_unions(self, field: str, read: list[Schema], written: list[Schema]) -> Iterator[Change]:
        """Compare members that say which one they are: by a number before the value, or a field of one literal."""
        for each in written:
            if any(self._fits(other, each) for other in read):
                continue
            number = _number(each)
            alike = [other for other in read if number is not None and _number(other) == number]
            if alike:
                place = f"{field}[{number}]"
                yield from self._compare(place, alike[0]["prefixItems"][1], each["prefixItems"][1])
            else:
                yield Change(field, self._words.type)

    def _unions(self, field: str, read: list[Schema], written: list[Schema]) -> Iterator[Change]:
        """Compare members that a reader tells apart by their JSON type, and where that is the same by their order."""
        readers = _by_type(self._reader, read)
        for kinds, some in _by_type(self._writer, written).items():
            others = readers.get(kinds, [])
            for one, other in zip(others, some, strict=False):
                yield from self._compare(field, one, other)
            if len(some) > len(others):
                yield Change(field, self._words.type)

    def _literals(self, field: str, reader: Schema, writer: Schema, known: set[Any] | None) -> Iterator[Change]:
        values = _values(writer)
        if known is not None and values is not None:
            if not values <= known:
                yield Change(field, self._words.value)
        elif values is None or not {kind for kind, _ in values} <= _types(reader):
            yield Change(field, self._words.type)

    def _plain(self, field: str, reader: Schema, writer: Schema) -> Iterator[Change]:
        kinds = _types(writer)
        if not kinds <= _types(reader):
            yield Change(field, self._words.type)
            if not kinds & _types(reader):
                return
        yield from self._constraints(field, reader, writer)
        if "object" in kinds:
            yield from self._objects(field, reader, writer)
        if "array" in kinds:
            yield from self._arrays(field, reader, writer)

    def _constraints(self, field: str, reader: Schema, writer: Schema) -> Iterator[Change]:
        if "prefixItems" in reader or "prefixItems" in writer:
            if len(reader.get("prefixItems", ())) != len(writer.get("prefixItems", ())):
                yield Change(field, "number of items changed")
        elif (
            any(each in reader and not writer.get(each, reader[each] - 1) >= reader[each] for each in _NUMBERS_AT_LEAST)
            or any(
                each in reader and not writer.get(each, reader[each] + 1) <= reader[each] for each in _NUMBERS_AT_MOST
            )
            or any(each in reader and reader[each] != writer.get(each) for each in _EXACT)
        ):
            yield Change(field, self._words.constraint)
        if any(each in reader and reader[each] != writer.get(each) for each in _FORMS):
            yield Change(field, "format changed")

    def _objects(self, field: str, reader: Schema, writer: Schema) -> Iterator[Change]:
        read, written = reader.get("properties", {}), writer.get("properties", {})
        for name in sorted(reader.get("required", ())):
            if name not in written:
                yield Change(_below(field, name), self._words.missing)
            elif name not in writer.get("required", ()):
                yield Change(_below(field, name), self._words.optional)
        # A reader takes fields that it does not know. A writer writes those that it names, unless it names none.
        others = reader.get("additionalProperties", True)
        added = writer.get("additionalProperties", "properties" not in writer)
        for name, schema in written.items():
            if name not in read and others is False:
                yield Change(_below(field, name), self._words.unknown)
            else:
                yield from self._compare(_below(field, name), read.get(name, others), schema)
        if added is not False:
            if others is False:
                yield Change(_below(field, "*"), self._words.unknown)
            else:
                yield from self._compare(_below(field, "*"), others, added)
            for name in read.keys() - written.keys():
                yield from self._compare(_below(field, name), read[name], added)
        names = reader.get("propertyNames", {}), writer.get("propertyNames", {})
        yield from self._compare(f"{field} (key)".strip(), *names)

    def _arrays(self, field: str, reader: Schema, writer: Schema) -> Iterator[Change]:
        read, written = reader.get("prefixItems", ()), writer.get("prefixItems", ())
        for number, (one, other) in enumerate(zip(read, written, strict=False)):
            yield from self._compare(f"{field}[{number}]", one, other)
        if not read and not written:
            yield from self._compare(f"{field}[]", reader.get("items", {}), writer.get("items", {}))


def _resolved(root: Schema, schema: Schema) -> Schema:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _class_of(schema: Schema) -> str | None:
    return schema.get("$ref") if isinstance(schema, dict) else None


def _below(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _alternatives(schema: Schema) -> list[Schema]:
    return schema.get("anyOf") or schema.get("oneOf") or [schema]


def _number(schema: Schema) -> int | None:
    """Return the number of a member of a union, which is stored before its value."""
    prefix = schema.get("prefixItems") or [] if isinstance(schema, dict) else []
    return prefix[0].get("const") if len(prefix) == 2 and isinstance(prefix[0], dict) else None


def _is_anything(schema: Schema) -> bool:
    return schema in (True, {}) or any(each in (True, {}) for each in schema.get("anyOf", ()))


def _by_type(root: Schema, members: list[Schema]) -> dict[frozenset[str], list[Schema]]:
    """Return the members of a union by the JSON types of their values; integers are numbers."""
    found: dict[frozenset[str], list[Schema]] = {}
    for member in members:
        schema = _resolved(root, member)
        values = _values(schema)
        kinds = _types(schema) if values is None else {kind for kind, _ in values}
        found.setdefault(frozenset("number" if each == "integer" else each for each in kinds), []).append(member)
    return found


def _values(schema: Schema) -> set[Any] | None:
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    return None if values is None else {(_TYPES[type(each)], f"{each!r}") for each in values}


def _types(schema: Schema) -> set[str]:
    found = schema.get("type", [*_TYPES.values()])
    kinds = {found} if isinstance(found, str) else set(found)
    return kinds | {"integer"} if "number" in kinds else kinds

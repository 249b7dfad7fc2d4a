"""The JSON Schema of what is stored for an annotation, as :mod:`idempotency._results.by_annotation` writes it."""

from __future__ import annotations

import dataclasses
import enum
import types
import uuid
from collections.abc import Collection, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from idempotency._results.by_annotation import bare, shape_of
from idempotency._results.compare import is_pydantic

Schema = dict[str, Any]

_TEXTS_OF_PEOPLE = ("title", "description", "examples", "deprecated", "default")
_SIMPLE: Mapping[Any, Schema] = {
    type(None): {"type": "null"},
    None: {"type": "null"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Any: {},
    object: {},
    dict: {"type": "object"},
    list: {"type": "array"},
    bytes: {"type": "string", "contentEncoding": "base64"},
    # An object where the time has a zone with a name.
    datetime: {"type": ["string", "object"], "format": "date-time"},
    time: {"type": ["string", "object"], "format": "time"},
    date: {"type": "string", "format": "date"},
    # Days, seconds, microseconds.
    timedelta: {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3, "format": "timedelta"},
    Decimal: {"type": "string", "format": "decimal"},
    uuid.UUID: {"type": "string", "format": "uuid"},
}


def schema_of(annotation: Any, where: str) -> Schema:
    """Return the JSON Schema of the values of a type, without what is for people only.

    Raises :class:`~idempotency.errors.ConfigurationError`, which names ``where`` it is, for a type that has no JSON.
    """
    shape_of(annotation, where)
    finder = _Finder()
    return finder.with_definitions(finder.find(annotation))


def schema_of_fields(annotations: Mapping[str, Any], required: Collection[str]) -> Schema:
    """Return the JSON Schema of named values, such as the arguments of a function."""
    finder = _Finder()
    return finder.with_definitions(finder.fields(annotations, required))


class _Finder:
    """Find the schema of one annotation. Its classes are definitions, so that one may contain itself."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}
        self._names: dict[Any, str] = {}

    def with_definitions(self, schema: Schema) -> Schema:
        """Return a schema with the definitions to which it refers."""
        return {**schema, "$defs": dict(sorted(self.definitions.items()))} if self.definitions else schema

    def fields(self, annotations: Mapping[str, Any], required: Collection[str]) -> Schema:
        """Return the schema of an object with these fields."""
        properties = {name: self.find(annotations[name]) for name in sorted(annotations)}
        return {"type": "object", "properties": properties, "required": sorted(required)}

    def find(self, annotation: Any) -> Schema:
        """Return the schema of one annotation, which has been found to have JSON."""
        annotation = bare(annotation)
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (list, tuple, set, frozenset, dict) and not arguments and annotation != tuple[()]:
            origin, annotation = None, origin
        if origin is None and annotation in _SIMPLE:
            return dict(_SIMPLE[annotation])
        if origin in (Union, types.UnionType):
            return self._union(arguments)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.find(arguments[1])}
        if origin is None and annotation in (tuple, set, frozenset):
            origin, arguments = annotation, (Any, ...)
        if origin in (list, tuple, set, frozenset):
            return self._sequence(origin, arguments)
        return self._class(annotation)

    def _union(self, members: tuple[Any, ...]) -> Schema:
        others = [self.find(member) for member in members if member is not type(None)]
        if len(others) == 1 and len(members) == 2:
            return {"anyOf": [*others, {"type": "null"}]}
        # The number of the member is written before the value.
        return {"oneOf": [_tuple([{"const": n}, self.find(member)]) for n, member in enumerate(members)]}

    def _sequence(self, kind: Any, arguments: tuple[Any, ...]) -> Schema:
        if kind is tuple and not (len(arguments) == 2 and arguments[1] is ...):
            return _tuple([self.find(each) for each in arguments])
        items = {"type": "array", "items": self.find(arguments[0])}
        return items if kind in (list, tuple) else {**items, "uniqueItems": True}

    def _class(self, kind: Any) -> Schema:
        if kind not in self._names:
            alike = sum(each.__name__ == kind.__name__ for each in self._names)
            self._names[kind] = name = f"{kind.__name__}{alike + 1}" if alike else kind.__name__
            self.definitions[name] = self._define(kind)
        return {"$ref": f"#/$defs/{self._names[kind]}"}

    def _define(self, kind: Any) -> Schema:
        if issubclass(kind, enum.Enum):
            # Their names are stored, not their values.
            return {"enum": sorted(kind.__members__)}
        if is_pydantic(kind):
            return self._model(kind)
        hints = get_type_hints(kind, include_extras=True)
        if is_typeddict(kind):
            required = {name for name in hints if _is_required(hints[name], name in kind.__required_keys__)}
            return self.fields(hints, required)
        fields = [each for each in dataclasses.fields(kind) if each.init]
        required = {each.name for each in fields if not _has_default(each)}
        return self.fields({each.name: hints[each.name] for each in fields}, required)

    def _model(self, kind: Any) -> Schema:
        """Return the schema of a pydantic model; its definitions get a name that no other class has."""
        from idempotency.contracts._models import model_schema

        prefix = f"{self._names[kind]}."
        found: Schema = _without_texts(model_schema(kind, f"#/$defs/{prefix}{{model}}"))
        for name, schema in found.pop("$defs", {}).items():
            self.definitions[prefix + name] = schema
        return found


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _is_required(annotation: Any, by_class: bool) -> bool:
    # Where annotations are text, the class has not looked at them.
    return get_origin(annotation) is Required or (by_class and get_origin(annotation) is not NotRequired)


def _tuple(items: list[Schema]) -> Schema:
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _without_texts(schema: Any) -> Any:
    """Remove what says nothing about the values; a property may have such a name too, and is not removed."""
    if isinstance(schema, list):
        return [_without_texts(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    named = ("properties", "$defs", "patternProperties")
    return {
        key: {name: _without_texts(each) for name, each in value.items()} if key in named else _without_texts(value)
        for key, value in schema.items()
        if key not in _TEXTS_OF_PEOPLE
    }

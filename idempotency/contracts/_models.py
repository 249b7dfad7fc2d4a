"""The JSON Schema of a pydantic model as this library stores it: see :mod:`idempotency._results.models`."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

Schema = dict[str, Any]

_OF_DECIMALS = {
    **{"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"},
    **{"multiple_of": "multipleOf", "max_digits": "maxDigits", "decimal_places": "decimalPlaces"},
}


def model_schema(kind: Any, ref_template: str) -> Schema:
    """Return what a model reads: by its aliases, or by the names of its fields where they are what is stored."""

    def schema(mode: JsonSchemaMode, by_alias: bool = True) -> Schema:
        found: Schema = kind.model_json_schema(
            by_alias=by_alias, ref_template=ref_template, schema_generator=_Stored, mode=mode
        )
        return found

    read, written = schema("validation"), schema("serialization")
    # A model that reads another alias than it writes is stored by the names of its fields.
    return read if _names(read) <= _names(written) else schema("validation", by_alias=False)


def _names(schema: Schema) -> set[tuple[str, str]]:
    classes = {"": schema, **schema.get("$defs", {})}
    return {(name, field) for name, each in classes.items() for field in each.get("properties", ())}


class _Stored(GenerateJsonSchema):
    """What pydantic's own schema does not say, or says in each release in another way."""

    def decimal_schema(self, schema: Any) -> Schema:
        """Return a text with its constraints."""
        found = {name: float(schema[key]) for key, name in _OF_DECIMALS.items() if schema.get(key) is not None}
        return {"type": "string", "format": "decimal", **found}

    def dict_schema(self, schema: Any) -> Schema:
        """Return an object, also with the type of keys that are not any text."""
        found = super().dict_schema(schema)
        keys = self.generate_inner(schema["keys_schema"]) if "keys_schema" in schema else {}
        if keys.get("type", "string") != "string":
            found["propertyNames"] = keys
        return found

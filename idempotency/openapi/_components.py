"""The reusable parts of an OpenAPI document: add one, and find one by its reference."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any
from urllib.parse import unquote

from idempotency.errors import ConfigurationError

Json = dict[str, Any]


class Components:
    """The ``components`` of one document, which is changed by :meth:`add`."""

    def __init__(self, document: Json) -> None:
        self._document = document

    def add(self, kind: str, name: str, component: Json) -> Json:
        """Add a component and return a reference to it.

        One that is there already is used again. Another one of this name stays: the new name then has a number.
        """
        components = self._document["components"] = object_of(self._document.get("components"))
        section: Json = object_of(components.get(kind))
        components[kind] = section
        chosen, number = name, 1
        # A copy, because the user may change the document.
        while section.setdefault(chosen, deepcopy(component)) != component:
            number += 1
            chosen = f"{name}_{number}"
        return {"$ref": f"#/components/{kind}/{chosen}"}

    def resolve(self, part: Any) -> Json:
        """Return a copy of ``part``, or of what it refers to in this document.

        Raises :class:`~idempotency.errors.ConfigurationError` for a reference that leads to another document, or
        nowhere.
        """
        seen: set[str] = set()
        while isinstance(part, Mapping) and "$ref" in part:
            reference = part["$ref"]
            if not isinstance(reference, str):
                raise ConfigurationError(f"the document has the reference {reference!r}, which is no text")
            if reference in seen:
                raise ConfigurationError(f"the reference {reference!r} of the document leads to itself")
            seen.add(reference)
            # OpenAPI 3.1 allows a description beside a reference, which replaces the one that is referred to.
            beside = {name: value for name, value in part.items() if name != "$ref"}
            part = {**self._find(reference), **beside}
        return deepcopy(dict(_checked(part)))

    def _find(self, reference: str) -> Json:
        if not reference.startswith("#/"):
            raise ConfigurationError(
                f"the reference {reference!r} leads out of the document: describe the bundled document instead"
            )
        found: Any = self._document
        for name in reference[2:].split("/"):
            # RFC 6901 section 4, in a URI fragment (section 6).
            name = unquote(name).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise ConfigurationError(f"the reference {reference!r} of the document leads nowhere")
            found = found[name]
        if not isinstance(found, Mapping):
            raise ConfigurationError(f"the reference {reference!r} of the document does not lead to an object")
        return dict(found)


def object_of(part: Any) -> Json:
    """Return an object of a document, and an empty one for null: YAML reads an empty part so.

    Raises :class:`~idempotency.errors.ConfigurationError` for a part of another kind.
    """
    return {} if part is None else _checked(part)


def list_of(part: Any) -> list[Any]:
    """Return an array of a document; see :func:`object_of`."""
    if part is None or isinstance(part, list):
        return part or []
    raise ConfigurationError(f"the document has a {type(part).__name__} where OpenAPI needs an array")


def _checked(part: Any) -> Json:
    if not isinstance(part, dict):
        raise ConfigurationError(f"the document has a {type(part).__name__} where OpenAPI needs an object")
    return part

"""Documents without what is described, and applications for the middleware of a test."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from openapi_spec_validator import validate

from idempotency import IdempotencyMiddleware
from idempotency.openapi import describe
from tests.kit.asgi_calls import respond

VERSIONS = ["3.0.3", "3.1.0"]
CREATED = {"description": "Created", "content": {"application/json": {"schema": {"type": "object"}}}}


def operation(*names: str, **more: Any) -> dict[str, Any]:
    """Make an operation; ``names``: the parameters of its path."""
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": parameters, "responses": {"201": deepcopy(CREATED)}, **more}


def api(version: str = "3.1.0", paths: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Make a document; by default of ``POST /orders``."""
    items = {"/orders": {"post": operation()}} if paths is None else paths
    return {"openapi": version, "info": {"title": "Shop", "version": "1"}, "paths": items, **more}


def guard(**options: Any) -> IdempotencyMiddleware:
    """Make a middleware."""
    return IdempotencyMiddleware(respond, store="memory://", **options)


def described(document: dict[str, Any], prefix: str = "", vendors: Any = (), **options: Any) -> dict[str, Any]:
    """Describe a document, which must stay as it is; the result must be a valid one."""
    before = deepcopy(document)
    result = describe(document, guard(**options), prefix=prefix, vendors=vendors)
    assert document == before
    validate(result)
    return result


def find(document: dict[str, Any], part: Any) -> Any:
    """Follow a reference inside a document."""
    while "$ref" in part:
        found: Any = document
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        part = found
    return part


def response(document: dict[str, Any], status: str, path: str = "/orders", method: str = "post") -> dict[str, Any]:
    """Return one response of an operation."""
    found: dict[str, Any] = find(document, document["paths"][path][method]["responses"][status])
    return found


def parameter(document: dict[str, Any], path: str = "/orders", method: str = "post") -> dict[str, Any] | None:
    """Return the header parameter of an operation, or None."""
    found = [find(document, each) for each in document["paths"][path][method].get("parameters", [])]
    headers = [each for each in found if each["in"] == "header"]
    assert len(headers) < 2
    return headers[0] if headers else None


def codes(document: dict[str, Any], path: str = "/orders", method: str = "post") -> dict[str, list[str]]:
    """Return the codes of problem documents by status."""
    found: dict[str, list[str]] = {}
    for status in document["paths"][path][method]["responses"]:
        media = response(document, status, path, method).get("content", {}).get("application/problem+json")
        if media is not None:
            found[status] = find(document, media["schema"])["allOf"][1]["properties"]["code"]["enum"]
    return found

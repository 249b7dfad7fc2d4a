"""Documents as tools and people write them: parts that are shared, absent or empty, and applications in mounts."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Router

from idempotency import IdempotencyMiddleware, Policy
from idempotency.errors import ConfigurationError
from idempotency.openapi import describe, document
from tests.openapi.documents import api, described, guard, operation

POLICIES = {"POST /a": Policy(required=True), "POST /b": Policy(ttl=60), "POST /c": None}


@pytest.mark.parametrize("shared", ["operation", "path"])
def test_an_operation_that_two_paths_share_is_described_for_each(shared: str) -> None:
    """As an anchor of YAML makes it: one object in several places, each with its own policy."""
    one = operation()
    item = {"post": one}
    paths = {path: item if shared == "path" else {"post": one} for path in ("/a", "/b", "/c")}

    result = described(api(paths=paths), policies=POLICIES)

    found = {path: result["paths"][path]["post"].get("x-idempotency") for path in paths}
    assert found == {
        "/a": {"required": True, "ttl": 86400, "scope": "credentials"},
        "/b": {"required": False, "ttl": 60, "scope": "credentials"},
        "/c": None,
    }
    assert result["paths"]["/c"]["post"] == one


@pytest.mark.parametrize(
    "paths",
    [
        {"/a": None},
        {"/a": {"post": None}},
        {"/a": {"post": operation(), "parameters": None}},
        {"/a": {"post": {"parameters": None, "responses": {"201": {"description": "Created"}}}}},
        {"/a": {"post": {"responses": None}}},
        {"/a": {"post": {"parameters": [{"in": "header", "name": None}, {"in": "header"}]}}},
    ],
)
def test_a_part_that_is_null_is_none(paths: dict[str, Any]) -> None:
    """YAML reads an empty part as null."""
    result = describe(api(paths=paths, components=None), guard())

    item = result["paths"]["/a"]
    assert not item or not item["post"] or "x-idempotency" in item["post"]


@pytest.mark.parametrize(
    "paths",
    [{"/a": "x"}, {"/a": {"post": "x"}}, {"/a": {"$ref": 5}}, {"/a": {"post": {"parameters": {}, "responses": []}}}],
)
def test_a_part_of_another_kind_is_refused(paths: dict[str, Any]) -> None:
    """With an error of ours."""
    with pytest.raises(ConfigurationError, match="the document has"):
        describe(api(paths=paths), guard())


@pytest.mark.parametrize("between", ["routes", "a router"])
def test_an_application_below_other_mounts_is_documented(between: str) -> None:
    """The whole prefix is before its paths."""
    inner = FastAPI()

    @inner.post("/orders")
    def order() -> None: ...

    below = [Mount("/shop", app=inner)]
    mount = Mount("/v1", routes=below) if between == "routes" else Mount("/v1", app=Router(below))
    outer = Starlette(routes=[mount])
    policies = {"POST /v1/shop/orders": Policy(required=True), "POST /orders": None}
    outer.add_middleware(IdempotencyMiddleware, store="memory://", policies=policies)

    document(inner, outer=outer)

    assert inner.openapi()["paths"]["/orders"]["post"]["x-idempotency"]["required"] is True

"""What a document says of an API whose middleware is known."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency import IdempotencyMiddleware, Policy, wsgi
from idempotency.errors import ConfigurationError
from idempotency.openapi import describe
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import Effects, call, protect, respond
from tests.openapi.documents import (
    CREATED,
    VERSIONS,
    api,
    codes,
    described,
    find,
    guard,
    operation,
    parameter,
    response,
)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_protected_operation_has_the_header_as_a_parameter_component(version: str) -> None:
    """Its length is limited, and its description says how long a result is kept and what a retry is."""
    result = described(api(version), policy=Policy(ttl=timedelta(hours=1), required=True, mismatch_status=409))

    assert result["paths"]["/orders"]["post"]["parameters"] == [{"$ref": "#/components/parameters/IdempotencyKey"}]
    found = result["components"]["parameters"]["IdempotencyKey"]
    assert (found["name"], found["in"], found["required"]) == ("Idempotency-Key", "header", True)
    assert (found["schema"]["type"], found["schema"]["minLength"], found["schema"]["maxLength"]) == ("string", 1, 255)
    assert "same request with the same key on each retry" in found["description"]
    assert "for 3600 seconds after its completion" in found["description"]
    assert "Another request with the same key is answered 409." in found["description"]


def test_a_key_that_is_not_required_says_what_is_lost_without_it() -> None:
    """The parameter is optional, as the policy has it, and ``x-idempotency`` says the same."""
    result = described(api(), policy=Policy(ttl=0.5), scope=None)

    found = parameter(result)
    assert found is not None
    assert found["required"] is False
    assert found["description"].endswith("without a key is not protected: a retry of it is another operation.")
    assert result["paths"]["/orders"]["post"]["x-idempotency"] == {"required": False, "ttl": 0.5, "scope": "shared"}


@pytest.mark.parametrize(
    ("scope", "named"),
    [
        ("credentials", "credentials"),
        ("authorization", "authorization"),
        (lambda request: "a", "application"),
        (None, "shared"),
    ],
)
def test_the_extension_says_whose_key_it_is(scope: Any, named: str) -> None:
    """By what separates the keys of one caller from those of another."""
    extension = described(api(), scope=scope)["paths"]["/orders"]["post"]["x-idempotency"]

    assert extension == {"required": False, "ttl": 86400, "scope": named}


@pytest.mark.parametrize("strict", [False, True])
async def test_keys_that_fit_the_schema_are_accepted(strict: bool) -> None:
    """The example too, and the longest ones; what does not fit is refused."""
    found = parameter(described(api(), strict=strict))
    assert found is not None
    pattern = re.compile(found["schema"]["pattern"])
    bare = [found["example"], "!", "a" * 255, "#[]~+.-_*/;="]
    quoted = ['"a"', '"a, b"', '"' + "a" * 253 + '"']
    refused = ["", '"', '""', "a b", "a,b", 'a"b', "a" * 256, "ä", '"a', '"a" b', '"a", "b"']

    fitting = {key for key in [*bare, *quoted, *refused] if pattern.search(key) and len(key) <= 255}
    accepted = set()
    for key in {*bare, *quoted, *refused}:
        reply = await call(protect(Effects(), strict=strict), key=key.encode())
        if reply.status == 201:
            accepted.add(key)

    assert fitting == accepted == {*quoted, *([found["example"]] if strict else bare)}


@pytest.mark.parametrize("version", VERSIONS)
def test_each_answer_of_the_middleware_is_described(version: str) -> None:
    """By its status and code, with one example for each code, and Retry-After where a retry may help."""
    result = described(api(version), policy=Policy(required=True, fingerprint=lambda request: b""))

    assert codes(result) == {
        "400": ["key-missing", "key-invalid", "body-invalid"],
        "409": ["in-progress", "outcome-unknown", "completed-not-replayable"],
        "413": ["request-too-large"],
        "422": ["key-reused"],
        "500": ["record-unreadable", "store-refused"],
        "503": ["store-unavailable"],
    }
    for status, names in codes(result).items():
        media = response(result, status)["content"]["application/problem+json"]
        assert list(media["examples"]) == names
        assert [example["value"]["code"] for example in media["examples"].values()] == names
        assert {example["value"]["status"] for example in media["examples"].values()} == {int(status)}
        assert find(result, media["schema"])["allOf"][0] == {"$ref": "#/components/schemas/IdempotencyProblem"}
    timed = [status for status in codes(result) if "Retry-After" in response(result, status).get("headers", {})]
    assert timed == ["409", "503"]


def test_what_cannot_happen_is_not_described() -> None:
    """No key is missing where none is required; a store that fails open answers nothing."""
    found = codes(described(api(), policy=Policy(on_store_error="fail_open")))

    assert found["400"] == ["key-invalid"]
    assert found["500"] == ["record-unreadable"]
    assert "503" not in found


async def test_a_store_that_fails_open_answers_where_it_must(tmp_path: Path) -> None:
    """A duplicate that waits for another owner, and a commit, are answered 503 all the same."""
    open_to_failures = Policy(on_store_error="fail_open", wait=1)
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    sessions = async_sessionmaker(engine)

    waiting = codes(described(api(), policy=open_to_failures))
    middleware = IdempotencyMiddleware(
        respond, store=SQLStore(engine), session=sessions, policy=Policy(on_store_error="fail_open")
    )
    committing = codes(describe(api(), middleware))
    await engine.dispose()

    assert (waiting["503"], waiting["500"]) == (["store-unavailable"], ["record-unreadable"])
    assert (committing["503"], committing["500"]) == (["store-unavailable"], ["record-unreadable", "store-refused"])


def test_a_caller_that_may_be_refused_is_described() -> None:
    """With ``unknown_credentials="refuse"``."""
    found = codes(described(api(), unknown_credentials="refuse"))

    assert found["500"] == ["record-unreadable", "store-refused", "caller-unknown"]


def test_the_statuses_of_the_policy_are_those_of_the_document() -> None:
    """Codes of one status are in one response; Retry-After is where a running request is answered."""
    result = described(api(), policy=Policy(mismatch_status=400, in_progress_status=425))

    found = codes(result)
    assert (found["400"], found["425"]) == (["key-invalid", "key-reused"], ["in-progress"])
    assert found["409"] == ["outcome-unknown", "completed-not-replayable"]
    assert "422" not in found
    assert "Retry-After" in response(result, "425")["headers"]
    assert "headers" not in response(result, "409")


def test_names_of_headers_are_those_of_the_options() -> None:
    """The key, its echo, and the mark of a replay."""
    result = described(api(), header_name="X-Request-Key", replayed_header="X-Replayed", echo_key=True)

    found = parameter(result)
    assert found is not None
    assert found["name"] == "X-Request-Key"
    assert set(response(result, "201")["headers"]) == {"X-Replayed", "X-Request-Key"}
    assert set(response(result, "503")["headers"]) == {"Retry-After", "X-Request-Key"}


def test_responses_that_are_recorded_may_be_replays() -> None:
    """Also refusals of the application; not what releases the key."""
    responses = {status: {"description": status} for status in ("200", "303", "404", "429", "502", "2XX", "default")}
    result = described(api(paths={"/orders": {"post": operation(responses=responses)}}))

    marked = [status for status in responses if "Idempotent-Replayed" in response(result, status).get("headers", {})]
    assert marked == ["200", "303", "404", "2XX", "default"]


def test_operations_that_are_not_protected_stay_as_they_are() -> None:
    """Other methods, and routes out of scope; with a method in its key, a route is protected whatever it is."""
    paths = {
        "/orders": {"get": operation(), "put": operation(), "delete": operation()},
        "/login": {"post": operation()},
    }
    result = described(api(paths=paths), policies={"/login": None, "PUT /orders": Policy()})

    assert result["paths"]["/orders"]["get"] == operation()
    assert result["paths"]["/orders"]["delete"] == operation()
    assert result["paths"]["/login"]["post"] == operation()
    assert parameter(result, method="put") is not None


def test_a_document_without_protected_operations_is_equal() -> None:
    """Nothing is added, not even components."""
    document = api(paths={"/orders": {"get": operation()}})

    assert described(document) == document
    assert described(api(paths={})) == api(paths={})


def test_the_policy_of_an_operation_is_found_by_its_template() -> None:
    """The names of parameters do not matter, and no literal of a policy matches a parameter of the document."""
    policies = {
        "/orders/{id}": Policy(ttl=1),
        "/orders/new": Policy(ttl=2),
        "/orders/{id}/lines/{line}": Policy(ttl=3),
        "/files/{rest:path}": Policy(ttl=4),
        "POST /orders/{id}/pay": Policy(ttl=5),
        "/orders/{id}/pay": None,
    }
    paths = {
        "/orders/{order_id}": {"post": operation("order_id"), "patch": operation("order_id")},
        "/orders/new": {"post": operation()},
        "/orders/{order-id}/lines/{n}": {"post": operation("order-id", "n")},
        "/orders/{order_id}/pay": {"post": operation("order_id"), "patch": operation("order_id")},
        "/files/{a}/{b}": {"post": operation("a", "b")},
        "/reports/{name}.{kind}": {"post": operation("name", "kind")},
    }
    result = described(api(paths=paths), policy=Policy(ttl=9), policies=policies)

    assert {
        (method, path): each.get("x-idempotency", {}).get("ttl")
        for path, item in result["paths"].items()
        for method, each in item.items()
    } == {
        ("post", "/orders/{order_id}"): 1,
        ("patch", "/orders/{order_id}"): 1,
        ("post", "/orders/new"): 2,
        ("post", "/orders/{order-id}/lines/{n}"): 3,
        ("post", "/orders/{order_id}/pay"): 5,
        ("patch", "/orders/{order_id}/pay"): None,
        ("post", "/files/{a}/{b}"): 4,
        ("post", "/reports/{name}.{kind}"): 9,
    }


def test_a_policy_for_one_value_of_a_parameter_is_not_described() -> None:
    """Its path is not in the document; the operation is described by the policy of all other values."""
    paths = {"/orders/{id}": {"post": operation("id")}}
    result = described(api(paths=paths), policies={"/orders/new": Policy(ttl=1)})

    assert result["paths"]["/orders/{id}"]["post"]["x-idempotency"]["ttl"] == 86400


def test_a_prefix_is_before_the_paths_of_the_document() -> None:
    """As where a mounted application has a document of its own."""
    result = described(api(), prefix="/v1", policy=Policy(methods=()), policies={"POST /v1/orders": Policy()})

    assert parameter(result) is not None


def test_what_is_described_is_not_described_again() -> None:
    """So the outermost middleware answers, and a second call changes nothing."""
    once = described(api(), policy=Policy(ttl=1), vendors=["fern"])

    assert described(once, policy=Policy(ttl=2), vendors=["fern"]) == once


@pytest.mark.parametrize("place", ["operation", "path", "component"])
def test_a_header_that_is_declared_already_is_not_declared_twice(place: str) -> None:
    """By the operation or its path, in any case, also by a reference."""
    own = {"name": "idempotency-key", "in": "header", "schema": {"type": "string", "format": "uuid"}}
    reference = {"$ref": "#/components/parameters/Key"}
    item: dict[str, Any] = {"post": {"responses": {}}}
    (item if place == "path" else item["post"])["parameters"] = [reference if place == "component" else own]
    document = api(paths={"/orders": item}, components={"parameters": {"Key": own}})

    result = described(document)

    assert result["components"]["parameters"] == {"Key": own}
    assert result["paths"]["/orders"]["post"].get("parameters") == item["post"].get("parameters")
    assert result["paths"]["/orders"]["post"]["x-idempotency"]["required"] is False


@pytest.mark.parametrize("version", VERSIONS)
def test_responses_of_the_application_stay_beside_ours(version: str) -> None:
    """Another media type is added; one media type has both schemas, and all examples."""
    validation = {"description": "Invalid", "content": {"application/json": {"schema": {"type": "array"}}}}
    conflict = {
        "description": "Sold out",
        "headers": {"retry-after": {"schema": {"type": "string"}}},
        "content": {"application/problem+json": {"schema": {"type": "object"}, "example": {"title": "Sold out"}}},
    }
    responses = {"422": {"$ref": "#/components/responses/Invalid"}, "409": conflict}
    document = api(
        version,
        {"/orders": {"post": operation(responses=responses)}},
        components={"responses": {"Invalid": validation}},
    )

    result = described(document)

    assert result["components"]["responses"]["Invalid"] == validation
    invalid, sold_out = response(result, "422"), response(result, "409")
    assert invalid["description"] == "Invalid\n\nThis Idempotency-Key was used for a different request."
    assert invalid["content"]["application/json"] == {"schema": {"type": "array"}}
    assert list(invalid["content"]["application/problem+json"]["examples"]) == ["key-reused"]
    media = sold_out["content"]["application/problem+json"]
    assert media["schema"]["anyOf"][0] == {"type": "object"}
    assert find(result, media["schema"]["anyOf"][1])["allOf"][1]["properties"]["code"]["enum"][0] == "in-progress"
    assert media["examples"]["application"] == {"value": {"title": "Sold out"}}
    assert "in-progress" in media["examples"]
    assert "example" not in media
    assert set(sold_out["headers"]) == {"retry-after"}


@pytest.mark.parametrize("key", ["4XX", "default"])
def test_a_response_for_many_statuses_still_counts_beside_ours(key: str) -> None:
    """A status of its own would hide it."""
    error = {"description": "Error", "content": {"application/json": {"schema": {"type": "object"}}}}
    result = described(api(paths={"/orders": {"post": operation(responses={key: error})}}))

    assert set(response(result, "409")["content"]) == {"application/json", "application/problem+json"}
    assert set(response(result, key)["content"]) == {"application/json"}


def test_an_extension_among_the_responses_stays() -> None:
    """It is no response."""
    result = described(api(paths={"/orders": {"post": operation(responses={"200": CREATED, "x-note": "n"})}}))

    assert result["paths"]["/orders"]["post"]["responses"]["x-note"] == "n"


def test_statuses_that_are_numbers_are_texts_afterwards() -> None:
    """As YAML reads them without quotes."""
    document: Any = api(paths={"/orders": {"post": operation(responses={201: {"description": "Created"}})}})

    result = describe(document, guard())

    assert set(result["paths"]["/orders"]["post"]["responses"]) == {"201", "400", "409", "413", "422", "500", "503"}


def test_a_described_document_may_be_changed() -> None:
    """It shares nothing with the next one."""
    paths: Any = {"/orders": {"post": operation(responses={"200": CREATED, "303": CREATED})}}
    expected = described(api(paths=paths))

    spoiled = described(api(paths=paths))
    for kind in spoiled["components"].values():
        for component in kind.values():
            component.clear()
    response(spoiled, "200")["headers"]["Idempotent-Replayed"].clear()

    assert response(spoiled, "303")["headers"]["Idempotent-Replayed"] != {}
    assert described(api(paths=paths)) == expected


def test_policies_that_differ_have_components_that_differ() -> None:
    """Equal ones share theirs, and a component of the user's with the name stays."""
    own = {"name": "X", "in": "header", "schema": {"type": "string"}}
    paths = {f"/{name}": {"post": operation()} for name in "abc"}
    document = api(paths=paths, components={"parameters": {"IdempotencyKey": own}})

    result = described(document, policies={"/b": Policy(required=True)})

    names = [result["paths"][f"/{name}"]["post"]["parameters"][0]["$ref"].rpartition("/")[2] for name in "abc"]
    assert names == ["IdempotencyKey_2", "IdempotencyKey_3", "IdempotencyKey_2"]
    assert result["components"]["parameters"]["IdempotencyKey"] == own


def test_a_path_by_reference_is_described_where_it_is_used() -> None:
    """The component stays as it is: another path may use it."""
    components = {"pathItems": {"Orders": {"post": operation()}}}
    document = api(paths={"/orders": {"$ref": "#/components/pathItems/Orders"}}, components=components)

    result = described(document)

    assert parameter(result) is not None
    assert result["components"]["pathItems"] == components["pathItems"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"swagger": "2.0"}, "takes documents of OpenAPI 3.0 and 3.1, not '2.0'"),
        ({"openapi": "3.2.0"}, "takes documents of OpenAPI 3.0 and 3.1, not '3.2.0'"),
        ({"openapi": 3.1}, "takes documents of OpenAPI 3.0 and 3.1, not 3.1"),
        ({}, "takes documents of OpenAPI 3.0 and 3.1, not None"),
        ([], "an OpenAPI document is a mapping, not list"),
        (api(paths={"/a": {"$ref": "other.yaml#/a"}}), "leads out of the document: describe the bundled document"),
        (api(paths={"/a": {"$ref": "#/paths/~1b"}}), "'#/paths/~1b' of the document leads nowhere"),
        (api(paths={"/a": {"$ref": "#/paths/~1a"}}), "'#/paths/~1a' of the document leads to itself"),
        (
            api(paths={"/a": {"post": operation(responses={"409": None})}}),
            "has a NoneType where OpenAPI needs an object",
        ),
    ],
)
def test_a_document_that_cannot_be_described_is_refused(document: Any, message: str) -> None:
    """With what to do, or the place."""
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        describe(document, guard())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "v1"}, "prefix must be empty or a path"),
        ({"prefix": "/v1/"}, "prefix must be empty or a path"),
        ({"vendors": "fern"}, "vendors must be a collection"),
        ({"vendors": ["stainless"]}, "vendors takes fern and speakeasy, not 'stainless'"),
    ],
)
def test_an_option_that_cannot_work_is_refused(options: Any, message: str) -> None:
    """At once, with the value."""
    with pytest.raises(ConfigurationError, match=message):
        describe(api(), guard(), **options)


def test_anything_but_a_middleware_is_refused() -> None:
    """An application has a document of its own."""
    with pytest.raises(ConfigurationError, match="describe\\(\\) takes an IdempotencyMiddleware, not function"):
        describe(api(), respond)  # type: ignore[arg-type]


def test_fern_gets_the_header_and_the_operations_that_take_it() -> None:
    """Its generators then offer the key there, and nowhere else."""
    paths = {"/orders": {"get": operation(), "post": operation()}}
    own = [{"header": "Idempotency-Expiration", "name": "expiration"}]
    document = api(paths=paths, **{"x-fern-idempotency-headers": own})

    result = described(document, vendors={"fern"}, header_name="X-Request-Key")

    added = {"header": "X-Request-Key", "name": "x_request_key"}
    assert result["x-fern-idempotency-headers"] == [*own, added]
    assert result["paths"]["/orders"]["post"]["x-fern-idempotent"] is True
    assert "x-fern-idempotent" not in result["paths"]["/orders"]["get"]


def test_speakeasy_retries_only_what_has_a_key_and_not_longer_than_it_lives() -> None:
    """A request without a key, or after its lifetime, would take effect twice."""
    paths = {"/orders": {"post": operation()}, "/short": {"post": operation()}, "/optional": {"post": operation()}}
    result = described(
        api(paths=paths),
        vendors=["speakeasy"],
        policies={
            "/orders": Policy(required=True, in_progress_status=425),
            "/short": Policy(required=True, ttl=2),
            "/optional": Policy(),
        },
    )

    retries = {path: item["post"].get("x-speakeasy-retries") for path, item in result["paths"].items()}
    assert retries["/optional"] is None
    assert retries["/orders"]["statusCodes"] == ["425", "503"]
    assert retries["/orders"]["backoff"]["maxElapsedTime"] == 60_000
    assert retries["/short"]["backoff"]["maxElapsedTime"] == 2_000
    assert retries["/short"]["retryConnectionErrors"] is True


def test_without_vendors_there_are_no_extensions_of_theirs() -> None:
    """Nobody gets what is not asked for."""
    assert "x-fern" not in str(described(api(), policy=Policy(required=True)))


def test_the_middleware_for_wsgi_is_described_as_that_for_asgi() -> None:
    """By its policies and options; only what it protects is described."""
    paths = {f"/{path}": {"post": operation()} for path in ("orders", "payments", "logs")}
    options: dict[str, Any] = {
        "policies": {"/payments": Policy(required=True), "/logs": None},
        "header_name": "Request-Key",
        "echo_key": True,
    }

    def app(environ: Any, start_response: Any) -> list[bytes]:
        return []

    of_wsgi = describe(api(paths=paths), wsgi.IdempotencyMiddleware(app, store="memory://", **options))

    assert of_wsgi == described(api(paths=paths), **options)
    protected = [path for path, item in of_wsgi["paths"].items() if "x-idempotency" in item["post"]]
    assert protected == ["/orders", "/payments"]

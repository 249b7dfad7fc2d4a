"""The document says what the middleware really answers, also in the form of an API."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from idempotency import IdempotencyMiddleware, Policy, Problem, Profile
from tests.http.test_profiles import own_answers
from tests.openapi.documents import api, described, operation, parameter, response


def to_xml(problem: Problem) -> tuple[int, dict[str, str], str]:
    return problem.status, {"Content-Type": "Application/XML; charset=utf-8"}, f"<error>{problem.code}</error>"


def to_json(problem: Problem) -> dict[str, object]:
    return {"error": problem.code, "retry_in": problem.retry_after}


def to_teapot(problem: Problem) -> tuple[int, dict[str, str], bytes]:
    return 418, {}, b""


PROFILES = {
    "default": Profile(),
    "acp": Profile.acp,
    "stripe": Profile.stripe,
    "xml": Profile(error=to_xml),
    "json": Profile(error=to_json),
    "teapot": Profile(error=to_teapot),
}


@pytest.mark.parametrize("name", PROFILES)
async def test_each_real_answer_is_as_the_document_says(name: str) -> None:
    """Its status, media type, body and Retry-After, whatever makes it."""
    profile = PROFILES[name]
    paths = {f"/{path}": {"post": operation()} for path in ("orders", "required")}
    result = described(api(paths=paths), profile=profile, policies={"/required": Policy(required=True)})

    for code, reply in (await own_answers(profile)).items():
        path = "/required" if code == "key-missing" else "/orders"
        found = response(result, str(reply.status), path)
        sent = (reply.header(b"content-type") or b"").decode().partition(";")[0].lower()
        assert list(found.get("content", {})) == ([sent] if sent else []), code
        assert (reply.header(b"retry-after") is None) or "Retry-After" in found["headers"], code
        if sent.endswith("json"):
            schema = {**found["content"][sent]["schema"], "components": result["components"]}
            jsonschema.validate(json.loads(reply.body), schema)
            example = found["content"][sent]["examples"][code]["value"]
            assert set(example) == set(json.loads(reply.body)), code


def test_errors_of_the_profiles_have_schemas() -> None:
    """With the members that their clients read, and the status of the policy."""
    acp, stripe = described(api(), profile=Profile.acp), described(api(), profile=Profile.stripe)

    assert acp["components"]["schemas"]["IdempotencyError"]["required"] == ["type", "code", "message"]
    assert stripe["components"]["schemas"]["IdempotencyError"]["required"] == ["error"]
    assert "IdempotencyProblem" not in {**acp["components"]["schemas"], **stripe["components"]["schemas"]}
    reused = response(stripe, "400")["content"]["application/json"]["examples"]["key-reused"]["value"]["error"]
    assert (reused["type"], reused["code"]) == ("idempotency_error", "idempotency_key_reused")
    assert "422" not in stripe["paths"]["/orders"]["post"]["responses"]
    found = parameter(acp)
    assert found is not None
    assert found["required"] is True
    assert "Idempotency-Key" in response(acp, "201")["headers"]


def test_a_hook_of_the_user_is_asked_what_it_answers() -> None:
    """The body that it makes for each error is the example; of its schema nothing more is known."""
    xml = response(described(api(), error=to_xml), "409")["content"]["application/xml"]
    other = response(described(api(), error=to_json), "409")["content"]["application/json"]

    assert xml["schema"] == {"type": "string"}
    assert xml["examples"]["in-progress"]["value"] == "<error>in-progress</error>"
    assert other["schema"] == {"type": "object"}
    assert other["examples"]["in-progress"]["value"] == {"error": "in-progress", "retry_in": 1}


def test_a_hook_may_choose_the_status_and_send_no_body() -> None:
    """The document then has this status alone."""
    result = described(api(), error=to_teapot)

    assert set(result["paths"]["/orders"]["post"]["responses"]) == {"201", "418"}
    assert "content" not in response(result, "418")


def test_a_hook_that_fails_is_described_by_what_is_then_sent(caplog: pytest.LogCaptureFixture) -> None:
    """A problem document, and the log says so."""

    def fail(problem: Problem) -> dict[str, object]:
        raise RuntimeError

    result = described(api(), error=fail)

    assert "the hook error= raised RuntimeError" in caplog.text
    media = response(result, "422")["content"]["application/problem+json"]
    assert media["examples"]["key-reused"]["value"]["code"] == "key-reused"


def test_a_hook_gets_no_key() -> None:
    """There is no request."""
    seen: list[Any] = []

    def note(problem: Problem) -> dict[str, object]:
        seen.append(problem.key)
        return {}

    described(api(), error=note)

    assert set(seen) == {None}


def test_the_documentation_is_that_of_the_middleware() -> None:
    """The examples link to ``docs=``."""
    result = described(api(), docs="https://shop.example/idempotency")

    example = response(result, "422")["content"]["application/problem+json"]["examples"]["key-reused"]
    assert example["value"]["type"] == "https://shop.example/idempotency#key-reused"


def test_the_middleware_says_what_it_protects() -> None:
    """By the very routes and options that it uses for requests."""
    middleware = IdempotencyMiddleware(lambda *_: None, store="memory://")  # type: ignore[arg-type, return-value]

    assert middleware.protection.routes is middleware._routes
    assert middleware.protection.options is middleware._options

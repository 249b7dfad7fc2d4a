"""Generated requests get no answer that the served document does not describe."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import pytest
import requests
import schemathesis
from fastapi import FastAPI, Path
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from idempotency import IdempotencyMiddleware, Policy
from idempotency.openapi import document
from tests.openapi.documents import parameter

CHECKS: Any = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MALFORMED = ["", '"', "a b", "a,b", 'a"b', '"a" b', '"a", "b"', "a" * 256, "ä"]
REQUEST = ("method", "url", "headers", "params", "json", "data", "files")
LARGE = 2000
LIMITS = Policy(max_response=LARGE // 2, max_request=100)


class Order(BaseModel):
    item: str = Field(max_length=50)


class Refusal(BaseModel):
    detail: str


def shop() -> FastAPI:
    """Make an application that refuses some orders, and answers some at a length that is not recorded."""
    app = FastAPI()
    # FastAPI answers 400 to a body that is no text, and does not say so in its document.
    malformed: Any = {400: {"model": Refusal}}
    refusals: Any = {404: {"model": Refusal}, 409: {"model": Refusal}}

    @app.post("/orders/{number}", status_code=201, responses={**malformed, **refusals})
    async def create_order(number: Annotated[int, Path(ge=0, le=3)], order: Order) -> Any:
        if number >= 2:
            return JSONResponse({"detail": "sold out"}, 404 if number == 2 else 409)
        return {"order": "tea" * (LARGE if number == 1 else 1)}

    @app.patch("/orders/{number}", responses=malformed)
    async def change_order(number: Annotated[int, Path(ge=0, le=9)], order: Order) -> Order:
        return order

    policies = {"POST /orders/{id}": replace(LIMITS, required=True)}
    app.add_middleware(IdempotencyMiddleware, store="memory://", policy=LIMITS, policies=policies)
    return app


def operation_of(app: FastAPI, method: str) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)["/orders/{number}"][method]


def keys_of(app: FastAPI) -> st.SearchStrategy[list[str]]:
    """Generate the values of the field: one that fits its schema, none, a malformed one, and two."""
    found = parameter(app.openapi(), "/orders/{number}")
    assert found is not None
    valid = st.from_regex(found["schema"]["pattern"], fullmatch=True)
    return (
        valid.map(lambda key: [key])
        | st.just([])
        | st.sampled_from(MALFORMED).map(lambda key: [key])
        | st.lists(valid, min_size=2, max_size=2)
    )


class Sender:
    """Send what schemathesis has generated, with other keys, and check the answer; note what was answered."""

    def __init__(self, app: FastAPI) -> None:
        self._client = TestClient(app)
        self.seen: set[tuple[int, str | None]] = set()
        self.replays = 0

    def send(self, case: Any, keys: list[str]) -> None:
        options = case.as_transport_kwargs(base_url="http://testserver")
        request = requests.Request(**{name: options[name] for name in REQUEST if name in options}).prepare()
        fields = [(name, value) for name, value in request.headers.items() if name.lower() != "idempotency-key"]
        fields += [("Idempotency-Key", key) for key in keys]
        response = self._client.request(
            request.method or "",
            request.url or "",
            headers=[(to_bytes(name), to_bytes(value)) for name, value in fields],
            content=request.body,
        )
        case.validate_response(response, checks=CHECKS)
        is_problem = response.headers["content-type"] == "application/problem+json"
        self.seen.add((response.status_code, response.json()["code"] if is_problem else None))
        self.replays += "idempotent-replayed" in response.headers


def new_case(operation: Any, number: int, item: str) -> Any:
    """Make a request by hand: the first ones of each kind are not left to chance."""
    return operation.Case(path_parameters={"number": number}, body={"item": item}, media_type="application/json")


def to_bytes(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


OF_BOTH = {
    (400, "key-invalid"),
    (413, "request-too-large"),
    (422, "key-reused"),
    (422, None),
}
OF_EACH = {
    "POST": {(201, None), (404, None), (409, None), (400, "key-missing"), (409, "completed-not-replayable"), *OF_BOTH},
    "PATCH": {(200, None), *OF_BOTH},
}


@pytest.mark.parametrize("method", OF_EACH)
def test_generated_requests_get_documented_answers(method: str) -> None:
    """Valid and invalid ones, each sent again, and its key with another request."""
    app = shop()
    document(app)
    operation, sender = operation_of(app, method), Sender(app)
    cases = operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE)

    @settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases, other=cases, keys=keys_of(app))
    def check(case: Any, other: Any, keys: list[str]) -> None:
        for each in (case, case, other):
            sender.send(each, keys)

    check()
    for keys in ([], ["a", "b"], *([key] for key in MALFORMED)):
        sender.send(new_case(operation, 0, "tea"), keys)
    for number in range(4):
        for item in ("tea", "tea", "coffee", "tea" * 50):
            sender.send(new_case(operation, number, item), [f"order-{number}"])
    assert OF_EACH[method] <= sender.seen
    assert sender.replays > 0


def test_without_the_description_an_answer_of_the_middleware_is_not_documented() -> None:
    """So these requests find what a document lacks."""
    app = shop()
    operation = operation_of(app, "POST")

    with pytest.raises(FailureGroup) as found:
        Sender(app).send(new_case(operation, 0, "tea" * 50), ["k"])

    assert "Undocumented status code" in str(found.value)

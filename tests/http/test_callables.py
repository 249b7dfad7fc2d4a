"""What ``scope=`` and ``fingerprint=`` raise and return: they are treated as handlers, before anything is claimed."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi import HTTPException as FastAPIError
from litestar import Litestar
from litestar import post as litestar_post
from litestar.exceptions import NotAuthorizedException
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy
from idempotency.errors import ConfigurationError
from idempotency.events import Event
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, call, protect


class StrangerError(Exception):
    """What an application has a handler for."""


def options_of(where: str, function: Any) -> dict[str, Any]:
    return {"scope": function} if where == "scope" else {"policy": Policy(fingerprint=function)}


def application(kind: str, app: Any) -> Any:
    """Make an application with handlers of its own for some errors."""
    made = FastAPI() if kind == "fastapi" else Starlette(routes=[Route("/orders", app, methods=["POST"])])

    async def unknown(request, error):
        return PlainTextResponse(f"stranger {await request.body()!r} {request.state.idempotency}", 403)

    async def teapot(request, error):
        return JSONResponse({"teapot": True}, 418)

    made.add_exception_handler(StrangerError, unknown)
    made.add_exception_handler(418, teapot)
    return made


CASES = [
    (HTTPException(401, "who?", {"WWW-Authenticate": "Basic"}), 401, b"who?"),
    (FastAPIError(401, "who?", {"WWW-Authenticate": "Basic"}), 401, b"who?"),
    (HTTPException(418), 418, b'{"teapot":true}'),
    (StrangerError(), 403, b"stranger b'payload' None"),
]


@pytest.mark.parametrize("where", ["scope", "fingerprint"])
@pytest.mark.parametrize("placed", ["added", "around"])
@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
@pytest.mark.parametrize(("error", "status", "body"), CASES)
async def test_the_application_answers_what_a_callable_raises(where, placed, kind, error, status, body):
    """With its own handlers, headers included; nothing is claimed and nothing runs."""

    async def raises(request):
        raise error

    store, effects, events = FaultyStore(), Effects(), []
    options = {**options_of(where, raises), "store": store, "on_event": events.append}
    app = application(kind, effects)
    if placed == "added":
        app.add_middleware(IdempotencyMiddleware, **options)
    else:
        app = IdempotencyMiddleware(app, **options)
    reply = await call(app, key="k", body=b"payload")
    if kind == "fastapi" and status == 401:
        body = b'{"detail":"who?"}'
    assert (reply.status, reply.body) == (status, body)
    assert reply.header(b"www-authenticate") == (b"Basic" if status == 401 else None)
    assert (store.calls, effects.runs) == ([], 0)
    assert [(event.kind, event.error) for event in events] == [("refused", type(error).__name__)]


@pytest.mark.parametrize("where", ["scope", "fingerprint"])
async def test_an_http_exception_has_its_status_around_any_application(where):
    """Also where no framework is in sight."""

    def raises(request):
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})

    store, app = FaultyStore(), Effects()
    reply = await call(protect(app, store, **options_of(where, raises)), key="k")
    assert (reply.status, reply.header(b"www-authenticate")) == (401, b"Basic")
    assert (store.calls, app.runs) == ([], 0)


@pytest.mark.parametrize("where", ["scope", "fingerprint"])
async def test_litestar_answers_by_itself(where):
    """Its handlers are around its middleware."""

    def raises(request):
        raise NotAuthorizedException("who?", headers={"WWW-Authenticate": "Basic"})

    @litestar_post("/orders", status_code=201)
    async def order() -> None:
        raise AssertionError

    store = FaultyStore()
    middleware = DefineMiddleware(IdempotencyMiddleware, store=store, **options_of(where, raises))
    reply = await call(Litestar([order], middleware=[middleware]), path="/orders", key="k")
    assert (reply.status, json.loads(reply.body)["detail"]) == (401, "who?")
    assert store.calls == []


@pytest.mark.parametrize("where", ["scope", "fingerprint"])
@pytest.mark.parametrize("error", [LookupError, ConnectionError])
async def test_another_error_is_raised_before_anything_is_claimed(where, error):
    """The server answers it, as if a handler had raised it; the retry is a first one."""

    def raises(request):
        if broken:
            raise error("out of reach")
        return "alice"

    broken = True
    store, app = FaultyStore(), Effects()
    protected = protect(app, store, **options_of(where, raises))
    with pytest.raises(error):
        await call(protected, key="k")
    assert (store.calls, app.runs) == ([], 0)
    broken = False
    assert (await call(protected, key="k")).status == 201


# Malformed bodies


async def by_request(request: Request) -> str:
    return str((await request.json())["id"])


async def by_hand(request: Request) -> str:
    return str(json.loads(await request.body())["id"])


async def as_text(request: Request) -> str:
    return (await request.body()).decode()


@pytest.mark.parametrize(
    ("compare", "body"),
    [
        (by_request, b'{"id": 1'),
        (by_request, b""),
        (by_request, b"\xff\xfe{"),
        (by_request, b"[" * 100_000),
        (by_hand, b'{"id": 1'),
        (by_hand, b'{"id": \xc3\x28}'),
        (as_text, b"caf\xe9"),
    ],
)
@pytest.mark.parametrize("framework", [True, False])
async def test_a_body_that_cannot_be_read_is_the_requests_fault(compare, body, framework):
    """400, nothing claimed and nothing run; the same key may be used for the request as it was meant."""
    store, effects = FaultyStore(), Effects()
    options = {"store": store, "policy": Policy(fingerprint=compare)}
    app = application("starlette", effects) if framework else effects
    protected = IdempotencyMiddleware(app, **options)
    reply = await call(protected, key="k", body=body)
    assert (reply.status, reply.code) == (400, "body-invalid")
    assert json.loads(reply.body)["safe_new_key"] is True
    assert (store.calls, effects.runs) == ([], 0)
    assert (await call(protected, key="k", body=b'{"id": 1}')).status == 201


async def test_json_that_is_not_the_body_is_an_error_of_the_callable():
    """A header, or a service that is asked: the request is not blamed for it."""

    async def compare(request):
        await request.json()
        return str(json.loads("{"))

    with pytest.raises(json.JSONDecodeError):
        await call(protect(Effects(), policy=Policy(fingerprint=compare)), key="k", body=b"{}")


@pytest.mark.parametrize("ending", ["returns", "raises", "is answered", "has another type"])
async def test_a_form_that_a_callable_read_is_closed(ending, monkeypatch):
    """Its files are closed, however the callable ends."""
    file = UploadFile(file=tempfile.TemporaryFile())  # noqa: SIM115

    async def parse(self, **limits):
        self._form = FormData([("file", file)])
        return self._form

    async def compare(request):
        await request.form()
        if ending == "raises":
            raise LookupError
        if ending == "is answered":
            raise HTTPException(401)
        return 7 if ending == "has another type" else "same"

    monkeypatch.setattr(Request, "_get_form", parse)
    protected = protect(Effects(), policy=Policy(fingerprint=compare))
    try:
        await call(protected, key="k")
    except (LookupError, ConfigurationError):
        assert ending in ("raises", "has another type")
    assert file.file.closed


# Types


@pytest.mark.parametrize("value", [None, 7, True, ["a"], {"a": 1}, object()])
async def test_a_fingerprint_of_another_type_is_a_mistake(value):
    """It is raised before anything is claimed, and no retry is taken for another request because of it."""
    store, app = FaultyStore(), Effects()
    with pytest.raises(ConfigurationError, match="fingerprint must return str or bytes, not"):
        await call(protect(app, store, policy=Policy(fingerprint=lambda request: value)), key="k")
    assert (store.calls, app.runs) == ([], 0)


async def test_a_refusal_is_one_event():
    """With the error's name and no record: no key has been claimed."""

    async def compare(request):
        return str(await request.json())

    events: list[Event] = []
    await call(protect(Effects(), policy=Policy(fingerprint=compare), on_event=events.append), key="k", body=b"{")
    [event] = events
    assert (event.kind, event.error, event.record) == ("refused", "BodyInvalidError", "")

"""The functions of the user, and what the middleware for WSGI refuses when it is made."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
from werkzeug.exceptions import Unauthorized
from werkzeug.wrappers import Request

from idempotency import ConfigurationError, Policy
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.wsgi import IdempotencyMiddleware
from tests.kit.observed_store import ObservedStore
from tests.kit.wsgi_calls import Effects, call, protect


def test_a_scope_is_given_the_environ() -> None:
    """With what an outer middleware has put there; what the function does to it, and reads, changes nothing."""
    app = Effects()
    seen: list[Any] = []

    def scope(environ: dict[str, Any]) -> str:
        seen.append(environ["wsgi.input"].read())
        environ["wsgi.input"] = None
        return str(environ["shop.user"])

    protected = protect(app, scope=scope)
    answers = [call(protected, key="k", body=b"body", **{"shop.user": name}) for name in ("ann", "bob", "ann")]

    assert [each.body for each in answers] == [b'{"run":1}', b'{"run":2}', b'{"run":1}']
    assert app.bodies == [b"body", b"body"]
    assert seen == [b""] * 3


def test_a_fingerprint_is_given_the_body() -> None:
    """In an environ of its own: a framework makes its request of it, and the application still reads the body."""
    app = Effects()

    def amount(environ: dict[str, Any]) -> str:
        return str(Request(environ).get_json()["amount"])

    protected = protect(app, policy=Policy(fingerprint=amount))
    json_ = {"CONTENT_TYPE": "application/json"}
    bodies = (b'{"amount": 1}', b'{"amount": 1, "note": "x"}', b'{"amount": 2}')
    first, same, other = (call(protected, key="k", body=body, **json_) for body in bodies)

    assert (first.status, same.replayed, other.code) == (201, True, "key-reused")
    assert app.bodies == [bodies[0]]


def test_a_body_that_a_fingerprint_cannot_parse_is_refused() -> None:
    """400: nothing runs. Another error of the function is raised to the server."""
    app = Effects()
    protected = protect(app, policy=Policy(fingerprint=lambda environ: json.loads(environ["wsgi.input"].read())["a"]))

    assert call(protected, key="k", body=b"{").code == "body-invalid"
    assert call(protected, key="k", body=b'"\xff"').code == "body-invalid"
    with pytest.raises(KeyError):
        call(protected, key="k", body=b"{}")
    assert app.runs == 0


def test_an_error_of_werkzeug_is_the_answer() -> None:
    """abort(401) in scope= is answered as it would be by the application, and nothing runs; the key is echoed."""

    def scope(environ: dict[str, Any]) -> str:
        raise Unauthorized("log in first")

    app = Effects()
    events: list[Event] = []
    answer = call(protect(app, scope=scope, echo_key=True, on_event=events.append), key="k")

    assert answer.status == 401
    assert b"log in first" in answer.body
    assert answer.headers["idempotency-key"] == "k"
    assert [(each.kind, each.error) for each in events] == [("refused", "Unauthorized")]
    assert app.runs == 0


async def _named(environ: dict[str, Any]) -> str:
    return "ann"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": _named}, "scope must not be a coroutine function"),
        ({"policy": Policy(fingerprint=_named)}, "fingerprint must not be a coroutine function"),
        ({"policies": {"/a": Policy(fingerprint=_named)}}, "fingerprint must not be a coroutine function"),
        ({"on_event": _named}, "on_event must not be a coroutine function"),
        ({"store": object()}, "store must be a Store"),
        ({"store": "redis"}, "a store URL starts with"),
        ({"session": object()}, "session= needs an SQLStore"),
        ({"header_name": "a b"}, "header_name must be the name of a header"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    """When the middleware is made, with the remedy."""
    with pytest.raises(ConfigurationError, match=message):
        IdempotencyMiddleware(Effects(), **{"store": MemoryStore(), **options})


def test_an_async_driver_is_refused() -> None:
    """When the middleware is made where the engine is known, and at the first request where a URL names the driver."""
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine("sqlite+aiosqlite:///none.db")
    with pytest.raises(ConfigurationError, match="create_engine"):
        protect(Effects(), SQLStore(engine))
    app = Effects()
    with pytest.raises(ConfigurationError):
        call(IdempotencyMiddleware(app, store="postgresql+asyncpg://127.0.0.1/none"), key="k")
    assert app.runs == 0


def test_a_store_from_a_url_is_closed_with_its_application() -> None:
    """A store that was passed in is not closed."""
    store = ObservedStore(MemoryStore())
    protected = protect(Effects(), store)
    del protected
    gc.collect()
    assert store.closed == 0


def test_a_store_from_a_url_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, when nothing uses the middleware any more; the exit of the interpreter does the same."""
    store = ObservedStore(MemoryStore())
    monkeypatch.setattr("idempotency.wsgi.open_store", lambda url: store)
    protected = IdempotencyMiddleware(Effects(), store="memory://")
    call(protected, key="k")
    assert store.closed == 0
    del protected
    gc.collect()
    assert store.closed == 1


def test_two_middlewares_of_one_application_are_one() -> None:
    """The inner one sees that its request is protected already; one with another header protects by itself."""
    app = Effects()
    inner = protect(app, header_name="Other-Key")
    twice = protect(protect(inner))

    first, again = call(twice, key="k"), call(twice, key="k")
    other = call(twice, key="k2", HTTP_OTHER_KEY="o")
    same = call(twice, key="k3", HTTP_OTHER_KEY="o")

    assert (first.status, again.replayed, app.runs) == (201, True, 2)
    assert (other.status, same.body) == (201, other.body)

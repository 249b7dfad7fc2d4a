"""One request through either front end is one operation, on one store."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from idempotency import Policy, Profile, drain
from idempotency._rules import Claim
from idempotency.asgi import IdempotencyMiddleware as ASGIMiddleware
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from idempotency.wsgi import IdempotencyMiddleware as WSGIMiddleware
from tests.kit import asgi_calls, wsgi_calls
from tests.kit.observed_store import ObservedStore

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "path": {"path": "/bücher/%2F x/7"},
    "invalid utf-8": {"raw": b"/caf\xe9/7"},
    "query": {"query": b"a=%C3%BC&b=1&a=2"},
    "mounted": {"root_path": "/api", "path": "/api/orders"},
    "bearer": {"headers": [(b"authorization", b"Bearer abc")]},
    "basic": {"headers": [(b"authorization", b"Basic " + base64.b64encode(b"a:b"))]},
    "api key": {"headers": [(b"x-api-key", b"k1"), (b"x-tenant-id", b"t1"), (b"accept", b"*/*")]},
    "json": {"headers": [(b"content-type", b"application/json; charset=utf-8")], "body": b'{"a": 1.0}'},
    "form": {
        "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        "body": b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n--b--\r\n',
    },
    "large": {"body": bytes(3_000_000)},
    "method": {"method": "PATCH"},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "secret": {"secret": "s3cret", "policy": Policy(fingerprint="json", key_per_path=True)},
    "acp": {"profile": Profile.acp, "policies": {"PATCH /orders": Profile.acp.policy}},
}


def environ_of(request: dict[str, Any]) -> dict[str, Any]:
    root, raw = request.get("root_path", ""), request.get("raw")
    path = raw.decode("latin-1") if raw else request.get("path", "/orders").encode().decode("latin-1")
    variables: dict[str, Any] = {"SCRIPT_NAME": root, "QUERY_STRING": request.get("query", b"").decode("latin-1")}
    for name, value in request.get("headers", ()):
        variable = name.decode().upper().replace("-", "_")
        variables[variable if variable.startswith("CONTENT_") else f"HTTP_{variable}"] = value.decode("latin-1")
    return wsgi_calls.environ_of(
        path.removeprefix(root),
        key="k",
        body=request.get("body", b""),
        method=request.get("method", "POST"),
        **variables,
    )


def scope_of(request: dict[str, Any]) -> dict[str, Any]:
    raw = request.get("raw")
    path = raw.decode("utf-8", "replace") if raw else request.get("path", "/orders")
    given = {name: value for name, value in request.items() if name not in ("raw", "path", "body")}
    return {"path": path, "key": "k", **given}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=list(REQUESTS))
@pytest.mark.parametrize("first", ["asgi", "wsgi"])
async def test_a_key_used_through_one_is_replayed_through_the_other(
    first: str, request_: dict[str, Any], options: dict[str, Any]
) -> None:
    """Scope, fingerprint and recorded response are the same, so that the second one replays."""
    store = ObservedStore(MemoryStore())
    asynchronous, synchronous = asgi_calls.Effects(), wsgi_calls.Effects()
    by_asgi = ASGIMiddleware(asynchronous, store=store, **options)
    by_wsgi = WSGIMiddleware(synchronous, store=store, **options)
    body = request_.get("body", b"")

    if first == "wsgi":
        answer = wsgi_calls.run(by_wsgi, environ_of(request_))
        reply = await asgi_calls.call(by_asgi, body=body, **scope_of(request_))
    else:
        reply = await asgi_calls.call(by_asgi, body=body, **scope_of(request_))
        answer = wsgi_calls.run(by_wsgi, environ_of(request_))

    assert (asynchronous.runs, synchronous.runs) == ((1, 0) if first == "asgi" else (0, 1))
    assert (reply.replayed, answer.replayed) == (first == "wsgi", first == "asgi")
    assert (reply.status, reply.body) == (answer.status, answer.body) == (201, b'{"run":1}')
    one, other = store.claims
    assert (one.id, one.fingerprint) == (other.id, other.fingerprint)
    assert reply.header(b"content-type") == answer.headers["content-type"].encode()


@pytest.mark.parametrize(
    ("key", "options", "status"),
    [
        (None, {"policy": Policy(required=True)}, 400),
        ('"k', {}, 400),
        ("k", {"policy": Policy(max_request=1)}, 413),
        ("k", {"profile": Profile.stripe}, 503),
        ("k", {"error": lambda problem: (599, {"X-Code": problem.code}, "x")}, 599),
        ("k", {"echo_key": True}, 503),
    ],
)
async def test_the_same_refusals(key: str | None, options: dict[str, Any], status: int) -> None:
    """Status, header fields and body of our own answers do not depend on the front end."""
    store = FaultyStore()
    store.down = True
    by_asgi = ASGIMiddleware(asgi_calls.Effects(), store=store, **options)
    by_wsgi = WSGIMiddleware(wsgi_calls.Effects(), store=store, **options)

    reply = await asgi_calls.call(by_asgi, key=key, body=b"body", headers=[(b"content-length", b"4")])
    answer = wsgi_calls.call(by_wsgi, key=key, body=b"body")
    store.down = False
    await drain()

    assert reply.status == answer.status == status
    assert reply.body == answer.body
    assert [(n.decode(), v.decode()) for n, v in reply.headers] == answer.starts[0][1]


def claim_of(environ: dict[str, Any], **options: Any) -> Claim:
    store = ObservedStore(MemoryStore())
    wsgi_calls.run(WSGIMiddleware(wsgi_calls.Effects(), store=store, **options), environ)
    [claim] = store.claims
    return claim


def test_a_caller_whom_the_server_names_is_a_caller() -> None:
    """REMOTE_USER, which a server sets that has authenticated the caller itself, separates callers."""
    alice, bob, nobody = (
        claim_of(wsgi_calls.environ_of(key="k", REMOTE_USER=name)).scope for name in ("alice", "bob", None)
    )

    assert len({alice, bob, nobody}) == 3
    assert "alice" not in alice

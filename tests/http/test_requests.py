"""Requests and other connections: what is protected, what passes, and how a body is read."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from idempotency import Policy
from idempotency._http import body
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, read, respond


@pytest.mark.parametrize("kind", ["websocket", "http.weird", "custom"])
async def test_other_connections_pass_untouched(kind):
    """The same scope, receive and send reach the application."""
    got: list[Any] = []

    async def app(*arguments):
        got.extend(arguments)

    store = FaultyStore()
    scope, client, reply = {"type": kind, "headers": [(b"idempotency-key", b"k")]}, Client(), Reply()
    await protect(app, store)(scope, client, reply.send)
    assert [id(each) for each in got[:2]] == [id(scope), id(client)]
    assert got[2] == reply.send
    assert scope == {"type": kind, "headers": [(b"idempotency-key", b"k")]}
    assert store.calls == []


@pytest.mark.parametrize("request_", [{"method": "GET", "key": "k"}, {"key": None}, {"path": "/free", "key": "k"}])
async def test_a_request_that_is_not_protected_is_not_touched(request_):
    """It is not buffered, not wrapped, and asks no store."""
    got: list[Any] = []

    async def app(scope, receive, send):
        got.extend((scope, receive, send))

    store = FaultyStore()
    scope, client, send = http_scope(**request_), Client(), Reply().send
    await protect(app, store, policies={"/free": None})(scope, client, send)
    assert got[0] is scope
    assert got[1] is client
    assert got[2] is send
    assert len(client.messages) == 1
    assert store.calls == []


async def test_a_scope_without_state_is_given_one():
    """Servers without a lifespan make none."""
    app = Effects()
    scope = http_scope(key="k")
    del scope["state"]
    await protect(app)(scope, Client(), Reply().send)
    assert app.operations[0].key == "k"


@pytest.mark.parametrize("sent", [(), (b"half",), (b"half", b"more")])
async def test_a_client_that_leaves_while_it_sends_starts_nothing(sent):
    """Its request never was; nothing is claimed, run or answered."""
    store, app, reply = FaultyStore(), Effects(), Reply()
    client = Client(gone=True)
    client.messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in sent]
    await protect(app, store)(http_scope(key="k"), client, reply.send)
    assert (store.calls, app.runs, reply.messages) == ([], 0, [])


async def test_after_the_body_comes_what_the_server_says():
    """The application's later calls reach the server's own receive, one for one."""
    asked = 0

    async def receive():
        nonlocal asked
        asked += 1
        if asked == 1:
            return {"type": "http.request", "body": b"all", "more_body": False}
        return {"type": "http.anything", "number": asked}

    heard = []

    async def handler(scope, receive, send):
        heard.extend([await receive() for _ in range(3)])
        await respond(send)

    await protect(Effects(handler))(http_scope(key="k"), receive, Reply().send)
    assert heard == [
        {"type": "http.request", "body": b"all", "more_body": False},
        {"type": "http.anything", "number": 2},
        {"type": "http.anything", "number": 3},
    ]


LARGE = tuple(bytes([number]) * 400_000 for number in range(4))


@pytest.fixture
def files(monkeypatch):
    """The temporary files that bodies were written to."""
    made = []

    def make():
        made.append(tempfile.TemporaryFile())  # noqa: SIM115
        return made[-1]

    monkeypatch.setattr(body, "tempfile", SimpleNamespace(TemporaryFile=make))
    return made


async def test_a_body_on_disk_is_read_as_often_as_needed(files):
    """By a fingerprint, then by the application, to which the server speaks again after it."""
    compared, heard = [], []

    async def length(request):
        compared.append(await request.body())
        return b"any"

    async def handler(scope, receive, send):
        heard.append(await read(receive))
        client.gone.set()
        heard.append(await receive())
        await respond(send)

    client = Client(*LARGE)
    protected = protect(Effects(handler), policy=Policy(fingerprint=length))
    await protected(http_scope(key="k"), client, Reply().send)
    assert compared == [b"".join(LARGE)]
    assert heard == [b"".join(LARGE), {"type": "http.disconnect"}]
    assert [file.closed for file in files] == [True]


@pytest.mark.parametrize("ending", ["complete", "disconnect", "too large", "handler fails", "fingerprint fails"])
async def test_a_body_on_disk_is_removed(ending, files):
    """However its request ends."""

    async def handler(scope, receive, send):
        if ending == "handler fails":
            raise ValueError
        await respond(send)

    def compare(request):
        if ending == "fingerprint fails":
            raise ValueError
        return b""

    client = Client(*LARGE, gone=True)
    if ending == "disconnect":
        client.messages.pop()
    limit = 1_500_000 if ending == "too large" else 1 << 30
    protected = protect(Effects(handler), policy=Policy(max_request=limit, fingerprint=compare))
    with suppress(ValueError):
        await protected(http_scope(key="k"), client, Reply().send)
    assert [file.closed for file in files] == [True]


async def test_requests_made_from_one_scope_are_each_protected():
    """A batch endpoint that calls the application with copies of its own scope shares its state with all of them."""
    app = Effects()
    protected = protect(app, policy=Policy(required=True))
    outer = http_scope(key=None, path="/batch")
    statuses = []
    for key in (b"k1", b"k2", b"k2", None):
        reply = Reply()
        headers = [(b"idempotency-key", key)] if key else []
        await protected({**outer, "path": "/orders", "headers": headers}, Client(), reply.send)
        statuses.append((reply.status, reply.replayed))
    assert statuses == [(201, False), (201, False), (201, True), (400, False)]
    assert app.runs == 2


async def test_a_method_in_lower_case_is_protected():
    """Some servers hand it on as it was sent, and some frameworks read it as POST."""
    app = Effects()
    assert (await call(protect(app, policy=Policy(required=True)), method="post")).status == 400
    assert app.runs == 0


async def test_headers_may_be_read_once():
    """ASGI promises an iterable, no list."""
    app = Effects()
    protected = protect(app)
    bodies = []
    for who in (b"Bearer alice", b"Bearer bob"):
        scope, reply = http_scope(), Reply()
        scope["headers"] = iter([(b"authorization", who), (b"idempotency-key", b"k")])
        await protected(scope, Client(), reply.send)
        bodies.append(reply.replayed)
    assert bodies == [False, False]
    assert app.runs == 2

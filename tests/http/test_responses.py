"""The messages of a response: what is recorded, what is sent, and in which order."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from idempotency import Policy
from idempotency._http import capture
from idempotency.events import Event
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, read, respond
from tests.kit.time_travel import now, travelling, travelling_store


async def test_what_is_no_part_of_the_response_passes_at_once():
    """Early hints, pushes and debug messages go out in order, and are not replayed."""
    hints = [
        {"type": "http.response.early_hint", "links": [b"</style.css>; rel=preload"]},
        {"type": "http.response.push", "path": "/style.css", "headers": []},
        {"type": "http.response.debug", "info": {"template": "t"}},
    ]

    async def handler(scope, receive, send):
        for hint in hints:
            await send(hint)
        assert reply.messages == hints
        await respond(send, 201, b"ok")

    protected = protect(Effects(handler))
    reply = Reply()
    await protected(http_scope(key="k"), Client(), reply.send)
    assert [message["type"] for message in reply.messages[3:]] == ["http.response.start", "http.response.body"]
    retry = await call(protected, key="k")
    assert (len(retry.messages), retry.body) == (2, b"ok")


async def test_a_response_with_trailers_passes_live():
    """Nothing of it is lost, and it is not stored in part."""
    messages = [
        {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.body", "body": b"a", "more_body": True},
        {"type": "http.response.body", "body": b"b", "more_body": False},
        {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False},
    ]

    async def handler(scope, receive, send):
        for number, message in enumerate(messages, start=1):
            await send(message)
            assert len(reply.messages) == number

    reply = Reply()
    protected = protect(Effects(handler))
    await protected(http_scope(key="k"), Client(), reply.send)
    assert reply.messages == messages
    assert (await call(protected, key="k")).code == "completed-not-replayable"


async def test_a_file_sent_by_path_is_recorded_before_it_is_sent():
    """By the time the server sees the start, a duplicate is told that it is done."""
    told = []

    async def send(message):
        told.append((message["type"], (await call(protected, key="k")).code))

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/etc/hostname"})

    protected = protect(Effects(handler))
    await protected(http_scope(key="k"), Client(), send)
    assert told == [
        ("http.response.start", "completed-not-replayable"),
        ("http.response.pathsend", "completed-not-replayable"),
    ]


async def test_a_response_is_recorded_before_its_first_byte():
    """No client holds a success that a duplicate would not be given."""
    told = []

    async def send(message):
        told.append((await call(protected, key="k")).replayed)

    protected = protect(Effects())
    await protected(http_scope(key="k"), Client(), send)
    assert told == [True, True]


@travelling
async def test_a_slow_stream_goes_out_after_two_seconds():
    """What was collected until then, then every piece as it is sent; a duplicate is told that it is done."""
    sent: list[tuple[float, bytes]] = []

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(5):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
            await asyncio.sleep(0.8)
        await send({"type": "http.response.body", "body": b"!"})

    began = now()

    async def send(message):
        sent.append((round(now() - began, 3), message.get("body", b"start")))

    protected = protect(Effects(handler), travelling_store())
    await protected(http_scope(key="k"), Client(), send)
    assert sent == [(2.0, b"start"), (2.0, b"012"), (2.4, b"3"), (3.2, b"4"), (4.0, b"!")]
    assert (await call(protected, key="k")).code == "completed-not-replayable"


async def test_patience_is_a_constant_that_is_read_when_it_counts(monkeypatch):
    """A stream that never ends is live soon after its first piece."""
    monkeypatch.setattr(capture, "PATIENCE", 0.01)
    live = asyncio.Event()

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        await live.wait()
        await send({"type": "http.response.body"})

    async def send(message):
        if message.get("body") == b"tick":
            live.set()

    async with asyncio.timeout(20):
        await protect(Effects(handler))(http_scope(key="k"), Client(), send)


@travelling
async def test_a_stream_whose_client_is_gone_ends_in_order():
    """The server refuses what is sent late; the application learns it at its next piece, and the key is done."""

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        await asyncio.sleep(5)
        await send({"type": "http.response.body", "body": b"tock", "more_body": True})

    async def send(message):
        raise OSError("gone")

    app = Effects(handler)
    protected = protect(app, travelling_store())
    with pytest.raises(OSError, match="gone"):
        await protected(http_scope(key="k"), Client(), send)
    assert (await call(protected, key="k")).code == "completed-not-replayable"


@pytest.mark.parametrize("ending", ["return", "raise"])
@travelling
async def test_an_application_that_ends_while_its_stream_goes_live(ending):
    """The record is being written when it returns or fails: one end counts, and nothing is left behind."""
    slow = asyncio.Event()
    store = FaultyStore(travelling_store()).order("complete", slow.wait)

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        await asyncio.sleep(3)
        asyncio.get_running_loop().call_later(1, slow.set)
        if ending == "raise":
            raise ValueError("broken")

    events: list[Event] = []
    protected = protect(Effects(handler), store, on_event=events.append)
    reply = Reply()
    with suppress(ValueError):
        await protected(http_scope(key="k"), Client(), reply.send)
    await asyncio.sleep(2)
    assert [message["type"] for message in reply.messages] == (
        ["http.response.start", "http.response.body"] if ending == "return" else []
    )
    assert [event.kind for event in events] == ["stored-without-result"]
    assert (await call(protected, key="k")).code == "completed-not-replayable"


async def test_an_application_that_returns_in_the_middle():
    """What it sent is passed on, and the key is done: it is not run again."""

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    app = Effects(handler)
    protected = protect(app)
    reply = await call(protected, key="k")
    assert (reply.body, reply.complete) == (b"half", False)
    assert (await call(protected, key="k")).code == "completed-not-replayable"
    assert app.runs == 1


async def test_an_application_that_raises_in_the_middle():
    """Nothing of the response was sent, so the server can answer 500, and the key is free."""

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("broken")

    app = Effects(handler)
    protected = protect(app)
    reply = Reply()
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            await protected(http_scope(key="k"), Client(), reply.send)
    assert (reply.messages, app.runs) == ([], 2)


async def test_an_application_that_answers_nothing():
    """It is passed on as it is, and its key is free."""

    async def handler(scope, receive, send):
        await read(receive)

    app = Effects(handler)
    protected = protect(app)
    assert (await call(protected, key="k")).messages == []
    assert (await call(protected, key="k")).messages == []
    assert app.runs == 2


@pytest.mark.parametrize("kind", ["http.response.body", "http.response.pathsend", "http.response.zerocopysend"])
@pytest.mark.parametrize("more", [True, False])
async def test_a_body_before_its_start_is_refused(kind, more):
    """At once, where the mistake is."""

    async def handler(scope, receive, send):
        await send({"type": kind, "body": b"x", "more_body": more})

    reply = Reply()
    with pytest.raises(RuntimeError, match="before the response start"):
        await protect(Effects(handler))(http_scope(key="k"), Client(), reply.send)
    assert reply.messages == []


@pytest.mark.parametrize("kind", [iter, list, tuple])
@pytest.mark.parametrize("media", [b"text/plain", b"text/event-stream"])
async def test_headers_may_be_any_iterable(kind, media):
    """ASGI asks for no list: read more than once, none of them is lost, and none is changed for the application."""
    pairs = [(b"x-a", b"1"), (b"content-type", media), [b"x-b", b"2"]]

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": kind(pairs)})
        await send({"type": "http.response.body", "body": b"ok"})

    protected = protect(Effects(handler))
    first, retry = await call(protected, key="k"), await call(protected, key="k")
    assert first.headers == pairs
    if media == b"text/plain":
        assert retry.headers == [*map(tuple, pairs), (b"idempotent-replayed", b"true")]


async def test_a_start_without_headers_is_a_response():
    """They may be left out."""

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    protected = protect(Effects(handler))
    assert (await call(protected, key="k")).headers == []
    assert (await call(protected, key="k")).headers == [(b"idempotent-replayed", b"true")]


async def test_concurrent_pieces_keep_their_order():
    """Two tasks of one application may send; what each sends arrives whole."""

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        pieces = [{"type": "http.response.body", "body": b"%d" % each, "more_body": True} for each in range(10)]
        await asyncio.gather(*map(send, pieces))
        await send({"type": "http.response.body"})

    protected = protect(Effects(handler), policy=Policy(max_response=5))
    assert (await call(protected, key="k")).body == b"0123456789"


async def test_an_application_without_an_answer_counts_as_a_crash():
    """Some return silently when their client is gone, after the effect: a key that is held stays held."""

    async def silent(scope, receive, send):
        await read(receive)

    app = Effects(silent)
    protected = protect(app, policy=Policy(on_crash="hold"))
    await call(protected, key="k")
    assert (await call(protected, key="k")).code == "outcome-unknown"
    assert app.runs == 1

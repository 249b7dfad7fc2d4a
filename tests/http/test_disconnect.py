"""A client that leaves before its answer is recorded: nothing is stopped, lost or hung."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from idempotency import Policy
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, read, respond
from tests.kit.time_travel import now, settled, travelling, travelling_store


class Once(Client):
    """A server that says once that the client is gone, as Hypercorn's queue does, to one of those that ask."""

    def __init__(self, *chunks: bytes) -> None:
        super().__init__(*chunks)
        self.said = 0

    async def __call__(self) -> dict[str, Any]:
        if not self.messages:
            await self.gone.wait()
            if self.said:
                await asyncio.Event().wait()
            self.said += 1
        return await super().__call__()


class Cancelling:
    """A framework that cancels its handler when its client is gone, as Django and Quart do."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.heard = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await read(receive)
        tasks = [asyncio.create_task(self._listen(receive)), asyncio.create_task(self.handler(scope, receive, send))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _listen(self, receive: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"
        self.heard.set()


@pytest.mark.parametrize("policy", [Policy(), Policy(on_crash="hold")])
async def test_a_framework_that_cancels_its_handler_hears_it_after_the_record(policy):
    """While the handler runs the retry is told so; once it is recorded, it is replayed: one effect."""

    async def handler(scope, receive, send):
        await gate.wait()
        await respond(send, 201, b"done")

    gate = asyncio.Event()
    framework = Cancelling(handler)
    app = Effects(framework)
    protected, client = protect(app, policy=policy), Client(b"body")
    request = asyncio.create_task(protected(http_scope(key="k"), client, Reply().send))
    await app.running.wait()
    client.gone.set()
    await settled()
    assert (await call(protected, key="k", body=b"body")).code == "in-progress"
    gate.set()
    await request
    assert framework.heard.is_set()
    retry = await call(protected, key="k", body=b"body")
    assert (retry.body, retry.replayed, app.runs) == (b"done", True, 1)


async def test_every_listener_gets_the_one_message_of_the_server():
    """Two listeners and a poll, of which the server answers one: all hear it, once the answer is recorded."""
    heard: list[str] = []

    async def handler(scope, receive, send):
        await read(receive)
        request = Request(scope, receive)
        listeners = [asyncio.create_task(receive()) for _ in range(2)]
        await settled()
        client.gone.set()
        await settled()
        assert await request.is_disconnected() is False
        assert not any(task.done() for task in listeners)
        await respond(send, 201)
        heard.extend([(await task)["type"] for task in listeners])
        assert await request.is_disconnected() is True

    client = Once(b"body")
    async with asyncio.timeout(30):
        await protect(Effects(handler))(http_scope(key="k"), client, Reply().send)
    assert heard == ["http.disconnect", "http.disconnect"]
    assert client.said == 1


async def test_a_listener_that_is_cancelled_loses_no_message():
    """Neither while the server is asked nor while the message is withheld."""

    async def handler(scope, receive, send):
        await read(receive)
        for gone in (False, True):
            if gone:
                client.gone.set()
            listener = asyncio.create_task(receive())
            await settled()
            listener.cancel()
            await asyncio.wait([listener])
            assert listener.cancelled()
        await respond(send, 201)
        heard.append((await receive())["type"])

    heard: list[str] = []
    client = Once(b"body")
    async with asyncio.timeout(30):
        await protect(Effects(handler))(http_scope(key="k"), client, Reply().send)
    assert heard == ["http.disconnect"]


async def test_a_poll_says_that_the_client_is_there_until_the_record():
    """A handler that gives up when its client is gone does not give up after its effect."""
    polls: list[bool] = []

    async def endpoint(request):
        await request.body()
        client.gone.set()
        for _ in range(3):
            polls.append(await request.is_disconnected())
            await asyncio.sleep(0)
        return JSONResponse({"polls": polls}, 499 if any(polls) else 201)

    client, reply = Client(b"body"), Reply()
    app = protect(Starlette(routes=[Route("/orders", endpoint, methods=["POST"])]))
    await app(http_scope(key="k"), client, reply.send)
    assert polls == [False, False, False]
    assert reply.status == 201


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_stream_that_is_still_held_is_complete_without_its_reader(wrapped, spec_version):
    """Starlette listens beside it: it is told when the stream is recorded, which is then replayed whole."""

    async def endpoint(request):
        await request.body()

        async def pieces():
            client.gone.set()
            for _ in range(20):
                await asyncio.sleep(0)
                yield b"piece"

        return StreamingResponse(pieces(), 201)

    client = Client(b"body")
    inner = Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    if wrapped:
        inner.add_middleware(Passing)
    app = protect(inner)
    scope = http_scope(key="k", asgi={"version": "3.0", "spec_version": spec_version})
    async with asyncio.timeout(30):
        await app(scope, client, Reply().send)
    retry = await call(app, key="k", body=b"body")
    assert (retry.status, retry.body, retry.replayed) == (201, b"piece" * 20, True)


async def test_a_stream_whose_reader_is_gone_begins_before_it_hears_so():
    """A ``BaseHTTPMiddleware`` outside gets the response, and does not raise that there is none."""

    async def endpoint(request):
        async def pieces():
            yield b"one,"
            await gate.wait()
            yield b"two"

        return StreamingResponse(pieces(), 201)

    gate = asyncio.Event()
    outside = Starlette()
    outside.mount("/", protect(Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])))
    outside.add_middleware(Passing)
    client, reply = Client(), Reply()
    request = asyncio.create_task(outside(http_scope(key="k"), client, reply.send))
    await settled()
    client.gone.set()
    await settled()
    gate.set()
    await request
    assert reply.status == 201
    assert (await call(outside, key="k")).body == b"one,two"


async def test_a_stream_that_is_on_its_way_hears_that_its_reader_is_gone():
    """An endless one ends then."""

    async def endpoint(request):
        async def events():
            try:
                while True:
                    yield b"data: tick\n\n"
                    client.gone.set()
                    await asyncio.sleep(0)
            finally:
                ended.append(True)

        return StreamingResponse(events(), media_type="text/event-stream")

    ended: list[bool] = []
    client = Client()
    app = protect(Starlette(routes=[Route("/orders", endpoint, methods=["POST"])]))
    async with asyncio.timeout(30):
        await app(http_scope(key="k"), client, Reply().send)
    assert ended == [True]
    assert (await call(app, key="k")).code == "completed-not-replayable"


async def test_a_listener_that_began_before_the_first_byte_hears_it_with_it():
    """As those of server-sent events do: what waits already is woken when the stream goes out."""

    async def handler(scope, receive, send):
        await read(receive)
        async with anyio.create_task_group() as group:

            async def listen():
                assert (await receive())["type"] == "http.disconnect"
                group.cancel_scope.cancel()

            group.start_soon(listen)
            await settled()
            client.gone.set()
            await settled()
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await asyncio.Event().wait()

    client = Client(b"body")
    async with asyncio.timeout(30):
        await protect(Effects(handler))(http_scope(key="k"), client, Reply().send)


@pytest.mark.parametrize("how", ["itself", "a task"])
@pytest.mark.parametrize("answers", [True, False])
async def test_an_application_that_only_waits_for_it_is_told(how, answers):
    """A long poll that answers when its client leaves, or never, does not hang."""

    async def handler(scope, receive, send):
        await read(receive)
        message = await (receive() if how == "itself" else asyncio.create_task(receive()))
        assert message == {"type": "http.disconnect"}
        if answers:
            await respond(send, 200)

    app, client = Effects(handler), Client(b"body")
    client.gone.set()
    reply = Reply()
    async with asyncio.timeout(30):
        await protect(app)(http_scope(key="k"), client, reply.send)
    assert (app.runs, reply.complete) == (1, answers)


@pytest.mark.parametrize("place", ["a task", "a thread", "itself"])
async def test_an_application_that_does_anything_else_is_not(place):
    """Its work may be in a task beside the one that listens, in a thread below it, or where it was called."""

    async def work(send):
        await (asyncio.to_thread(thread_gate.wait) if place == "a thread" else gate.wait())
        finished.append(True)
        await respond(send, 201, b"done")

    async def handler(scope, receive, send):
        await read(receive)
        if place == "itself":
            listener = asyncio.create_task(receive())
            await work(send)
            heard.append(((await listener)["type"], bool(finished)))
        else:
            worker = asyncio.create_task(work(send))
            heard.append(((await receive())["type"], bool(finished)))
            await worker

    gate, thread_gate = asyncio.Event(), threading.Event()
    heard: list[Any] = []
    finished: list[bool] = []
    client, app = Client(b"body"), Effects(handler)
    request = asyncio.create_task(protect(app)(http_scope(key="k"), client, Reply().send))
    await app.running.wait()
    client.gone.set()
    # Longer than an application that only waits would have to.
    await asyncio.wait([request], timeout=1)
    assert heard == []
    gate.set()
    thread_gate.set()
    await request
    assert heard == [("http.disconnect", True)]


@travelling
async def test_it_is_withheld_for_ten_minutes_at_most():
    """A long poll in a loop is ended by it then, and its key follows the policy."""

    async def handler(scope, receive, send):
        await read(receive)
        request = Request(scope, receive)
        while not await request.is_disconnected():
            await asyncio.sleep(1)

    app, client = Effects(handler), Client(b"body")
    client.gone.set()
    began = now()
    await protect(app, travelling_store())(http_scope(key="k"), client, Reply().send)
    assert 600 <= now() - began <= 610


async def test_a_server_that_raises_at_an_early_hint_stops_nothing():
    """Its refusal to send to a client that is gone comes before the record, so the application does not get it."""

    async def handler(scope, receive, send):
        await read(receive)
        await send({"type": "http.response.early_hint", "links": []})
        await respond(send, 201, b"done")

    async def send(message):
        raise OSError("the client is gone")

    app = Effects(handler)
    protected = protect(app)
    with pytest.raises(OSError, match="gone"):
        await protected(http_scope(key="k"), Client(), send)
    assert (await call(protected, key="k")).body == b"done"
    assert app.runs == 1

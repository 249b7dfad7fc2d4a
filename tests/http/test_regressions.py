"""How idempotency layers have broken, one test for each behaviour, in one process.

Shown on real servers instead, in ``tests/live``: a worker that is killed leaves no key stuck past its lease; a client
that goes away changes nothing; streams are complete to the byte; a handler longer than its lease keeps it between
processes. Shown on every store by the contract suite: values survive every byte, and a record is one write.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy, drain
from idempotency._http.caller import ANONYMOUS
from idempotency._rules import Claim, record_id
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, read, respond
from tests.kit.observed_store import ObservedStore
from tests.kit.time_travel import settled, travelling, travelling_store, written

pytestmark = pytest.mark.fronts("asgi", "wsgi")


def starlette(endpoint: Any, **options: Any) -> Starlette:
    """Make an application as users do: one endpoint, the middleware added in the documented way."""
    app = Starlette(routes=[Route("/orders", endpoint, methods=["GET", "POST"])])
    app.add_middleware(IdempotencyMiddleware, store=options.pop("store", None) or MemoryStore(), **options)
    return app


# Owners that are no longer owners


@pytest.mark.fronts("asgi")
@pytest.mark.parametrize("status", [201, 500])
@travelling
async def test_a_late_owner_neither_overwrites_nor_frees_its_successors_record(status):
    """Whether it succeeds or fails after its lease, what the second recorded stays: a third request replays it."""
    store = FaultyStore(travelling_store())
    store.order("renew", *["fail"] * 1000)
    gates = [asyncio.Event(), asyncio.Event()]
    statuses = [status, 201]

    async def handler(scope, receive, send):
        number = app.runs
        await gates[number - 1].wait()
        await respond(send, statuses[number - 1], b"%d" % number)

    app = Effects(handler)
    protected = protect(app, store, policy=Policy(lease=10))
    first = asyncio.create_task(call(protected, key="k"))
    await asyncio.sleep(11)
    second = asyncio.create_task(call(protected, key="k"))
    await settled()
    gates[1].set()
    assert (await second).body == b"2"
    gates[0].set()
    late = await first
    third = await call(protected, key="k")
    assert (third.body, third.replayed, app.runs) == (b"2", True, 2)
    # A success that is not recorded is not sent either.
    assert late.body == (b"2" if status == 201 else b"1")


@pytest.mark.fronts("asgi")
@travelling
async def test_a_late_failure_does_not_free_a_running_successor():
    """While the second still runs, the first one's failure leaves it its key."""
    store = FaultyStore(travelling_store())
    store.order("renew", *["fail"] * 1000)
    gates = [asyncio.Event(), asyncio.Event()]

    async def handler(scope, receive, send):
        number = app.runs
        await gates[number - 1].wait()
        await respond(send, 500 if number == 1 else 201)

    app = Effects(handler)
    protected = protect(app, store, policy=Policy(lease=10))
    first = asyncio.create_task(call(protected, key="k"))
    await asyncio.sleep(11)
    second = asyncio.create_task(call(protected, key="k"))
    await settled()
    gates[0].set()
    await first
    assert (await call(protected, key="k")).code == "in-progress"
    gates[1].set()
    await second
    assert app.runs == 2


async def test_a_duplicate_that_arrives_while_the_first_completes_does_not_run():
    """Whenever it asks, before, in and after the completion, there is no gap in which the key looks free."""
    for pause in range(12):
        app = Effects()
        protected = protect(app, FaultyStore())
        first = asyncio.create_task(call(protected, key="k"))
        for _ in range(pause):
            await asyncio.sleep(0)
        duplicate = await call(protected, key="k")
        await first
        assert app.runs == 1
        assert duplicate.status in (201, 409)


async def test_a_waiter_that_gives_up_leaves_the_live_claim():
    """It is told 409; the first goes on, completes and replays."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, policy=Policy(wait=0.02))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    assert (await call(protected, key="k")).code == "in-progress"
    app.gate.set()
    await first
    assert (await call(protected, key="k")).body == b'{"run":1}'


# Crashes


async def _abandoned(clock: ManualClock, store: MemoryStore) -> Claim:
    """Leave behind what a killed worker leaves: a claim that nobody renews."""
    flaky = ObservedStore(store).order("release", "refuse")
    app = Effects()
    app.gate = asyncio.Event()
    victim = asyncio.create_task(call(protect(app, flaky), key="k", body=b"one"))
    await app.running.wait()
    victim.cancel()
    await asyncio.wait([victim])
    [claim] = flaky.claims
    return claim


async def test_a_crash_blocks_a_key_for_a_lease_and_not_for_its_record():
    """In the lease 409, after its 30 seconds the retry runs, long before the day of the record is over."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    await _abandoned(clock, store)
    app = Effects()
    protected = protect(app, store)
    clock.advance(29)
    assert (await call(protected, key="k", body=b"one")).header(b"retry-after") == b"1"
    clock.advance(2)
    assert (await call(protected, key="k", body=b"one")).status == 201
    assert app.operations[0].attempt == 2


async def test_after_a_crash_another_payload_is_still_another_request():
    """A claim that lapsed keeps what it was for: 422, and the original may run."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    await _abandoned(clock, store)
    app = Effects()
    protected = protect(app, store)
    clock.advance(31)
    assert (await call(protected, key="k", body=b"two")).code == "key-reused"
    assert (await call(protected, key="k", body=b"one")).status == 201


@pytest.mark.fronts("asgi")
async def test_a_cancelled_request_does_not_wait_for_its_lease():
    """The key is free before the cancellation is through, and the retry runs at once."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    first.cancel()
    await asyncio.wait([first])
    app.gate = None
    assert first.cancelled()
    assert (await call(protected, key="k")).body == b'{"run":2}'


async def test_an_expired_record_neither_replays_nor_blocks():
    """After its time a key is new, also while its record is still there."""
    clock = ManualClock()
    app = Effects()
    protected = protect(app, MemoryStore(clock=clock), policy=Policy(ttl=60))
    await call(protected, key="k")
    clock.advance(60)
    assert (await call(protected, key="k")).body == b'{"run":2}'
    assert (await call(protected, key="k")).body == b'{"run":2}'


# Whose key, and for what


async def test_two_callers_do_not_share_a_key():
    """The second is not given the first one's response."""
    app = Effects()
    protected = protect(app)
    bodies = [
        (await call(protected, key="k", headers=[(b"authorization", token)])).body
        for token in (b"Basic YQ==", b"Basic Yg==")
    ]
    assert bodies == [b'{"run":1}', b'{"run":2}']


async def test_identical_requests_without_a_key_are_not_merged():
    """Two purchases are two purchases."""
    app = Effects()
    protected = protect(app)
    replies = await asyncio.gather(*(call(protected, body=b"same") for _ in range(5)))
    assert app.runs == 5
    assert len({reply.body for reply in replies}) == 5


async def test_one_key_on_two_resources_of_a_route_does_not_collide():
    """The actual path counts and not its template: 422, and never another resource's answer."""
    app = Effects()
    protected = protect(app, policies={"POST /orders/{id}/refund": Policy(ttl=60)})
    await call(protected, path="/orders/1/refund", key="k")
    reply = await call(protected, path="/orders/2/refund", key="k")
    assert (reply.code, app.runs) == ("key-reused", 1)


async def test_the_query_is_part_of_the_request():
    """Another query under one key is another request."""
    protected = protect(Effects())
    await call(protected, key="k", query=b"amount=1")
    assert (await call(protected, key="k", query=b"amount=2")).code == "key-reused"
    assert (await call(protected, key="k", query=b"amount=1")).replayed


async def test_a_mismatch_is_told_while_the_first_runs():
    """422 before 409: the client does not wait for an answer it will not get."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, policy=Policy(wait=60))
    first = asyncio.create_task(call(protected, key="k", body=b"one"))
    await app.running.wait()
    assert (await call(protected, key="k", body=b"two")).code == "key-reused"
    app.gate.set()
    await first


async def test_other_headers_do_not_make_another_request():
    """A retry has a trace, an address and a date of its own."""
    protected = protect(Effects())
    await call(protected, key="k", headers=[(b"traceparent", b"00-1"), (b"x-forwarded-for", b"10.0.0.1")])
    retry = await call(protected, key="k", headers=[(b"traceparent", b"00-2"), (b"user-agent", b"curl")])
    assert retry.replayed


async def test_a_scope_reads_the_state_that_authentication_left():
    """The callable is given a real request, ``state`` included."""
    app = Effects()
    protected = protect(app, scope=lambda request: request.state.user)
    for user, expected in (("alice", 1), ("bob", 2), ("alice", 1)):
        reply = await call(protected, key="k", state={"user": user})
        assert json.loads(reply.body) == {"run": expected}


async def test_a_quoted_key_is_taken_and_a_colon_in_it_too():
    """The draft's own examples are keys."""
    protected = protect(Effects())
    await call(protected, key='"8e03978e-40d5-43e8-bc93-6894a57f9324"')
    await call(protected, key="order:42:v1")
    assert (await call(protected, key='"order:42:v1"')).replayed


# What is stored


@pytest.mark.parametrize("status", [401, 403, 408, 409, 425, 429, 500, 502, 503, 504])
async def test_a_transient_answer_is_not_final(status):
    """The retry runs, and may get another one."""
    app = Effects(status=status)
    protected = protect(app)
    await call(protected, key="k")
    app.status = 201
    assert (await call(protected, key="k")).status == 201
    assert app.runs == 2


@pytest.mark.parametrize("status", [200, 202, 204, 206, 301, 303, 400, 404, 410, 422])
async def test_every_other_answer_is_final(status):
    """What says that it happened, or was decided, is not run again."""
    app = Effects(status=status)
    protected = protect(app)
    await call(protected, key="k")
    assert (await call(protected, key="k")).status == status
    assert app.runs == 1


async def test_a_redirect_and_an_empty_answer_replay():
    """As Starlette makes them: 303 with its Location, 204 without a body."""
    for response in (RedirectResponse("/orders/1", 303), Response(status_code=204)):

        async def endpoint(request, response=response):
            return response

        app = starlette(endpoint)
        first, retry = await call(app, key="k"), await call(app, key="k")
        assert retry.headers == [*first.headers, (b"idempotent-replayed", b"true")]
        assert (retry.status, retry.body) == (first.status, b"")


async def test_an_error_raised_after_the_effect_is_its_result():
    """A 422 that the framework made of an exception is stored: the effect before it is not repeated."""
    effects = []

    async def endpoint(request):
        effects.append("charged")
        raise HTTPException(422, "card declined")

    app = starlette(endpoint)
    first, retry = await call(app, key="k"), await call(app, key="k")
    assert (first.status, retry.status, retry.replayed) == (422, 422, True)
    assert effects == ["charged"]


async def test_our_own_409_is_not_the_result():
    """Forty duplicates that conflict do not change what the first records."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    assert {(await call(protected, key="k")).status for _ in range(40)} == {409}
    app.gate.set()
    await first
    retry = await call(protected, key="k")
    assert (retry.status, retry.body) == (201, b'{"run":1}')


async def test_a_replay_has_the_first_status_and_not_one_of_its_own():
    """201 replays as 201: neither 200 nor a conflict."""
    protected = protect(Effects(status=201))
    await call(protected, key="k")
    assert (await call(protected, key="k")).status == 201


@pytest.mark.fronts("asgi")
async def test_repeated_and_unusual_headers_survive():
    """No list of names decides, pairs stay pairs, and the length is told."""
    sent = [
        (b"X-Order-Id", b"7"),
        (b"link", b"</a>; rel=next"),
        (b"link", b"</b>; rel=prev"),
        (b"content-length", b"2"),
        (b"x-latin", b"caf\xe9"),
        (b"etag", b'"1"'),
    ]

    async def handler(scope, receive, send):
        await respond(send, 200, b"ok", sent)

    protected = protect(Effects(handler))
    await call(protected, key="k")
    assert (await call(protected, key="k")).headers == [*sent, (b"idempotent-replayed", b"true")]


async def test_cookies_reach_the_first_client_and_nobody_else():
    """Both of them; and a response with a cookie is stored like any other."""

    async def endpoint(request):
        response = JSONResponse({}, 201)
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    app = starlette(endpoint)
    first, retry = await call(app, key="k"), await call(app, key="k")
    assert [value[:3] for name, value in first.headers if name == b"set-cookie"] == [b"a=1", b"b=2"]
    assert retry.replayed
    assert retry.header(b"set-cookie") is None


async def test_bodies_are_bytes():
    """Large integers, empty arrays and what is no text at all come back as they were."""
    for body in (b'{"id": 9007199254740993, "tags": [], "meta": {}}', bytes(range(256)), b'"\xed\xa0\x80"', b"1.0"):

        async def handler(scope, receive, send, body=body):
            await respond(send, 200, body, [(b"content-type", b"application/json; charset=utf-8")])

        protected = protect(Effects(handler))
        await call(protected, key="k")
        assert (await call(protected, key="k")).body == body


async def test_a_body_sent_in_pieces_is_stored_whole():
    """The pieces are one body, whatever they looked like; it is not the last one that is kept."""

    async def handler(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"12", b"", b"34"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    app = Effects(handler)
    protected = protect(app)
    first, retry = await call(protected, key="k"), await call(protected, key="k")
    assert (first.body, retry.body, app.runs) == (b"1234", b"1234", 1)


async def test_a_request_body_that_is_no_text_is_compared_and_handed_on():
    """Uploads are requests like others."""
    upload = bytes(range(256)) * 10
    app = Effects()
    protected = protect(app)
    await call(protected, key="k", body=upload, headers=[(b"content-type", b"application/octet-stream")])
    assert app.bodies == [upload]
    assert (await call(protected, key="k", body=upload[:-1])).status == 422


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_500_000])
async def test_a_large_body_is_protected(size):
    """However large, it is compared to its last byte and reaches the handler unchanged."""
    upload = bytes(size)
    chunks = tuple(upload[start : start + 300_000] for start in range(0, size, 300_000))
    other = (*chunks[:-1], chunks[-1][:-1] + b"\1")
    app = Effects()
    protected = protect(app)
    await call(protected, key="k", body=chunks)
    assert app.bodies == [upload]
    assert (await call(protected, key="k", body=chunks)).replayed
    assert (await call(protected, key="k", body=other)).code == "key-reused"
    assert app.runs == 1


@pytest.mark.fronts("asgi")
async def test_a_limit_is_for_keyed_requests_alone():
    """Past it they are refused, announced or not; an upload without a key is nobody's business."""
    app = Effects()
    protected = protect(app, policy=Policy(max_request=10))
    announced = [(b"content-length", b"11")]
    assert (await call(protected, key="k", body=b"x" * 11)).code == "request-too-large"
    assert (await call(protected, key="k", body=(b"x" * 5,) * 3)).code == "request-too-large"
    client, reply = Client(b"x" * 11), Reply()
    await protected(http_scope(key="k", headers=announced), client, reply.send)
    assert (reply.code, len(client.messages)) == ("request-too-large", 1)
    assert app.runs == 0
    assert (await call(protected, body=b"x" * 11, headers=announced)).status == 201
    assert (await call(protected, key="k", body=b"x" * 10)).status == 201


# Streams and what stands around the application


@pytest.mark.fronts("asgi")
async def test_no_disconnect_is_invented():
    """After the body the application is told what the server says: nothing, until the client is gone."""
    heard: list[str] = []

    async def handler(scope, receive, send):
        await read(receive)
        next_message = asyncio.create_task(receive())
        await settled()
        assert not next_message.done()
        client.gone.set()
        heard.append((await next_message)["type"])
        await respond(send)

    protected = protect(Effects(handler))
    for key in ("k", None):
        client = Client(b"body")
        await protected(http_scope(key=key), client, Reply().send)
    assert heard == ["http.disconnect", "http.disconnect"]


@pytest.mark.parametrize(("method", "key"), [("POST", "k"), ("POST", None), ("GET", "k"), ("GET", None)])
async def test_a_stream_is_complete(method, key):
    """Starlette listens for a disconnect while it streams; it hears none, and sends every byte."""

    async def endpoint(request):
        assert await request.is_disconnected() is False

        async def pieces():
            for _ in range(50):
                await asyncio.sleep(0)
                yield b"x" * 100

        return StreamingResponse(pieces())

    reply = await call(starlette(endpoint), method=method, key=key, body=b"{}")
    assert (len(reply.body), reply.complete) == (5000, True)


class Passing(BaseHTTPMiddleware):
    """What ``@app.middleware("http")`` makes of a function that calls the next one."""

    async def dispatch(self, request, call_next):
        return await call_next(request)


async def test_a_response_behind_a_middleware_that_streams_is_stored():
    """``@app.middleware("http")`` sends everything in pieces; it is stored and replayed all the same."""
    runs = []

    async def endpoint(request):
        runs.append(await request.json())
        return JSONResponse({"run": len(runs)}, 201)

    inner = Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    inner.add_middleware(Passing)
    app = protect(inner)
    first, retry = await call(app, key="k", body=b"{}"), await call(app, key="k", body=b"{}")
    assert (first.status, first.body) == (201, b'{"run":1}')
    assert (retry.body, retry.replayed, runs) == (first.body, True, [{}])


async def test_a_compressed_response_replays_as_it_was_compressed():
    """Compression inside is part of the result."""

    async def endpoint(request):
        return JSONResponse({"text": "x" * 5000}, 201)

    inner = Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    inner.add_middleware(GZipMiddleware)
    app = protect(inner)
    accept = [(b"accept-encoding", b"gzip")]
    first, retry = await call(app, key="k", headers=accept), await call(app, key="k", headers=accept)
    assert first.header(b"content-encoding") == b"gzip"
    assert len(first.body) < 1000
    assert (retry.body, retry.replayed) == (first.body, True)


async def test_a_file_is_sent_by_path_and_not_stored_as_empty(tmp_path):
    """The server gets the start and the path, and a duplicate is told that the result was not kept."""
    path = tmp_path / "receipt.txt"
    path.write_text("receipt")

    async def endpoint(request):
        return FileResponse(path)

    app = starlette(endpoint)
    extension = {"extensions": {"http.response.pathsend": {}}}
    first = await call(app, key="k", **extension)
    assert [message["type"] for message in first.messages] == ["http.response.start", "http.response.pathsend"]
    assert first.messages[1]["path"] == str(path)
    assert (await call(app, key="k", **extension)).code == "completed-not-replayable"


async def test_a_file_is_stored_where_it_is_sent_as_a_body(tmp_path):
    """Without that extension it is a body like others."""
    path = tmp_path / "receipt.txt"
    path.write_text("receipt")

    async def endpoint(request):
        return FileResponse(path)

    app = starlette(endpoint)
    await call(app, key="k")
    retry = await call(app, key="k")
    assert (retry.body, retry.replayed) == (b"receipt", True)


async def test_an_event_stream_is_not_held_back():
    """Its first byte is out before its second is made; a duplicate does not start it again."""
    reply, seen = Reply(), []

    async def events():
        yield "data: 1\n\n"
        await settled()
        seen.append(reply.body)
        yield "data: 2\n\n"

    runs = []

    async def endpoint(request):
        runs.append(1)
        return StreamingResponse(events(), media_type="text/event-stream")

    app = starlette(endpoint)
    await app(http_scope(key="k"), Client(), reply.send)
    assert seen == [b"data: 1\n\n"]
    assert reply.body == b"data: 1\n\ndata: 2\n\n"
    assert (await call(app, key="k")).code == "completed-not-replayable"
    assert runs == [1]


async def test_a_response_too_large_to_keep_is_complete_and_not_run_again():
    """It passes through to the last byte and is remembered as done."""

    async def handler(scope, receive, send):
        await respond(send, 200, b"x" * 101)

    app = Effects(handler)
    protected = protect(app, policy=Policy(max_response=100))
    assert len((await call(protected, key="k")).body) == 101
    assert (await call(protected, key="k")).code == "completed-not-replayable"
    assert app.runs == 1


async def test_background_tasks_neither_delay_nor_hide_the_record():
    """While the task still runs, the client has its answer and a retry its replay."""
    gate, started = asyncio.Event(), asyncio.Event()

    async def task():
        started.set()
        await gate.wait()

    async def endpoint(request):
        return JSONResponse({}, 201, background=BackgroundTask(task))

    app = starlette(endpoint)
    reply = Reply()
    request = asyncio.create_task(app(http_scope(key="k"), Client(), reply.send))
    await started.wait()
    assert reply.complete
    assert (await call(app, key="k")).replayed
    gate.set()
    await request


@pytest.mark.parametrize("ending", ["raise", "cancel"])
async def test_a_background_task_that_fails_undoes_nothing(ending):
    """The request is answered and recorded; what comes after it does not free its key."""
    started = asyncio.Event()

    async def task():
        started.set()
        if ending == "raise":
            raise ValueError("mail server")
        await asyncio.Event().wait()

    async def endpoint(request):
        return JSONResponse({}, 201, background=BackgroundTask(task))

    app = starlette(endpoint)
    request = asyncio.create_task(call(app, key="k"))
    await started.wait()
    if ending == "cancel":
        request.cancel()
    await asyncio.wait([request])
    assert request.cancelled() or isinstance(request.exception(), ValueError)
    assert (await call(app, key="k")).replayed


# Heartbeats


@pytest.mark.fronts("asgi")
@travelling
async def test_a_handler_longer_than_its_lease_keeps_it():
    """Ten leases long, and a duplicate is still told that it runs."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, travelling_store(), policy=Policy(lease=30))
    first = asyncio.create_task(call(protected, key="k"))
    for _ in range(10):
        await asyncio.sleep(30)
        assert (await call(protected, key="k")).code == "in-progress"
    app.gate.set()
    assert (await first).status == 201
    assert app.runs == 1


@pytest.mark.fronts("asgi")
@travelling
async def test_a_failed_renewal_neither_stops_nor_fails_the_handler():
    """A store that is away for two of three beats is an event for nobody."""
    store = FaultyStore(travelling_store())
    store.order("renew", *["fail"] * 10)
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, store, policy=Policy(lease=30))
    first = asyncio.create_task(call(protected, key="k"))
    await asyncio.sleep(60)
    app.gate.set()
    assert (await first).status == 201
    assert not app.operations[0].lost
    assert (await call(protected, key="k")).replayed


@pytest.mark.fronts("asgi")
@travelling
async def test_a_lost_lease_is_told_to_the_handler_and_nothing_is_cancelled():
    """It learns it while it runs, and decides itself."""

    async def handler(scope, receive, send):
        await scope["state"]["idempotency"].lost
        await respond(send, 503)

    store = FaultyStore(travelling_store())
    store.order("renew", "refuse")
    app = Effects(handler)
    assert (await call(protect(app, store), key="k")).status == 503


# Failing stores


async def test_a_claim_whose_answer_was_lost_does_not_lock_the_only_client_out():
    """It is told 503, and its retry runs: not 409 about itself."""
    store = FaultyStore().order("claim", "lost")
    app = Effects()
    protected = protect(app, store)
    assert (await call(protected, key="k")).code == "store-unavailable"
    await written()
    assert (await call(protected, key="k")).status == 201
    assert app.runs == 1


@pytest.mark.parametrize("fault", ["fail", "lost"])
async def test_a_store_that_fails_after_the_effect_does_not_change_the_answer(fault):
    """The client gets its 201, and the key is neither freed nor forgotten: the record follows."""
    store = FaultyStore().order("complete", fault)
    app = Effects()
    protected = protect(app, store)
    first = await call(protected, key="k")
    assert (first.status, first.body) == (201, b'{"run":1}')
    assert (await call(protected, key="k")).status in (201, 409)
    await _until(lambda: store.calls.count("complete") == 2)
    assert (await call(protected, key="k")).replayed
    assert app.runs == 1


async def _until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_store_that_is_down_means_503_and_nothing_runs():
    """Not an exception, and by default not an unprotected run."""
    store = FaultyStore()
    store.down = True
    app = Effects()
    reply = await call(protect(app, store), key="k")
    assert (reply.status, reply.code, app.runs) == (503, "store-unavailable", 0)
    assert reply.header(b"retry-after") == b"1"
    assert b"as ordered" not in reply.body
    store.down = False
    await drain()


# Many at once


async def test_retry_after_is_not_the_rest_of_the_lease():
    """Seven seconds before its end the client asks again within five, and the body says seven."""
    clock = ManualClock()
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, MemoryStore(clock=clock), policy=Policy(lease=30))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    clock.advance(23)
    reply = await call(protected, key="k")
    app.gate.set()
    await first
    problem = json.loads(reply.body)
    assert 1 <= problem["retry_after"] <= 5
    assert problem["lease_left"] == 7
    assert reply.header(b"retry-after") == b"%d" % problem["retry_after"]


@pytest.mark.fronts("asgi")
@travelling
async def test_waiting_duplicates_do_not_poll():
    """Forty duplicates of a 20 second request ask once each, and one of them twice more."""
    store = FaultyStore(travelling_store())
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, store, policy=Policy(wait=25))
    tasks = [asyncio.create_task(call(protected, key="k")) for _ in range(41)]
    await asyncio.sleep(20)
    app.gate.set()
    replies = await asyncio.gather(*tasks)
    assert sum(reply.replayed for reply in replies) == 40
    assert store.calls.count("claim") == 41 + 2


async def test_duplicates_do_not_count_as_attempts():
    """Only runs do."""
    app = Effects(status=503)
    app.gate = asyncio.Event()
    store = MemoryStore()
    protected = protect(app, store)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    for _ in range(10):
        await call(protected, key="k")
    entry = await store.inspect(record_id(ANONYMOUS, "k"))
    app.gate.set()
    await first
    assert entry.attempt == 1


async def test_requests_inside_requests_are_independent():
    """A handler that calls another keyed operation on the same store records both results under their own keys."""

    async def handler(scope, receive, send):
        if scope["path"] == "/outer":
            inner = await call(protected, path="/inner", key="inner")
            assert inner.body == b"/inner"
        await respond(send, 200, scope["path"].encode())

    app = Effects(handler)
    protected = protect(app)
    assert (await call(protected, path="/outer", key="outer")).body == b"/outer"
    assert (await call(protected, path="/inner", key="inner")).body == b"/inner"
    assert (await call(protected, path="/outer", key="outer")).body == b"/outer"
    assert app.runs == 2


async def test_two_middlewares_on_one_store_keep_their_own_options():
    """Neither overwrites what the other was given."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    short_app, long_app = Effects(), Effects()
    short = protect(short_app, store, policy=Policy(ttl=10), scope=lambda request: "short")
    long = protect(long_app, store, policy=Policy(ttl=100), scope=lambda request: "long")
    for app in (short, long):
        await call(app, key="k")
    clock.advance(50)
    for app in (short, long):
        await call(app, key="k")
    assert (short_app.runs, long_app.runs) == (2, 1)


@pytest.mark.parametrize("seconds", [45, 119, 0.5])
async def test_a_period_is_not_rounded(seconds):
    """45 seconds are not a minute."""
    clock = ManualClock()
    app = Effects()
    protected = protect(app, MemoryStore(clock=clock), policy=Policy(ttl=seconds))
    await call(protected, key="k")
    clock.advance(seconds - 0.01)
    assert (await call(protected, key="k")).replayed
    clock.advance(0.02)
    assert not (await call(protected, key="k")).replayed


async def test_memory_does_not_grow_for_ever():
    """Expired records are dropped by the requests that follow."""
    clock = ManualClock()
    store = MemoryStore(clock=clock, max_records=50)
    protected = protect(Effects(), store, policy=Policy(ttl=1))
    for number in range(500):
        assert (await call(protected, key=f"k{number}")).status == 201
        clock.advance(0.1)

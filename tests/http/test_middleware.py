"""The middleware as an application meets it: policies, outcomes, the running operation, failing stores, messages."""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import idempotency.asgi
from idempotency import IdempotencyMiddleware, Policy, current
from idempotency._http import body, capture
from idempotency._http.fingerprint import ANONYMOUS
from idempotency._rules import record_id
from idempotency.errors import ConfigurationError
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, read, respond
from tests.kit.observed_store import ObservedStore
from tests.kit.time_travel import now, others, settled, travelling, travelling_store

RECORD = record_id(ANONYMOUS, "k")


async def test_through_a_client_library():
    """With Starlette inside and httpx outside: one effect, a replay, a mismatch."""
    orders: list[Any] = []

    async def create(request):
        orders.append(await request.json())
        return JSONResponse({"id": len(orders)}, 201, headers={"Location": f"/orders/{len(orders)}"})

    app = Starlette(routes=[Route("/orders", create, methods=["POST"])])
    app.add_middleware(IdempotencyMiddleware, store="memory://")
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.example") as client:
        headers = {"Idempotency-Key": '"8e03978e"'}
        first = await client.post("/orders", json={"item": "book"}, headers=headers)
        retry = await client.post("/orders", json={"item": "book"}, headers=headers)
        other = await client.post("/orders", json={"item": "pen"}, headers=headers)
    assert (first.status_code, first.json(), first.headers["location"]) == (201, {"id": 1}, "/orders/1")
    assert (retry.status_code, retry.json(), retry.headers["idempotent-replayed"]) == (201, {"id": 1}, "true")
    assert other.status_code == 422
    assert orders == [{"item": "book"}]


# Policies


async def test_each_route_has_its_policy():
    """The most specific key decides; None takes a route out, and what no key matches has the default."""
    policies = {
        "POST /payments/{id}": Policy(required=True),
        "/webhooks/{rest:path}": None,
        "PUT /settings": Policy(),
    }
    app = Effects()
    protected = protect(app, policies=policies)
    assert (await call(protected, path="/payments/7")).code == "key-missing"
    assert (await call(protected, path="/payments/7/refund")).status == 201
    for path, method, replays in (
        ("/webhooks/a/b", "POST", False),
        ("/settings", "PUT", True),
        ("/settings", "GET", False),
        ("/payments/7", "POST", True),
        ("/anything", "PATCH", True),
    ):
        await call(protected, path=path, method=method, key=path)
        assert (await call(protected, path=path, method=method, key=path)).replayed is replays


async def test_routes_are_matched_below_root_path():
    """Behind a proxy that strips a prefix, or mounted, the application's own paths are meant."""
    app = Effects()
    protected = protect(app, policies={"/payments": Policy(required=True)})
    assert (await call(protected, path="/api/payments", root_path="/api")).code == "key-missing"
    assert (await call(protected, path="/payments", root_path="/api")).code == "key-missing"
    assert (await call(protected, path="/apiary/payments", root_path="/api")).status == 201


OUTCOMES = {
    404: "release",
    418: "hold",
    "5xx": "store",
    502: "hold",
    LookupError: "store",
    KeyError: "release",
    TimeoutError: "hold",
}


@pytest.mark.parametrize(
    ("status", "retry", "runs"),
    [
        (201, 201, 1),
        (404, 404, 2),
        (418, "outcome-unknown", 1),
        (503, 503, 1),
        (502, "outcome-unknown", 1),
        (429, 429, 2),
    ],
)
async def test_a_policy_rules_over_statuses(status, retry, runs):
    """An exact status wins over a class, a class over the defaults."""
    app = Effects(status=status)
    protected = protect(app, policy=Policy(outcomes=OUTCOMES))
    assert (await call(protected, key="k")).status == status
    again = await call(protected, key="k")
    assert (again.code if isinstance(retry, str) else again.status) == retry
    assert app.runs == runs


@pytest.mark.parametrize(
    ("error", "retry", "runs"),
    [
        (IndexError, 500, 1),
        (KeyError, None, 2),
        (TimeoutError, "outcome-unknown", 1),
        (ValueError, 500, 1),
    ],
)
async def test_a_policy_rules_over_exceptions(error, retry, runs):
    """The nearest class in its ancestry decides, else the rule for 500; a stored exception replays as a plain 500."""

    async def handler(scope, receive, send):
        raise error("hush")

    app = Effects(handler)
    protected = protect(app, policy=Policy(outcomes=OUTCOMES))
    with pytest.raises(error):
        await call(protected, key="k")
    if retry is None:
        with pytest.raises(error):
            await call(protected, key="k")
    else:
        again = await call(protected, key="k")
        assert (again.code if isinstance(retry, str) else again.status) == retry
        assert b"hush" not in again.body
    assert app.runs == runs


@pytest.mark.parametrize(("on_crash", "retry"), [("rerun", 201), ("hold", 409)])
async def test_a_cancelled_request_counts_as_a_crash(on_crash, retry):
    """It follows ``on_crash``: free to run again, or unknown until resolved."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, policy=Policy(on_crash=on_crash))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    first.cancel()
    await asyncio.wait([first])
    app.gate = None
    assert (await call(protected, key="k")).status == retry


@pytest.mark.parametrize(("on_crash", "kept"), [("rerun", "running"), ("hold", "held")])
async def test_on_crash_is_claimed_with_the_key(on_crash, kept):
    """The store knows from the start what is to become of a key whose owner vanishes."""
    app = Effects()
    app.gate = asyncio.Event()
    store = MemoryStore()
    first = asyncio.create_task(call(protect(app, store, policy=Policy(on_crash=on_crash)), key="k"))
    await app.running.wait()
    entry = await store.inspect(RECORD)
    assert entry.hold is (kept == "held")
    app.gate.set()
    assert (await first).status == 201
    assert (await store.inspect(RECORD)).hold is False


async def test_a_held_key_is_unknown_until_resolved():
    """``done`` with a result replays, ``release`` lets the next one run; between them nothing runs."""
    store = MemoryStore()
    app = Effects()
    protected = protect(app, store, policy=Policy(outcomes={201: "hold"}))
    for outcome, expected in (("done", "completed-not-replayable"), ("release", None)):
        await call(protected, key=outcome)
        assert (await call(protected, key=outcome)).code == "outcome-unknown"
        [entry] = await store.unresolved()
        assert await store.resolve(entry.id, outcome)
        after = await call(protected, key=outcome)
        assert after.status == (409 if expected else 201)
        assert expected is None or after.code == expected
    assert app.runs == 3


@pytest.mark.parametrize("ending", [500, 503, ValueError])
async def test_the_handler_may_hold(ending):
    """The effect has happened: what would have freed the key leaves it unknown."""

    async def handler(scope, receive, send):
        scope["state"]["idempotency"].hold()
        if isinstance(ending, int):
            await respond(send, ending)
        else:
            raise ending

    app = Effects(handler)
    protected = protect(app)
    with suppress(ValueError):
        await call(protected, key="k")
    assert (await call(protected, key="k")).code == "outcome-unknown"
    assert app.runs == 1


async def test_holding_does_not_hide_a_result():
    """What is stored is stored as before."""

    async def handler(scope, receive, send):
        scope["state"]["idempotency"].hold()
        await respond(send, 201, b"done")

    protected = protect(Effects(handler))
    await call(protected, key="k")
    assert (await call(protected, key="k")).body == b"done"


@pytest.mark.parametrize("status", [201, 422, 418])
async def test_the_handler_may_release(status):
    """The effect has not happened: the key is free, whatever the answer and the policy."""

    async def handler(scope, receive, send):
        scope["state"]["idempotency"].hold()
        scope["state"]["idempotency"].release()
        await respond(send, status)

    app = Effects(handler)
    protected = protect(app, policy=Policy(outcomes=OUTCOMES))
    await call(protected, key="k")
    assert not (await call(protected, key="k")).replayed
    assert app.runs == 2


# The running operation


async def test_a_derived_key_is_the_same_in_every_attempt():
    """It depends on the caller, the key and the name, and is a UUID."""
    derived: list[tuple[int, str, str]] = []

    async def handler(scope, receive, send):
        operation = scope["state"]["idempotency"]
        derived.append((operation.attempt, operation.derive("charge"), operation.derive("mail")))
        await respond(send, 503)

    protected = protect(Effects(handler))
    await call(protected, key="k")
    await call(protected, key="k")
    await call(protected, key="other")
    await call(protected, key="k", headers=[(b"authorization", b"Bearer bob")])
    first, retry, other, bob = derived
    assert first == retry
    assert len({first[1], first[2], other[1], other[2], bob[1], bob[2]}) == 6
    assert str(uuid.UUID(first[1])) == first[1]
    assert first[1] == "88b9d585-dedb-52a1-876b-5b5f8765f2a1"


async def test_the_attempt_counts_owners_that_vanished():
    """A take-over is the second attempt, and derives the same keys as the first."""
    clock = ManualClock()
    store = FaultyStore(MemoryStore(clock=clock))
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, store)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    clock.advance(31)
    second = asyncio.create_task(call(protected, key="k"))
    await settled()
    app.gate.set()
    await asyncio.gather(first, second)
    one, two = app.operations
    assert (one.attempt, two.attempt) == (1, 2)
    assert one.derive("x") == two.derive("x")
    assert one.lost


async def test_the_operation_is_current_in_tasks_and_threads_below_it():
    """And nowhere else."""
    seen: list[Any] = []

    async def note() -> None:
        seen.append(current())

    async def handler(scope, receive, send):
        seen.append(scope["state"]["idempotency"])
        await note()
        await asyncio.create_task(note())
        async with asyncio.TaskGroup() as group:
            group.create_task(note())
        seen.append(await asyncio.to_thread(current))
        seen.append(await anyio.to_thread.run_sync(current))
        await respond(send)

    assert current() is None
    protected = protect(Effects(handler))
    await call(protected, key="k")
    assert len(seen) == 6
    assert len(set(map(id, seen))) == 1
    assert (seen[0].key, seen[0].attempt, seen[0].scope) == ("k", 1, ANONYMOUS)
    assert current() is None
    assert await asyncio.to_thread(current) is None


async def test_concurrent_operations_are_each_their_own():
    """What is current in one request is not in another."""

    async def handler(scope, receive, send):
        await settled()
        assert current() is scope["state"]["idempotency"]
        await respond(send, 201, current().key.encode())

    protected = protect(Effects(handler))
    replies = await asyncio.gather(*(call(protected, key=f"k{number}") for number in range(20)))
    assert [reply.body for reply in replies] == [b"k%d" % number for number in range(20)]


async def test_after_a_failure_nothing_is_current():
    """An exception leaves no operation behind in the task that served it."""

    async def handler(scope, receive, send):
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        await call(protect(Effects(handler)), key="k")
    assert current() is None


async def test_without_a_key_the_operation_is_none():
    """A protected route can tell; and nothing is current."""

    async def handler(scope, receive, send):
        states.append((dict(scope["state"]), current()))
        await respond(send)

    states: list[Any] = []
    await call(protect(Effects(handler)))
    assert states == [({"idempotency": None}, None)]


async def test_a_sync_endpoint_reads_the_operation_in_its_thread():
    """Starlette runs it in a thread of its own, with the request's state."""
    threads: list[Any] = []

    def endpoint(request):
        threads.append((threading.get_ident(), request.state.idempotency is current(), current().key))
        return JSONResponse({}, 201)

    app = Starlette(routes=[Route("/orders", endpoint, methods=["POST"])])
    app.add_middleware(IdempotencyMiddleware, store=MemoryStore())
    await call(app, key="k")
    [(thread, same, key)] = threads
    assert thread != threading.get_ident()
    assert (same, key) == (True, "k")


# Stores that fail


@pytest.mark.parametrize("fault", ["fail", "lost"])
async def test_fail_closed_runs_nothing(fault):
    """503, retryable, and the retry runs once the store is back."""
    store = FaultyStore().order("claim", fault)
    app = Effects()
    protected = protect(app, store)
    first = await call(protected, key="k")
    assert (first.status, first.code, app.runs) == (503, "store-unavailable", 0)
    assert json.loads(first.body)["retryable"] is True
    await settled()
    assert (await call(protected, key="k")).status == 201
    assert (await call(protected, key="k")).replayed


@pytest.mark.parametrize("fault", ["fail", "lost"])
async def test_fail_open_runs_unprotected_and_says_so(fault):
    """The handler gets its body and no operation; an event tells."""
    store = FaultyStore().order("claim", fault)
    events: list[Event] = []
    app = Effects()
    protected = protect(app, store, policy=Policy(on_store_error="fail_open"), on_event=events.append)
    state: dict[str, Any] = {}
    reply = await call(protected, key="k", body=b"payload", state=state)
    assert (reply.status, app.bodies, state) == (201, [b"payload"], {"idempotency": None})
    assert [event.kind for event in events] == ["unprotected"]
    await settled()
    assert (await call(protected, key="k", body=b"payload")).body == b'{"run":2}'


@pytest.fixture
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process, as it does where no server and no coverage has a handler for it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("ended_by_sigterm")
@travelling
async def test_a_store_out_of_reach_after_the_effect():
    """The answer is delivered and the claim kept: 409 while the store is away, the replay when it is back."""
    store = FaultyStore(travelling_store())
    events: list[Event] = []
    app = Effects()
    protected = protect(app, store, on_event=events.append)
    store.order("complete", *["fail"] * 5)
    first = await call(protected, key="k")
    assert first.status == 201
    assert (await call(protected, key="k")).code == "in-progress"
    await asyncio.sleep(20)
    assert (await call(protected, key="k")).body == first.body
    assert [event.kind for event in events] == ["unrecorded", "in-progress", "stored", "replayed"]


@travelling
async def test_a_completion_whose_answer_was_lost():
    """It is recorded already; repeating it changes nothing."""
    store = FaultyStore(travelling_store()).order("complete", "lost")
    protected = protect(Effects(), store)
    first = await call(protected, key="k")
    assert (await call(protected, key="k")).body == first.body == b'{"run":1}'
    await asyncio.sleep(1)
    assert store.calls.count("complete") == 2
    assert (await call(protected, key="k")).body == first.body


@travelling
async def test_a_release_whose_answer_was_lost():
    """The key is free, and repeating the release frees no successor."""
    store = FaultyStore(travelling_store()).order("release", "lost")
    app = Effects(status=503)
    protected = protect(app, store)
    await call(protected, key="k")
    app.status = 201
    assert (await call(protected, key="k")).status == 201
    await asyncio.sleep(1)
    assert store.calls.count("release") == 2
    assert (await call(protected, key="k")).replayed


@travelling
async def test_an_owner_cancelled_while_its_result_is_written():
    """Neither the record nor the cancellation is lost."""
    never = asyncio.Event()
    store = FaultyStore(travelling_store()).order("complete", never.wait)
    app = Effects()
    protected = protect(app, store)
    first = asyncio.create_task(call(protected, key="k"))
    while store.calls.count("complete") == 0:
        await asyncio.sleep(0)
    await settled()
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert (await call(protected, key="k")).body == b'{"run":1}'


@travelling
async def test_a_timeout_of_the_application_while_its_result_is_written():
    """What it sends instead goes out whole, and the first result stays recorded."""
    never = asyncio.Event()
    store = FaultyStore(travelling_store()).order("complete", never.wait)

    async def handler(scope, receive, send):
        try:
            async with asyncio.timeout(5):
                await respond(send, 201, b"in time", [(b"content-length", b"7")])
        except TimeoutError:
            await respond(send, 504, b"too late", [(b"content-length", b"8")])

    events: list[Event] = []
    protected = protect(Effects(handler), store, on_event=events.append)
    first = await call(protected, key="k")
    assert (first.status, first.body) == (504, b"too late")
    assert (await call(protected, key="k")).body == b"in time"
    assert [event.kind for event in events] == ["stored", "replayed"]


# Options


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_scope_names_the_caller(is_async):
    """Sync or async; text, bytes and numbers; None is the anonymous caller."""
    names = {b"1": "alice", b"2": b"bob", b"3": 42, b"4": None}

    def name(request):
        return names[request.headers["x-user"].encode()]

    async def name_async(request):
        await asyncio.sleep(0)
        return name(request)

    app = Effects()
    protected = protect(app, scope=name_async if is_async else name)
    for _ in range(2):
        for number, user in enumerate(names, start=1):
            reply = await call(protected, key="k", headers=[(b"x-user", user)])
            assert reply.body == b'{"run":%d}' % number
    assert app.operations[3].scope == ANONYMOUS


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_scope_that_raises_stops_the_request(is_async):
    """Nothing is claimed and nothing runs: a caller nobody knows is not everybody."""

    def refuse(request):
        raise PermissionError("who are you?")

    async def refuse_async(request):
        raise PermissionError("who are you?")

    store, app = FaultyStore(), Effects()
    protected = protect(app, store, scope=refuse_async if is_async else refuse)
    with pytest.raises(PermissionError):
        await call(protected, key="k")
    assert (store.calls, app.runs) == ([], 0)
    assert (await call(protected)).status == 201


async def test_a_scope_of_another_type_is_a_mistake():
    """It is not turned into text, which would differ from one retry to the next."""
    app = Effects()
    with pytest.raises(ConfigurationError):
        await call(protect(app, scope=lambda request: object()), key="k")
    assert app.runs == 0


async def test_no_scope_is_one_space_for_all():
    """The opt-out: another caller's key is given the first one's answer."""
    app = Effects()
    protected = protect(app, scope=None)
    await call(protected, key="k", headers=[(b"authorization", b"Bearer alice")])
    assert (await call(protected, key="k", headers=[(b"authorization", b"Bearer bob")])).replayed


async def test_a_secret_keys_what_is_stored():
    """Scope and fingerprint differ from those without it; text and bytes are one secret."""
    digests = []
    for secret in (None, "s3cret", b"s3cret", b"other"):
        store = ObservedStore()
        await call(protect(Effects(), store, secret=secret), key="k", headers=[(b"authorization", b"Bearer alice")])
        [claim] = store.claims
        digests.append((claim.scope, claim.fingerprint))
    none, text, same, other = digests
    assert text == same
    assert len({each[0] for each in (none, text, other)}) == 3
    assert len({each[1] for each in (none, text, other)}) == 3


@pytest.mark.parametrize("options", [{"scope": "cookie"}, {"docs": "no url"}, {"docs": "https://x#y"}])
async def test_what_cannot_work_is_refused_at_construction(options):
    """A mistake shows when the application starts, not when a request comes."""
    with pytest.raises(ConfigurationError):
        protect(Effects(), **options)


# Other connections and requests


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


async def test_a_store_opened_from_a_url_is_closed_at_shutdown(monkeypatch):
    """Once, before the shutdown is complete; one that was passed in is not."""
    store = ObservedStore()
    monkeypatch.setattr(idempotency.asgi, "open_store", lambda url: store)
    order: list[Any] = []

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def send(message):
        order.append((message["type"], store.closed))

    await IdempotencyMiddleware(app, store="memory://")({"type": "lifespan"}, Client(), send)
    assert order == [("lifespan.startup.complete", 0), ("lifespan.shutdown.complete", 1)]
    await protect(app, store)({"type": "lifespan"}, Client(), send)
    assert store.closed == 1


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


async def test_two_middlewares_of_one_application_are_one():
    """Added to the application and to one mounted in it: the outer protects, the inner passes through."""
    inner_app = Effects()
    inner_store, outer_store = FaultyStore(), FaultyStore()
    mounted = Starlette(routes=[Mount("/shop", app=protect(inner_app, inner_store))])
    app = protect(mounted, outer_store)
    await call(app, path="/shop/orders", key="k")
    assert (await call(app, path="/shop/orders", key="k")).replayed
    assert (inner_app.runs, inner_store.calls) == (1, [])
    assert outer_store.calls.count("claim") == 2


async def test_two_workers_share_one_store():
    """What one ran, the other replays; what one runs, the other does not."""
    store = MemoryStore()
    one, two = Effects(), Effects()
    one.gate = asyncio.Event()
    workers = protect(one, store), protect(two, store)
    first = asyncio.create_task(call(workers[0], key="k"))
    await one.running.wait()
    assert (await call(workers[1], key="k")).code == "in-progress"
    one.gate.set()
    await first
    assert (await call(workers[1], key="k")).body == b'{"run":1}'
    assert two.runs == 0


# Messages of the application


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

    async with asyncio.timeout(5):
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


# Waiting


@travelling
async def test_a_client_may_ask_to_wait_less():
    """Prefer: wait caps the policy's wait and never extends it; what is malformed is ignored."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, travelling_store(), policy=Policy(wait=10))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    for prefer, seconds in (
        (b"wait=3", 3),
        (b"wait=0", 0),
        (b"wait=99", 10),
        (b"wait=soon", 10),
        (b"respond-async", 10),
    ):
        began = now()
        assert (await call(protected, key="k", headers=[(b"prefer", prefer)])).code == "in-progress"
        assert now() - began == pytest.approx(seconds)
    app.gate.set()
    await first


@travelling
async def test_without_a_wait_in_the_policy_nobody_waits():
    """Prefer asks, the policy decides."""
    app = Effects()
    app.gate = asyncio.Event()
    store = ObservedStore(travelling_store())
    protected = protect(app, store)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    began = now()
    assert (await call(protected, key="k", headers=[(b"prefer", b"wait=5")])).code == "in-progress"
    assert (now(), store.watches) == (began, 0)
    app.gate.set()
    await first


@travelling
async def test_fifty_duplicates_have_one_watcher():
    """They get the answer when it is there, from one question."""
    store = ObservedStore(travelling_store())
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, store, policy=Policy(wait=20))
    tasks = [asyncio.create_task(call(protected, key="k")) for _ in range(51)]
    await asyncio.sleep(7)
    assert (store.calls.count("claim"), store.watches, app.runs) == (52, 1, 1)
    app.gate.set()
    replies = await asyncio.gather(*tasks)
    assert {reply.status for reply in replies} == {201}
    assert (store.calls.count("claim"), store.watches, app.runs) == (53, 1, 1)


@travelling
async def test_a_released_key_lets_one_waiter_run():
    """The first fails; of ten waiting duplicates one runs, and nine get its answer."""

    async def handler(scope, receive, send):
        await respond(send, 503 if app.runs == 1 else 201, b"%d" % app.runs)

    app = Effects(handler)
    app.gate = asyncio.Event()
    protected = protect(app, FaultyStore(travelling_store()), policy=Policy(wait=20))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    waiting = [asyncio.create_task(call(protected, key="k")) for _ in range(10)]
    await asyncio.sleep(1)
    app.gate.set()
    replies = await asyncio.gather(*waiting)
    assert (await first).status == 503
    assert app.runs == 2
    assert {(reply.status, reply.body) for reply in replies} == {(201, b"2")}
    assert sum(reply.replayed for reply in replies) == 9


@travelling
async def test_a_waiter_that_is_cancelled_is_replaced():
    """The others still get the answer, and nothing of it is left behind."""
    app = Effects()
    app.gate = asyncio.Event()
    store = ObservedStore(travelling_store())
    protected = protect(app, store, policy=Policy(wait=20))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    leader, *rest = [asyncio.create_task(call(protected, key="k")) for _ in range(5)]
    await asyncio.sleep(1)
    leader.cancel()
    await asyncio.sleep(1)
    assert leader.cancelled()
    app.gate.set()
    assert all(reply.replayed for reply in await asyncio.gather(*rest))
    await first
    assert store.watches == 2


@travelling
async def test_a_store_that_fails_while_waiting_is_told_to_all_at_once():
    """Every duplicate gets its 503 from the one question that failed."""
    app = Effects()
    app.gate = asyncio.Event()
    store = FaultyStore(travelling_store())
    protected = protect(app, store, policy=Policy(wait=60, lease=10))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    waiting = [asyncio.create_task(call(protected, key="k")) for _ in range(20)]
    await asyncio.sleep(1)
    asked = store.calls.count("claim")
    store.order("claim", "fail")
    began = now()
    replies = await asyncio.gather(*waiting)
    assert {reply.code for reply in replies} == {"store-unavailable"}
    assert store.calls.count("claim") == asked + 1
    assert now() - began <= 10
    app.gate.set()
    assert (await first).status == 201
    await asyncio.sleep(5)


@travelling
async def test_nothing_is_left_of_a_request():
    """No task and no timer outlives it, however it ended."""
    protected = protect(Effects(), travelling_store(), policy=Policy(wait=5))
    for request in ({"key": "k"}, {"key": "k"}, {"key": "k", "body": b"x"}, {"key": '"'}, {}):
        await call(protected, **request)
        assert not others()


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_that_repeats_the_request_keeps_nothing(status):
    """The client sends the same request, with its key, elsewhere: there it is the first one."""

    async def app(scope, receive, send):
        await read(receive)
        await respond(send, status if scope["path"] == "/orders" else 201)

    protected = protect(app)
    assert (await call(protected, key="k")).status == status
    assert (await call(protected, key="k", path="/orders/")).status == 201


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


async def test_an_application_without_an_answer_counts_as_a_crash():
    """Some return silently when their client is gone, after the effect: a key that is held stays held."""

    async def silent(scope, receive, send):
        await read(receive)

    app = Effects(silent)
    protected = protect(app, policy=Policy(on_crash="hold"))
    await call(protected, key="k")
    assert (await call(protected, key="k")).code == "outcome-unknown"
    assert app.runs == 1


async def test_a_waiter_that_knows_of_an_owner_never_runs_unprotected():
    """fail_open is for a store that is not there, not for a duplicate of what is running."""
    app = Effects()
    app.gate = asyncio.Event()
    store = ObservedStore()
    protected = protect(app, store, policy=Policy(wait=30, on_store_error="fail_open"))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    waiting = [asyncio.create_task(call(protected, key="k")) for _ in range(5)]
    await asyncio.sleep(0.05)
    store.order("claim", "fail")
    store.inner._announce(store.claims[0].id)
    assert {reply.code for reply in await asyncio.gather(*waiting)} == {"store-unavailable"}
    app.gate.set()
    assert (await first).status == 201
    assert app.runs == 1


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

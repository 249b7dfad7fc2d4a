"""Received webhooks: verified first, then once in effect."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency import Policy, drain
from idempotency.errors import ConfigurationError, WebhookUnverifiedError
from idempotency.events import Event
from idempotency.stores.base import Store
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import ManualClock
from idempotency.webhooks import WEBHOOKS, Webhook, WebhookReceiver, sign, verify
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, respond

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
BODY = b'{"type": "order.placed"}'
DAY = 86400


def receive(app: Any, store: Store | None = None, **options: Any) -> WebhookReceiver:
    """Put a receiver around ``app``, by default on a store of its own."""
    return WebhookReceiver(app, **{"secrets": [SECRET], "store": store or MemoryStore(), **options})


async def send(
    app: Any, webhook_id: str = "msg_1", *, body: bytes = BODY, secret: str = SECRET, ago: float = 0, **request: Any
) -> Reply:
    """Send a webhook to ``app``, as an attempt made ``ago`` seconds ago."""
    headers = sign(webhook_id, body, [secret], timestamp=time.time() - ago)
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return await call(app, **{"path": "/hooks", "headers": pairs, "body": body, **request})


async def test_webhook_takes_effect_once() -> None:
    """An attempt that is repeated is answered like the first, whatever its time and signature; another id runs."""
    app = Effects()
    receiver = receive(app)

    first, again, other = await send(receiver, ago=200), await send(receiver), await send(receiver, "msg_2")

    assert [first.status, again.status, other.status] == [201, 201, 201]
    assert [first.body, again.body, other.body] == [b'{"run":1}', b'{"run":1}', b'{"run":2}']
    assert [first.replayed, again.replayed] == [False, True]
    assert app.bodies == [BODY, BODY]


async def test_application_finds_the_webhook_and_the_operation() -> None:
    """The id and the time of the attempt are in the state of the request, and the id is the key."""
    states: list[dict[str, Any]] = []

    async def application(scope: Any, _: Any, send: Any) -> None:
        states.append(dict(scope["state"]))
        await respond(send)

    shared: dict[str, Any] = {"of": "the server"}
    before = time.time()
    await send(receive(application), state=shared)

    [state] = states
    assert state["of"] == "the server"
    assert state["webhook"] == Webhook("msg_1", state["webhook"].timestamp)
    assert before - 1 <= state["webhook"].timestamp <= time.time()
    assert state["idempotency"].key == "msg_1"
    assert shared == {"of": "the server"}


async def test_id_is_known_for_seven_days() -> None:
    """That is longer than a sender tries; a receiver that forgets earlier runs twice."""
    app, clock = Effects(), ManualClock()
    receiver = receive(app, MemoryStore(clock=clock))

    await send(receiver)
    clock.advance(7 * DAY - 1)
    await send(receiver)
    assert app.runs == 1

    clock.advance(2)
    await send(receiver)
    assert app.runs == 2


@pytest.mark.parametrize("status", [200, 202, 204])
async def test_success_is_recorded(status: int) -> None:
    """After a 2xx the sender's next attempt is a duplicate."""
    app = Effects(status=status)
    receiver = receive(app)

    assert [(await send(receiver)).status for _ in range(2)] == [status, status]
    assert app.runs == 1


@pytest.mark.parametrize("status", [302, 400, 404, 409, 410, 422, 500, 503])
async def test_failure_lets_the_next_attempt_run(status: int) -> None:
    """A sender takes all but 2xx for a failure, and tries again: the handler must have another chance."""
    app = Effects(status=status)
    receiver = receive(app)

    assert [(await send(receiver)).status for _ in range(2)] == [status, status]
    app.status = 200
    assert [(await send(receiver)).status for _ in range(2)] == [200, 200]
    assert app.runs == 3


async def test_effect_of_a_failure_is_rolled_back(sqlite_url: str) -> None:
    """With a session, what a handler did before it answered 4xx is undone, and the next attempt does it once."""
    engine = create_async_engine(sqlite_url)
    store = SQLStore(engine)
    await store.create_schema()
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (item TEXT)"))

    async def order(scope: Any, receive: Any, send: Any) -> None:
        session = scope["state"]["idempotency"].session
        await session.execute(text("INSERT INTO orders VALUES ('cup')"))
        await respond(send, app.status)

    app = Effects(order, status=422)
    receiver = receive(app, store, session=async_sessionmaker(engine))

    for status in (422, 200, 200):
        app.status = status
        assert (await send(receiver)).status == status
    await drain()
    async with engine.connect() as connection:
        assert list(await connection.execute(text("SELECT item FROM orders"))) == [("cup",)]
    await engine.dispose()
    assert app.runs == 2


async def test_attempt_during_the_first_is_answered_409() -> None:
    """The sender is told when to try again."""
    app = Effects()
    app.gate = asyncio.Event()
    receiver = receive(app)

    first = asyncio.create_task(send(receiver))
    await app.running.wait()
    second = await send(receiver)
    app.gate.set()

    assert (second.code, second.status, second.header(b"retry-after")) == ("in-progress", 409, b"1")
    assert (await first).status == 201
    assert app.runs == 1


async def test_senders_do_not_meet() -> None:
    """One id of two senders is two webhooks, on one store and one path, and so is one id on two paths."""
    app, store = Effects(), MemoryStore()
    shop = receive(app, store, sender="shop")
    bank = receive(app, store, sender="bank", secrets=[OTHER])

    replies = [await send(shop), await send(bank, secret=OTHER), await send(shop, path="/other")]

    assert [reply.body for reply in replies] == [b'{"run":1}', b'{"run":2}', b'{"run":3}']
    assert (await send(bank, secret=OTHER)).replayed


async def test_scope_of_a_webhook_is_its_sender_and_its_path() -> None:
    """As it is stored: another text would forget every id that was received."""
    scopes: list[str] = []

    async def application(scope: Any, _: Any, send: Any) -> None:
        scopes.append(scope["state"]["idempotency"].scope)
        await respond(send)

    await send(receive(application, sender="shop"))

    sender = "http:1:" + hashlib.sha256(b"sender:1:4:shop").hexdigest()
    path = hashlib.sha256(f"path:1:71:{sender}6:/hooks".encode()).hexdigest()
    assert scopes == [f"http:1:{path}"]


async def test_id_of_another_webhook_is_a_mismatch() -> None:
    """A sender that uses an id for two bodies is told so."""
    app = Effects()
    receiver = receive(app)
    await send(receiver)

    assert (await send(receiver, body=b"{}")).code == "key-reused"
    assert app.runs == 1


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"secret": OTHER}, 401, "webhook-unverified"),
        ({"ago": 301}, 401, "webhook-unverified"),
        ({"ago": -301}, 401, "webhook-unverified"),
        ({"headers": []}, 400, "webhook-malformed"),
        ({"headers": [(b"webhook-id", b"msg_1"), (b"webhook-id", b"msg_2")]}, 400, "webhook-malformed"),
        ({"body": b"x" * ((1 << 20) + 1)}, 413, "request-too-large"),
        ({"method": "PUT", "headers": []}, 400, "webhook-malformed"),
        ({"method": "GET", "secret": OTHER}, 401, "webhook-unverified"),
    ],
)
async def test_what_is_not_verified_does_not_run(request_: dict[str, Any], status: int, code: str) -> None:
    """It is answered with a problem document and reported; an id is not used up by it."""
    app = Effects()
    events: list[Event] = []
    receiver = receive(app, on_event=events.append)

    reply = await send(receiver, **request_)

    assert (reply.status, reply.code) == (status, code)
    assert json.loads(reply.body)["type"].startswith("https://github.com/standard-webhooks/")
    assert reply.header(b"www-authenticate") == (b"StandardWebhooks" if status == 401 else None)
    assert app.runs == 0
    assert [(event.kind, event.record) for event in events] == [("refused", "")]
    await send(receiver)
    assert app.runs == 1


async def test_webhook_that_somebody_repeats_later_is_refused() -> None:
    """A recorded request of the sender is worth nothing after the tolerance, though its id is still known."""
    receiver = receive(Effects(), tolerance=10)

    assert (await send(receiver)).status == 201
    assert (await send(receiver, ago=11)).status == 401


async def test_body_in_pieces_is_verified_whole_and_given_to_the_application() -> None:
    """What the application reads is what was verified."""
    app = Effects()
    headers = [(name.encode(), value.encode()) for name, value in sign("msg_1", BODY, [SECRET]).items()]

    reply = await call(receive(app), headers=headers, body=(BODY[:5], b"", BODY[5:]))

    assert reply.status == 201
    assert app.bodies == [BODY]


async def test_client_that_leaves_has_no_effect() -> None:
    """A body that is not complete is not verified, and nothing answers."""
    app, reply = Effects(), Reply()
    headers = [(name.encode(), value.encode()) for name, value in sign("msg_1", b"", [SECRET]).items()]
    client = Client(gone=True)
    client.messages.clear()

    await receive(app)(http_scope(headers=headers), client, reply.send)

    assert (app.runs, reply.messages) == (0, [])


@pytest.mark.parametrize(
    ("path", "request_path", "verified"),
    [
        ("/hooks", "/hooks", True),
        ("/hooks", "/hooks/", True),
        ("/hooks", "//hooks", True),
        ("/hooks/", "/hooks", True),
        ("/hooks", "/hooks/x", False),
        ("/hooks", "/", False),
        ("/hooks/{account}", "/hooks/7/", True),
        ("/hooks/{rest:path}", "/hooks/7/8", True),
        ("/", "/", True),
    ],
)
async def test_only_the_path_is_verified(path: str, request_path: str, verified: bool) -> None:
    """A path with other slashes, which some frameworks take for the same, does not pass unverified."""
    app = Effects()
    receiver = receive(app, path=path)

    unsigned = [await call(receiver, path=request_path) for _ in range(2)]
    signed = [await send(receiver, path=request_path) for _ in range(2)]

    assert [reply.status for reply in unsigned] == [400 if verified else 201] * 2
    assert [reply.replayed for reply in signed] == [False, verified]


async def test_path_is_that_of_the_application_it_is_mounted_in() -> None:
    """A root path of the server does not count."""
    receiver = receive(Effects(), path="/hooks")

    assert (await call(receiver, path="/api/hooks", root_path="/api")).status == 400


async def test_policy_can_be_changed() -> None:
    """As where a 422 says that the webhook is of no use, and no attempt will change that."""
    app = Effects(status=422)
    receiver = receive(app, policy=replace(WEBHOOKS, outcomes={"4xx": "store"}, max_request=len(BODY)))

    assert [(await send(receiver)).status for _ in range(2)] == [422, 422]
    assert app.runs == 1
    assert (await send(receiver, body=BODY + b" ")).status == 413


@pytest.mark.parametrize(
    "options",
    [
        {"secrets": []},
        {"sender": None},
        {"path": "hooks"},
        {"path": "/a b"},
        {"tolerance": 0},
        {"docs": "nowhere"},
        {"policy": None},
        {"policy": Policy()},
    ],
)
async def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    """When it is made, before any request."""
    with pytest.raises(ConfigurationError):
        receive(Effects(), **options)


async def test_other_connections_pass() -> None:
    """The lifespan reaches the application, and a store that was opened by its URL is closed; websockets pass."""
    seen: list[str] = []

    async def application(scope: Any, receive_: Any, send_: Any) -> None:
        seen.append(scope["type"])

    receiver = receive(application, store="memory://")  # type: ignore[arg-type]
    for kind in ("lifespan", "websocket"):
        await receiver({"type": kind, "path": "/hooks"}, Client(), Reply().send)

    assert seen == ["lifespan", "websocket"]


async def test_each_sender_has_its_middleware_in_fastapi() -> None:
    """The rest of the application does not notice them."""
    api = FastAPI()
    runs: list[str] = []

    @api.post("/{path:path}")
    async def handle(path: str, request: Request) -> str | None:
        runs.append(path)
        webhook = getattr(request.state, "webhook", None)
        return webhook and webhook.id

    store = MemoryStore()
    api.add_middleware(WebhookReceiver, path="/hooks/shop", secrets=[SECRET], store=store)
    api.add_middleware(WebhookReceiver, path="/hooks/bank", secrets=[OTHER], store=store)

    for _ in range(2):
        shop, bank = await send(api, path="/hooks/shop"), await send(api, path="/hooks/bank", secret=OTHER)
        wrong, other = await send(api, path="/hooks/shop", secret=OTHER), await call(api, path="/orders")
        assert [reply.status for reply in (shop, bank, wrong, other)] == [200, 200, 401, 200]
        assert [reply.body for reply in (shop, bank, other)] == [b'"msg_1"', b'"msg_1"', b"null"]

    assert runs == ["hooks/shop", "hooks/bank", "orders", "orders"]


async def test_function_form_in_a_handler_of_fastapi() -> None:
    """``verify`` needs nothing but the headers and the bytes; its error says with which status to answer."""
    api = FastAPI()

    @api.exception_handler(WebhookUnverifiedError)
    async def unverified(request: Request, error: WebhookUnverifiedError) -> JSONResponse:
        return JSONResponse({"error": error.code}, error.status)

    @api.post("/hooks")
    async def hooks(request: Request) -> dict[str, str]:
        return {"id": verify(request.headers, await request.body(), [SECRET]).id}

    good, bad, none = await send(api), await send(api, secret=OTHER), await call(api, path="/hooks")

    assert (good.status, json.loads(good.body)) == (200, {"id": "msg_1"})
    assert (bad.status, none.status) == (401, 400)

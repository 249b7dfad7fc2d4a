"""Our clients with our own middleware, and with a server that behaves like Stripe, over connections that are cut."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy
from idempotency.client import Retry
from idempotency.stores.memory import MemoryStore
from tests.clients.senders import KINDS, Sender
from tests.kit.paths import EXAMPLES
from tests.kit.served import served
from tests.kit.servers import Proxy

EACH = pytest.mark.parametrize("kind", KINDS)
SOON = Retry(attempts=30, first=0.1, most=0.2)


@dataclass
class Effects:
    """What has happened at a server: an effect, and the key of each request."""

    count: int = 0
    keys: list[str] = field(default_factory=list)

    async def order(self, request: Request) -> Response:
        """Place an order."""
        await request.body()
        self.count += 1
        await asyncio.sleep(float(request.query_params.get("seconds", 0)))
        return JSONResponse({"order": self.count}, int(request.query_params.get("status", 201)))

    @contextmanager
    def behind(self, **options: Any) -> Iterator[Proxy]:
        """Serve the orders, protected, and give a proxy to them."""
        orders = Starlette(routes=[Route("/orders", self.order, methods=["POST"])])
        protected = IdempotencyMiddleware(orders, store=MemoryStore(), **options)

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            self.keys.append(dict(scope["headers"]).get(b"idempotency-key", b"").decode())
            await protected(scope, receive, send)

        with served(noting) as url, Proxy(int(url.rpartition(":")[2])) as proxy:
            yield proxy


def orders(proxy: Proxy, query: str = "") -> str:
    return f"http://127.0.0.1:{proxy.port}/orders{query}"


@EACH
def test_a_call_whose_answers_are_lost_takes_effect_once(kind: str) -> None:
    """The answer is that of the one effect, and a replay."""
    effects = Effects()
    with effects.behind() as proxy:
        proxy.lose_replies(3)
        got = Sender(kind).post(orders(proxy))

    assert (got.status, json.loads(got.content)) == (201, {"order": 1})
    assert (effects.count, got.attempts, len(set(effects.keys))) == (1, 4, 1)


@EACH
def test_a_call_that_is_cut_while_it_runs_waits_for_its_result(kind: str) -> None:
    """A time-out ends the first attempt, 409 in-progress the second; the third gets the result."""
    effects = Effects()
    with effects.behind() as proxy:
        got = Sender(kind, retry=SOON, timeout=1).post(orders(proxy, "?seconds=1.5"))

    assert (got.status, json.loads(got.content)) == (201, {"order": 1})
    assert (effects.count, len(set(effects.keys))) == (1, 1)
    assert got.attempts >= 2


@EACH
def test_a_replayed_failure_is_not_tried_again(kind: str) -> None:
    """It is recorded, so each attempt would get it."""
    effects = Effects()
    with effects.behind(policy=Policy(outcomes={"5xx": "store"})) as proxy:
        proxy.lose_replies()
        got = Sender(kind).post(orders(proxy, "?status=503"))

    assert (got.status, got.attempts, effects.count) == (503, 2, 1)


@EACH
def test_a_server_that_is_strict_takes_a_quoted_key(kind: str) -> None:
    """And refuses a bare one."""
    effects = Effects()
    with effects.behind(strict=True) as proxy:
        quoted = Sender(kind, quoted=True).post(orders(proxy))
        bare = Sender(kind).post(orders(proxy))

    assert (quoted.status, bare.status, effects.count) == (201, 400, 1)


@EACH
def test_a_reused_key_is_an_answer(kind: str) -> None:
    """The second request is not repeated."""
    effects = Effects()
    key = {"Idempotency-Key": "invoice-7"}
    with effects.behind() as proxy:
        Sender(kind).post(orders(proxy), headers=key)
        got = Sender(kind).post(orders(proxy), headers=key, body=b"coffee")

    assert (got.status, got.attempts, effects.count) == (422, 1, 1)


class LikeStripe:
    """A server with the documented answers of Stripe: 409 in use, 400 for another request, a header for a replay."""

    def __init__(self) -> None:
        self.effects = 0
        self.replays = 0
        self.statuses: list[int] = []
        self._bodies: dict[str, bytes] = {}
        self._results: dict[str, bytes] = {}
        self._running: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        key = dict(scope["headers"])[b"idempotency-key"].decode()
        status, headers, answer = await self._answer(key, body)
        self.statuses.append(status)
        pairs = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer)), *headers]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer})

    async def _answer(self, key: str, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        if self._bodies.setdefault(key, body) != body:
            return 400, [], json.dumps({"error": {"type": "idempotency_error"}}).encode()
        if key in self._results:
            self.replays += 1
            return 200, [(b"idempotent-replayed", b"true")], self._results[key]
        if key in self._running:
            error = {"type": "idempotency_error", "code": "idempotency_key_in_use"}
            return 409, [], json.dumps({"error": error}).encode()
        self._running.add(key)
        await asyncio.sleep(1.5)
        self.effects += 1
        self._results[key] = b'{"id": "ch_%d"}' % self.effects
        return 200, [], self._results[key]


@EACH
def test_a_call_to_a_server_like_stripe_is_done_once(kind: str) -> None:
    """A time-out ends the first attempt, others are answered that the key is in use, and the last gets the replay."""
    server = LikeStripe()
    with served(server) as url:
        got = Sender(kind, retry=SOON, timeout=1).post(url)

    assert (got.status, got.content) == (200, b'{"id": "ch_1"}')
    assert (server.effects, server.replays) == (1, 1)
    assert 409 in server.statuses


@EACH
def test_another_request_to_a_server_like_stripe_is_an_answer(kind: str) -> None:
    """Its 400 is not tried again."""
    server = LikeStripe()
    key = {"Idempotency-Key": "invoice-7"}
    with served(server) as url:
        Sender(kind).post(url, headers=key)
        got = Sender(kind).post(url, headers=key, body=b"coffee")

    assert (got.status, got.attempts) == (400, 1)
    assert server.effects == 1


async def test_the_example_places_each_order_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the answers are lost."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    await importlib.import_module("client_retries").main()

    assert capsys.readouterr().out == "10 calls, 20 requests, 10 orders\n"

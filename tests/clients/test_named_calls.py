"""Named calls: the same name has the same key, in every client, process and attempt."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from idempotency import ConfigurationError, IdempotencyMiddleware, StoreError, client, current, idempotent
from idempotency._rules import Claim, Completed, Mismatch, Replay, State
from idempotency.client import _stored
from idempotency.client._call import SCOPE
from idempotency.errors import KeyReusedError, UnreadableError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.clients.senders import ASYNC_HTTPX, AT_ONCE, HTTPX, KINDS, REQUESTS, Scripted, Sender, scripted
from tests.kit.paths import ROOT
from tests.kit.served import served
from tests.kit.targets import Target

EACH = pytest.mark.parametrize("kind", KINDS)
LASTING = pytest.mark.stores("sqlite", "redis")
PATIENCE = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    """A server that answers as a test asks."""
    with scripted() as app:
        yield app


@EACH
def test_a_name_has_one_key(kind: str, server: Scripted) -> None:
    """Another name has another key, and two clients of one store share both."""
    server.script()
    store = MemoryStore()

    Sender(kind, store=store).post(server.url, name="invoice-7")
    Sender(kind, store=store).post(server.url, name="invoice-8")
    Sender(kind, store=store).post(server.url, name="invoice-7")

    first, other, again = server.keys
    assert first == again != other


@pytest.mark.parametrize("kind", [HTTPX, ASYNC_HTTPX])
def test_a_request_that_has_a_name_has_a_key_with_any_method(kind: str, server: Scripted) -> None:
    """It would else be sent without one, as often as it is called, and nothing would say so."""
    server.script(503)

    for _ in range(2):
        Sender(kind, store=MemoryStore()).post(server.url, method="PUT", name="invoice-7")

    assert None not in server.keys
    assert server.keys[0] == server.keys[1]


def test_all_clients_have_the_same_key(server: Scripted) -> None:
    """They compare requests alike."""
    server.script()
    store = MemoryStore()

    for kind in KINDS:
        Sender(kind, store=store).post(server.url + "/orders?a=b", name="invoice-7")

    assert len(server.seen) == 3
    assert len(set(server.keys)) == 1


@EACH
@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("/other", {}),
        ("/?a=b", {}),
        ("/", {"body": b"coffee"}),
        ("/", {"method": "PATCH"}),
        ("/", {"headers": {"Content-Type": "text/plain"}}),
    ],
)
def test_another_request_under_a_name_is_refused(
    kind: str, path: str, changed: dict[str, Any], server: Scripted
) -> None:
    """Before it is sent."""
    server.script()
    store = MemoryStore()
    Sender(kind, store=store).post(server.url + "/", name="invoice-7")

    with pytest.raises(KeyReusedError, match="nothing was sent"):
        Sender(kind, store=store).post(server.url + path, name="invoice-7", **changed)

    assert len(server.seen) == 1


@EACH
def test_a_name_is_given_by_a_block_too(kind: str, server: Scripted) -> None:
    """A request in it that needs no key has none."""
    server.script()
    sender = Sender(kind, store=MemoryStore())

    with client.call("invoice-7"):
        sender.post(server.url, method="GET", body=None)
        sender.post(server.url)
        sender.post(server.url)
    sender.post(server.url)

    read, first, again, unnamed = server.keys
    assert read is None
    assert first == again != unnamed


@EACH
def test_a_name_inside_of_an_operation_needs_no_store(kind: str, server: Scripted) -> None:
    """Its key is derived from the operation, so that each attempt of that has the same."""
    server.script(500)
    derived = []

    @idempotent(MemoryStore(), key=lambda order: order)
    def place(order: str) -> None:
        operation = current()
        assert operation is not None
        derived.append(operation.derive("charge"))
        if Sender(kind).post(server.url, name="charge").status == 500:
            raise RuntimeError("once more")

    with pytest.raises(RuntimeError):
        place("A-1")
    place("A-1")
    place("A-2")

    assert server.keys == derived
    assert derived[0] == derived[1] != derived[2]


@EACH
def test_a_name_that_nothing_keeps_is_refused(kind: str, server: Scripted) -> None:
    """Its key would be another one in another process."""
    server.script()

    with pytest.raises(ConfigurationError, match="give store="):
        Sender(kind).post(server.url, name="invoice-7")

    assert not server.seen


@EACH
def test_a_stream_under_a_stored_name_is_refused(kind: str, server: Scripted) -> None:
    """It cannot be compared with the one before."""
    server.script()

    with pytest.raises(ConfigurationError, match="needs a body of bytes"):
        Sender(kind, store=MemoryStore()).post(server.url, body=[b"tea"], name="invoice-7")

    assert not server.seen


@EACH
@pytest.mark.parametrize("name", ["", 7])
def test_a_name_must_be_text(kind: str, name: Any, server: Scripted) -> None:
    """And not empty."""
    server.script()

    with pytest.raises(ConfigurationError, match="the name of a call must be text"):
        Sender(kind, store=MemoryStore()).post(server.url, name=name)

    assert not server.seen


@EACH
def test_the_key_of_the_caller_goes_before_a_name(kind: str, server: Scripted) -> None:
    """Nothing is stored."""
    server.script()

    Sender(kind).post(server.url, name="invoice-7", headers={"Idempotency-Key": "mine"})

    assert server.keys == ["mine"]


@EACH
def test_a_stored_key_is_quoted_where_that_is_asked(kind: str, server: Scripted) -> None:
    """It is stored without quotes."""
    server.script()
    store = MemoryStore()

    for quoted in (True, False):
        Sender(kind, store=store, quoted=quoted).post(server.url, name="invoice-7")

    first, second = server.keys
    assert first == f'"{second}"'


def test_a_name_has_a_new_key_when_its_time_is_over(server: Scripted) -> None:
    """By the clock of the store."""
    server.script()
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0])

    for now[0] in (0.0, 59.0, 61.0):
        Sender(HTTPX, store=store, ttl=60).post(server.url, name="invoice-7")

    first, second, third = server.keys
    assert first == second != third


@pytest.mark.parametrize("kind", [HTTPX, REQUESTS])
@LASTING
def test_threads_share_the_key_of_a_name(kind: str, sync_store: Any, server: Scripted) -> None:
    """Also where they ask for it at the same time."""
    server.script()
    together = threading.Barrier(8)

    def post(_: int) -> None:
        together.wait()
        Sender(kind, store=sync_store).post(server.url, name="invoice-7")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(post, range(8)))

    assert len(server.seen) == 8
    assert len(set(server.keys)) == 1


@LASTING
async def test_tasks_share_the_key_of_a_name(open_another: Callable[[], Any], server: Scripted) -> None:
    """Each of them with a store of its own on the same records, as in another process."""
    server.script()
    stores = [await open_another() for _ in range(8)]

    async def post(store: Any) -> None:
        transport = client.AsyncIdempotentTransport(store=store, retry=AT_ONCE)
        async with httpx.AsyncClient(transport=transport) as session:
            await session.post(server.url, extensions={"idempotency": "invoice-7"})

    await asyncio.gather(*map(post, stores))

    assert len(server.seen) == 8
    assert len(set(server.keys)) == 1


@pytest.mark.stores("memory", "sqlite", "redis", "postgres", "mariadb")
async def test_a_claim_without_a_key_is_taken_over(store: Any) -> None:
    """A process that ended between the two writes has sent nothing, and nobody waits for it."""
    vanished, claim = (Claim(scope=SCOPE, key="invoice-7", fingerprint=b"tea", lease=0.0, ttl=60.0) for _ in range(2))
    await store.claim(vanished)

    key = await _stored.stored_key(store, claim)

    record = await store.claim(vanished)
    assert (record.state, record.result) == (State.DONE, b"client-key:1:" + key.encode())


async def test_a_claim_that_is_always_taken_over_is_an_error() -> None:
    """It is given up at some time, and nothing is sent."""

    class Busy(MemoryStore):
        async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
            return False

    claim = Claim(scope=SCOPE, key="invoice-7", fingerprint=b"tea", lease=0.0, ttl=60.0)
    with pytest.raises(StoreError, match="nothing was sent"):
        await _stored.stored_key(Busy(), claim)


def test_the_format_of_a_stored_key_is_a_contract() -> None:
    """A process of a later release reads what one of this release has written."""
    assert _stored.write("8e03978e-40d5-43dd-bc93-6894a57f9324") == b"client-key:1:8e03978e-40d5-43dd-bc93-6894a57f9324"
    assert _stored.read(Replay(b"client-key:1:8e03978e-40d5-43dd-bc93-6894a57f9324")).startswith("8e03978e")


@pytest.mark.parametrize("verdict", [Replay(b"client-key:2:x"), Completed()])
def test_a_record_that_cannot_be_read_is_an_error(verdict: Replay | Completed) -> None:
    """No other key is made for it: the first may have been sent."""
    with pytest.raises(UnreadableError):
        _stored.read(verdict)
    with pytest.raises(KeyReusedError):
        _stored.read(Mismatch())


def test_a_store_that_fails_lets_nothing_be_sent(server: Scripted) -> None:
    """A key that is not stored would be another one after a restart."""
    server.script()
    store = FaultyStore()
    store.down = True

    with pytest.raises(StoreError):
        Sender(ASYNC_HTTPX, store=store).post(server.url, name="invoice-7")

    assert not server.seen


class Shop:
    """A shop whose first order waits for the gate. Its requests have idempotency keys."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.begun, self.gate = threading.Event(), threading.Event()

    async def order(self, request: Request) -> Response:
        self.keys.append(request.state.idempotency.key)
        self.begun.set()
        await asyncio.to_thread(self.gate.wait, PATIENCE)
        return JSONResponse({"order": len(self.keys)}, 201)

    @contextmanager
    def open(self) -> Iterator[str]:
        """Serve it, and give the URL of its orders."""
        app = Starlette(routes=[Route("/orders", self.order, methods=["POST"])])
        self.requests: list[str] = []
        protected = IdempotencyMiddleware(app, store=MemoryStore())

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            self.requests.append(dict(scope["headers"])[b"idempotency-key"].decode())
            await protected(scope, receive, send)

        with served(noting) as url:
            yield f"{url}/orders"


@pytest.mark.processes
@LASTING
def test_a_process_that_is_killed_before_its_answer_sends_the_same_key_again(target: Target) -> None:
    """The second process gets the result of the one order that the first has placed."""
    shop = Shop()
    store = target.sync_url if target.is_sql else target.url
    with shop.open() as url:
        command = [sys.executable, "-m", "tests.clients.named_child", store, json.dumps(target.options), url]
        with subprocess.Popen(command, cwd=ROOT) as first:
            assert shop.begun.wait(PATIENCE)
            first.kill()
        shop.gate.set()
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)

    assert (second.stdout, second.stderr) == ("201\n", "")
    assert len(shop.requests) >= 2
    assert len(set(shop.requests)) == 1
    assert shop.keys == shop.requests[:1]

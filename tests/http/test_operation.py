"""The running operation, as the handler sees it."""

from __future__ import annotations

import asyncio
import threading
import uuid
from typing import Any

import anyio.to_thread
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, current
from idempotency._http.caller import ANONYMOUS
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.asgi_calls import Effects, call, protect, respond
from tests.kit.time_travel import settled

pytestmark = pytest.mark.fronts("asgi", "wsgi")


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
    app.running.clear()
    second = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
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

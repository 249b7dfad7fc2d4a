"""The status of a saga over HTTP, behind a real server: first 202 with a URL, then the result there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from idempotency import IdempotencyMiddleware
from idempotency.errors import ConfigurationError, StoreError
from idempotency.saga import (
    AsyncSaga,
    SagaOperations,
    SagaPendingError,
    SagaStatus,
    SagaStuckError,
    Sweeper,
    saga,
)
from idempotency.stores.memory import MemoryStore
from tests.kit.served import served
from tests.saga.operate.trips import trips

pytestmark = pytest.mark.stores("sqlite")

SECRET = "a secret of thirty-two characters"


@pytest.fixture
def status(book_trip: AsyncSaga[str]) -> SagaStatus:
    """The status of the sagas of the test."""
    return SagaStatus([book_trip], secret=SECRET, url="/trips/status")


@pytest.fixture
async def client(book_trip: AsyncSaga[str], status: SagaStatus) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that books trips."""

    async def book(request: Request) -> Any:
        return JSONResponse(
            await book_trip("Rome", request.query_params.get("plan", ""), key=request.path_params["key"])
        )

    async def pending(request: Request, error: Exception) -> Any:
        assert isinstance(error, SagaPendingError)
        return status.accepted(error)

    async def start(request: Request) -> Any:
        return status.accepted(book_trip, await book_trip.start("Rome", key=request.path_params["key"]))

    app = Starlette(
        routes=[
            Route("/trips/{key}", book, methods=["POST"]),
            Route("/trips/{key}/later", start, methods=["POST"]),
            Mount("/trips/status", status),
        ],
        exception_handlers={SagaPendingError: pending},
    )
    with served(app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


async def test_a_long_saga_is_accepted_and_its_result_is_found_later(
    store: Any, book_trip: AsyncSaga[str], operations: SagaOperations, client: httpx.AsyncClient
) -> None:
    """The first answer names where; until there is a result that answers 202 too."""
    first = await client.post("/trips/7?plan=sleep")

    assert (first.status_code, first.json(), first.headers["retry-after"]) == (202, {"status": "pending"}, "60")
    where = first.headers["location"]
    assert where.startswith("/trips/status/")
    waiting = await client.get(where)
    assert (waiting.status_code, waiting.json(), waiting.headers["retry-after"]) == (202, {"status": "pending"}, "60")
    assert waiting.headers["cache-control"] == "no-store"

    await operations.cancel("book-trip", "7")
    assert (await client.get(where)).headers["retry-after"] == "1"
    assert await Sweeper(store, [book_trip]).sweep() == 1

    failed = await client.get(where)
    assert (failed.status_code, failed.headers["content-type"]) == (409, "application/problem+json")
    assert (failed.json()["code"], failed.json()["retryable"]) == ("saga-failed", False)


async def test_the_result_of_a_saga(store: Any, book_trip: AsyncSaga[str], client: httpx.AsyncClient) -> None:
    """As it is recorded; to HEAD without the body."""
    accepted = await client.post("/trips/7/later")
    where = accepted.headers["location"]
    assert (accepted.status_code, accepted.headers["retry-after"]) == (202, "1")
    assert await Sweeper(store, [book_trip]).sweep() == 1

    done = await client.get(where)

    assert (done.status_code, done.json()) == (200, {"status": "done", "result": "flight to Rome, hotel in Rome"})
    head = await client.head(where)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(done.content)))
    refused = await client.delete(where)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_no_url_of_another_saga_can_be_made(
    book_trip: AsyncSaga[str], status: SagaStatus, client: httpx.AsyncClient
) -> None:
    """What was not signed with the secret, names no saga, or one that is not among those of the status, is 404."""
    await book_trip("Rome", key="7")
    url = status.url("book-trip", "7")
    other = SagaStatus([book_trip], secret=SECRET[::-1], url="/trips/status")
    first = url.rpartition("/")[2]
    changed = first[:10] + ("A" if first[10] != "A" else "B") + first[11:]
    assert (await client.get(url)).status_code == 200

    for wrong in (other.url("book-trip", "7"), f"/trips/status/{changed}", status.url("book-trip", "8")):
        answer = await client.get(wrong)
        assert (answer.status_code, answer.json()["code"]) == (404, "saga-unknown")
    for wrong in ("", "7", "%C3%A9", first[:-1], first[:20]):
        assert (await client.get(f"/trips/status/{wrong}")).status_code == 404
    rotated = SagaStatus([book_trip], secret=[SECRET[::-1], SECRET], url="/trips/status")
    with served(rotated) as base:
        async with httpx.AsyncClient(base_url=base) as elsewhere:
            assert (await elsewhere.get(url)).status_code == 200


async def test_a_stuck_saga_is_a_problem(
    book_trip: AsyncSaga[str], operations: SagaOperations, status: SagaStatus, client: httpx.AsyncClient, hang: Any
) -> None:
    """The client is not shown why. Once an operator has decided, the saga is pending again."""
    task = await hang("hotel")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(SagaStuckError):
        await book_trip("Rome", key="7")

    stuck = await client.get(status.url("book-trip", "7"))

    assert (stuck.status_code, stuck.json()["code"]) == (409, "saga-stuck")
    assert "hotel" not in stuck.text
    await operations.resolve("book-trip", "7", "hotel", "not-done")
    assert (await client.get(status.url("book-trip", "7"))).status_code == 202


async def test_with_a_key_the_202_is_replayed(store: Any, book_trip: AsyncSaga[str], status: SagaStatus) -> None:
    """In FastAPI, under the middleware: the saga's key is derived, and a retry is given the same URL."""
    app = FastAPI(exception_handlers={SagaPendingError: lambda _, error: status.accepted(error)})
    app.add_middleware(IdempotencyMiddleware, store=store, scope=None)

    @app.post("/trips")
    async def book() -> str:
        return await book_trip("Rome", "sleep")

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        first, second = [await client.post("/trips", headers={"Idempotency-Key": "'7'"}) for _ in range(2)]

    assert (first.status_code, second.status_code) == (202, 202)
    assert second.headers["idempotent-replayed"] == "true"
    assert first.headers["location"] == second.headers["location"]


async def test_a_store_that_fails_is_503(status: SagaStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(request: object) -> Any:
        raise StoreError("the server 10.0.0.7 is away")

    monkeypatch.setattr(status._journals[0], "ask", fail)
    with served(status) as base:
        async with httpx.AsyncClient(base_url=base) as client:
            answer = await client.get(status.url("book-trip", "7"))

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "10.0.0.7" not in answer.text


@pytest.mark.stores("memory")
async def test_sagas_of_several_stores_and_results_that_are_no_json(store: Any) -> None:
    """Each saga is found in its own store; a result of bytes is not shown."""

    @saga(MemoryStore(), name="photo")
    def photo() -> bytes:
        return b"\xff"

    status = SagaStatus([trips(store), photo], secret=SECRET, url="https://shop.example/status")
    await asyncio.to_thread(photo, key="7")
    url = status.url("photo", "7")
    assert url.startswith("https://shop.example/status/")

    with served(status) as base:
        async with httpx.AsyncClient(base_url=base) as client:
            done = await client.get(httpx.URL(url).path)

    assert (done.status_code, done.json()) == (200, {"status": "done"})


@pytest.mark.stores("memory")
def test_what_a_status_cannot_be_made_of(store: Any) -> None:
    book_trip = trips(store)

    for options, words in [
        ({"secret": "short", "url": "/status"}, "secret must have at least 32 characters"),
        ({"secret": [], "url": "/status"}, "secret must have at least 32 characters"),
        ({"secret": SECRET, "url": "status"}, "where the application is mounted"),
        ({"secret": SECRET, "url": "/status", "docs": "here"}, "docs must be"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            SagaStatus([book_trip], **options)  # type: ignore[arg-type]
    status = SagaStatus([book_trip], secret=SECRET, url="/status")
    with pytest.raises(ConfigurationError, match="there is no saga other among those of the status"):
        status.url("other", "7")
    with pytest.raises(ConfigurationError, match="a saga and its key"):
        status.accepted(book_trip)

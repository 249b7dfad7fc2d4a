"""A page of another origin sends keyed requests: what its scripts can read, by where CORS middleware is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from idempotency import IdempotencyMiddleware
from idempotency.stores.memory import MemoryStore
from tests.kit.chromium import browser as started_browser
from tests.kit.served import served

pytestmark = pytest.mark.processes

EXPOSED = ["Idempotent-Replayed", "Retry-After"]

SEND = """
async ([url, key, order]) => {
    const headers = {"Idempotency-Key": key, "Content-Type": "application/json"};
    try {
        const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify(order)});
        return {
            status: answer.status,
            body: await answer.json(),
            replayed: answer.headers.get("Idempotent-Replayed"),
            retryAfter: answer.headers.get("Retry-After"),
        };
    } catch (error) {
        return {error: error.name};
    }
}
"""

MEET = """
async ([url, send]) => {
    const post = eval(send);
    const first = post([url + "/slow", "k-2", {item: "tea"}]);
    await fetch(url + "/started");
    const second = await post([url + "/slow", "k-2", {item: "tea"}]);
    await fetch(url + "/release");
    return [await first, second];
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """A page of a shop, whose origin is not that of the API."""

    async def home(_: Request) -> Response:
        return HTMLResponse("<title>shop</title>")

    with served(Starlette(routes=[Route("/", home)])) as url:
        opened = browser.new_page()
        opened.goto(url)
        yield opened


def api(origin: str, order: str) -> Starlette:
    """Return an API that lets an origin in, with the CORS middleware outside or inside."""
    started, released = asyncio.Event(), asyncio.Event()

    async def create(request: Request) -> Response:
        return JSONResponse({"ordered": (await request.json())["item"]}, 201)

    async def slow(request: Request) -> Response:
        started.set()
        await released.wait()
        return await create(request)

    async def when_started(_: Request) -> Response:
        await started.wait()
        return JSONResponse({})

    async def release(_: Request) -> Response:
        released.set()
        return JSONResponse({})

    cors = Middleware(
        CORSMiddleware,
        allow_origins=[origin],
        allow_methods=["POST"],
        allow_headers=["Idempotency-Key"],
        expose_headers=EXPOSED,
    )
    own = Middleware(IdempotencyMiddleware, store=MemoryStore(), scope=None)
    return Starlette(
        routes=[
            Route("/orders", create, methods=["POST"]),
            Route("/slow", slow, methods=["POST"]),
            Route("/started", when_started),
            Route("/release", release),
        ],
        middleware=[cors, own] if order == "outside" else [own, cors],
    )


@pytest.fixture
def outside(page: Page) -> Iterator[str]:
    """The URL of an API whose CORS middleware is outside ours."""
    with served(api(page.evaluate("location.origin"), "outside")) as url:
        yield url


@pytest.fixture
def inside(page: Page) -> Iterator[str]:
    """The URL of an API whose CORS middleware is inside ours."""
    with served(api(page.evaluate("location.origin"), "inside")) as url:
        yield url


def send(page: Page, url: str, key: str, item: str) -> dict[str, Any]:
    """Let a script of the page order an item, and return what it can read."""
    read: dict[str, Any] = page.evaluate(SEND, [f"{url}/orders", key, {"item": item}])
    return read


def test_with_cors_outside_a_page_reads_the_first_answer_and_the_replay(page: Page, outside: str) -> None:
    """Status, body, and that the second one is a replay."""
    first, replay = (send(page, outside, "k-1", "tea") for _ in range(2))

    assert first == {"status": 201, "body": {"ordered": "tea"}, "replayed": None, "retryAfter": None}
    assert replay == {"status": 201, "body": {"ordered": "tea"}, "replayed": "true", "retryAfter": None}


def test_with_cors_outside_a_page_reads_that_a_key_is_reused(page: Page, outside: str) -> None:
    """The problem document of the 422."""
    send(page, outside, "k-1", "tea")

    answer = send(page, outside, "k-1", "coffee")

    assert answer["status"] == 422
    assert answer["body"]["code"] == "key-reused"
    assert answer["replayed"] is None


def test_with_cors_outside_a_page_reads_when_to_retry(page: Page, outside: str) -> None:
    """The 409 of a request that is still running, with its Retry-After."""
    first, second = page.evaluate(MEET, [outside, SEND])

    assert (first["status"], first["body"]) == (201, {"ordered": "tea"})
    assert (second["status"], second["body"]["code"]) == (409, "in-progress")
    assert int(second["retryAfter"]) >= 1


def test_with_cors_inside_a_page_reads_the_first_answer_only(page: Page, inside: str) -> None:
    """What this middleware answers itself passes by the CORS middleware: to the page it is a network error."""
    first = send(page, inside, "k-1", "tea")
    answers = [send(page, inside, "k-1", item) for item in ("tea", "coffee")]
    running, second = page.evaluate(MEET, [inside, SEND])

    assert first["status"] == running["status"] == 201
    assert answers == [{"error": "TypeError"}] * 2
    assert second == {"error": "TypeError"}

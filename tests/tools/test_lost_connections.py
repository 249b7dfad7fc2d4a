"""A server that closes the connection before its answer is complete leaves the outcome of a tool unknown."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import anyio
import httpx
import pytest
import requests
from sqlalchemy.exc import OperationalError

from idempotency.errors import OutcomeUnknownError
from idempotency.stores.memory import MemoryStore
from idempotency.tool import idempotent_tool

ANSWERS = {
    "no answer": b"",
    "a part of the body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
    "a part of a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
    "no HTTP": b"\x00 garbage\r\n\r\n",
}


async def by_httpx(url: str) -> None:
    async with httpx.AsyncClient() as client:
        (await client.post(url)).raise_for_status()


async def by_aiohttp(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(url) as response:
        response.raise_for_status()
        await response.read()


async def by_requests(url: str) -> None:
    (await asyncio.to_thread(requests.post, url, timeout=20)).raise_for_status()


async def by_urllib(url: str) -> None:
    def post() -> None:
        try:
            with urllib.request.urlopen(url, b"x", timeout=20) as response:
                response.read()
        except urllib.error.HTTPError as error:
            error.close()
            raise

    await asyncio.to_thread(post)


@asynccontextmanager
async def provider(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve a provider that has its effect, and closes the connection after ``answer``; yield its URL and effects."""
    effects: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        effects.append(await reader.readline())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", effects


@pytest.mark.parametrize("post", [by_httpx, by_aiohttp, by_requests, by_urllib])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_that_is_cut_off_leaves_the_outcome_unknown(
    answer: str, post: Callable[[str], Awaitable[None]]
) -> None:
    """The provider has done it, whatever the error of the client is called."""
    async with provider(ANSWERS[answer]) as (url, effects):

        @idempotent_tool(MemoryStore(), intent=("order_id",))
        async def refund(order_id: str) -> str:
            await post(url)
            return "done"

        for _ in range(2):
            with pytest.raises(OutcomeUnknownError):
                await refund("7")

    assert len(effects) == 1


@pytest.mark.parametrize("post", [by_httpx, by_aiohttp, by_requests, by_urllib])
@pytest.mark.parametrize(("status", "runs"), [(502, 1), (504, 1), (400, 2), (503, 2)])
async def test_a_time_out_of_a_gateway_leaves_the_outcome_unknown(
    status: int, runs: int, post: Callable[[str], Awaitable[None]]
) -> None:
    """Its upstream may have done it; other errors of a server say that nothing was done."""
    answer = f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with provider(answer.encode()) as (url, effects):

        @idempotent_tool(MemoryStore(), intent=("order_id",))
        async def refund(order_id: str) -> str:
            await post(url)
            return "done"

        for _ in range(2):
            with pytest.raises(Exception) as error:  # noqa: PT011 - each client has its own
                await refund("7")
            assert isinstance(error.value, OutcomeUnknownError) == (runs == 1)

    assert len(effects) == runs


@pytest.mark.parametrize(
    "failure",
    [
        ssl.SSLEOFError(),
        ssl.SSLZeroReturnError(),
        anyio.BrokenResourceError(),
        OperationalError("COMMIT", {}, Exception("server closed the connection"), connection_invalidated=True),
    ],
)
async def test_a_connection_that_breaks_leaves_the_outcome_unknown(failure: Exception) -> None:
    runs: list[str] = []

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        raise failure

    for _ in range(2):
        with pytest.raises(OutcomeUnknownError):
            await refund("7")

    assert runs == ["7"]


@pytest.mark.parametrize("post", [by_httpx, by_aiohttp, by_requests, by_urllib])
async def test_a_server_that_is_not_there_has_done_nothing(post: Callable[[str], Awaitable[None]]) -> None:
    async with provider(b"") as (url, _):
        pass
    runs: list[str] = []

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        await post(url)
        return "done"

    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)connect|refused") as error:
            await refund("7")
        assert not isinstance(error.value, OutcomeUnknownError)

    assert runs == ["7", "7"]

"""Wait for what was written, in this process and from another one, and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import ConfigurationError
from idempotency.projections import SyncTokenMiddleware, sync_token
from idempotency.projections._sync_token import read_token
from idempotency.streams import Appended, Position
from tests.projections.kit import ASYNC_KINDS, KINDS, Bank, Deposited


@pytest.mark.stores(*ASYNC_KINDS)
async def test_it_waits_for_an_append_that_is_not_committed_yet(bank: Bank) -> None:
    """Not before the commit; then the worker of this process applies it at once, and the wait ends."""
    balance = bank.projection()
    await balance.catch_up()
    running = None if bank.engine.dialect.name == "sqlite" else asyncio.create_task(balance.run())
    async with bank.sessions() as session:
        appended = await bank.streams.append(session, "a", [Deposited(5)])
        assert sync_token(appended) == base64.urlsafe_b64encode(b'["a",1]').decode().rstrip("=")
        waiting = asyncio.create_task(balance.reached(appended, timeout=20))
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        await session.commit()
    running = running or asyncio.create_task(balance.run())

    assert (done, await waiting, await bank.seen()) == (set(), True, (1, 5))
    balance.stop()
    await running


@pytest.mark.stores(*ASYNC_KINDS)
async def test_it_ends_after_its_time(bank: Bank) -> None:
    """For what was rolled back or is applied nowhere, it is False; what is applied is True without a wait."""
    balance = bank.projection()
    first = await bank.append(5)
    assert not await balance.reached(first, timeout=0.05)
    while not await balance.reached(first, timeout=0):
        await balance.catch_up()
    async with bank.sessions() as session:
        position = await bank.streams.position(session, first)
    before = time.monotonic()
    reached = [
        await balance.reached(position, timeout=30),
        await balance.reached(first, timeout=30),
        await balance.reached(Position(position.place, position.seq + 1), timeout=0.05),
        await balance.reached(Appended("a", 2), timeout=0.05),
    ]
    assert reached == [True, True, False, False]
    assert time.monotonic() - before < 15


@pytest.mark.stores(*KINDS)
async def test_it_waits_for_the_version_that_is_read(bank: Bank) -> None:
    """A version that is built has not applied it yet, and one that is ahead is not what readers see."""
    first, second = bank.projection(1), bank.projection(2)
    appended = await bank.append(5)
    await bank.readable()
    await first.catch_up()
    assert await second.reached(appended, timeout=0)
    appended = await bank.append(6)
    await bank.readable()
    await second.catch_up()
    assert not await second.reached(appended, timeout=0)
    await second.switch()
    assert await first.reached(appended, timeout=0)


class Shop:
    """An API whose command appends, and whose query reads the view, behind the middleware."""

    def __init__(self, bank: Bank, balance: Any, **options: Any) -> None:
        async def deposit(request: Request) -> JSONResponse:
            return JSONResponse({}, headers={"Sync-Token": sync_token(await bank.append(5))})

        async def read(request: Request) -> JSONResponse:
            return JSONResponse((await bank.seen())[1])

        routes = [Route("/deposits", deposit, methods=["POST"]), Route("/balance", read)]
        app = SyncTokenMiddleware(Starlette(routes=routes), [balance], **options)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bank")

    async def deposit(self) -> str:
        return (await self.client.post("/deposits")).headers["sync-token"]

    async def read(self, *tokens: str, prefer: str = "wait=0") -> httpx.Response:
        headers = [("Prefer", prefer), *(("Sync-Token", token) for token in tokens)]
        return await self.client.get("/balance", headers=headers)


@pytest.mark.stores(*KINDS)
async def test_a_client_reads_what_it_has_written(bank: Bank) -> None:
    """Later than it wants to wait: 503 and Retry-After; once it is applied, the answer."""
    balance = bank.projection()
    shop = Shop(bank, balance, wait=30)
    token = await shop.deposit()
    late = await shop.read(token)
    await bank.readable()
    waiting = asyncio.create_task(shop.read(token, prefer="wait=20"))
    await balance.catch_up()
    read = await waiting

    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    assert late.headers["content-type"] == "application/problem+json"
    assert (late.json()["code"], late.json()["retryable"]) == ("projection-behind", True)
    assert (read.status_code, read.json(), "sync-token-reached" in read.headers) == (200, 5, False)
    assert (await shop.read()).json() == 5


@pytest.mark.stores("sqlite")
async def test_a_late_answer_may_be_what_is_there(bank: Bank) -> None:
    """Marked by a field. ``wait`` is the most seconds, whatever a client prefers."""
    shop = Shop(bank, bank.projection(), wait=0.05, late="stale")
    await bank.projection().catch_up()
    before = time.monotonic()
    read = await shop.read(await shop.deposit(), prefer="wait=60")

    assert (read.status_code, read.json(), read.headers["sync-token-reached"]) == (200, 0, "false")
    assert time.monotonic() - before < 15


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    "token",
    [
        "",
        "!",
        "e30",
        "W10",
        "A" * 5000,
        "WyJhIiwwXQ",
        "WyJhIiwiMSJd",
        "WyIiLDFd",
        "WzEsMV0",
        "WyJhIiw5OTk5OTk5OTk5OTk5OTk5OTk5OV0",
    ],
)
async def test_a_malformed_token_is_answered_with_400(token: str, bank: Bank) -> None:
    """It is read before any database is asked."""
    read = await Shop(bank, bank.projection()).read(token)

    assert (read.status_code, read.json()["code"]) == (400, "sync-token-invalid")


@pytest.mark.stores("sqlite")
async def test_two_tokens_are_answered_with_400(bank: Bank) -> None:
    """Which one counts would be a guess."""
    shop = Shop(bank, bank.projection())
    token = await shop.deposit()
    assert (await shop.read(token, token)).status_code == 400


@pytest.mark.parametrize("stream", ["account-7", "ü/ 7", "日" * 255, "a" * 255])
def test_a_token_is_read_as_it_was_made(stream: str) -> None:
    """Of any stream; it is printable ASCII, as a field of HTTP is."""
    token = sync_token(Appended(stream, 12))

    assert read_token(token.encode("ascii")) == Appended(stream, 12)
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    "wrong", [{"projections": []}, {"late": "later"}, {"wait": -1}, {"docs": "x"}, {"kind": "sync"}]
)
async def test_what_the_middleware_cannot_do_is_refused(wrong: dict[str, Any], bank: Bank) -> None:
    """When the application starts."""
    kind = wrong.pop("kind", None)
    projections = wrong.pop("projections", [bank.projection(source=None) if kind else bank.projection()])
    with pytest.raises(ConfigurationError):
        SyncTokenMiddleware(Starlette(), projections, **wrong)

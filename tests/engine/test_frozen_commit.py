"""A server that stands still in the COMMIT of a transaction."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency import IdempotencyMiddleware, Policy
from idempotency.stores.sql import SQLStore
from tests.kit import servers

pytestmark = pytest.mark.alone

TIMEOUT = 2.0
LEASE = 2.0


class Client:
    """A client that sends one request again and again."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def post(self) -> tuple[int, bool]:
        """Return the status, and whether the answer is a replay, once the application has returned."""
        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        headers = [(b"idempotency-key", b"k")]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers, "state": {}}
        await self._app(scope, receive, send)
        return messages[0]["status"], (b"idempotent-replayed", b"true") in messages[0]["headers"]


async def handle(scope: Any, receive: Any, send: Any) -> None:
    await scope["state"]["idempotency"].session.execute(text("INSERT INTO effects VALUES (1)"))
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def test_a_commit_that_is_not_answered_holds_up_nobody() -> None:
    """The client hears 503 within the store's timeout, nothing waits on, and one effect is there in the end."""
    with servers.PostgresServer() as server:
        engine = create_async_engine(server.url)
        store = SQLStore(engine, timeout=TIMEOUT)
        await store.create_schema()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE effects (id INTEGER)"))
        client = Client(
            IdempotencyMiddleware(
                handle,
                store=store,
                session=async_sessionmaker(engine),
                policy=Policy(lease=LEASE),
                on_event=lambda _: None,
            )
        )
        loop = asyncio.get_running_loop()
        frozen = list[float]()

        def freeze(_: Any) -> None:
            server.freeze()
            frozen.append(loop.time())

        event.listen(engine.sync_engine, "commit", freeze)

        assert await client.post() == (503, False)
        assert loop.time() - frozen[0] < TIMEOUT + 4

        event.remove(engine.sync_engine, "commit", freeze)
        server.thaw()
        async with asyncio.timeout(20):
            while (answer := await client.post())[0] != 201:
                await asyncio.sleep(0.05)
        assert answer == (201, True)
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM effects")) == 1
        await engine.dispose()

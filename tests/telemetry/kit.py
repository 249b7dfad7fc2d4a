"""Operations of each surface under telemetry: an application, a consumer, a function, an outbox and sagas."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency import IdempotencyMiddleware
from idempotency.outbox import Outbox
from idempotency.stores.memory import MemoryStore

KEY, BODY, CALLER = "kEy-Y9pHd2", "b0dY-4111", "cr3dential"
SECRETS = (KEY, BODY, CALLER)
"""What a caller sends, and no telemetry may have."""


def shop(**options: Any) -> FastAPI:
    """Make an application with a route that has a parameter, and a mount that takes every path."""
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, **{"store": MemoryStore(), **options})

    @app.post("/orders/{number}")
    async def order(number: str) -> dict[str, str]:
        return {"number": number}

    @app.post("/broken")
    async def broken() -> None:
        raise ValueError(BODY)

    return app


@asynccontextmanager
async def client(app: Any) -> AsyncIterator[Callable[..., Any]]:
    """Give a function that posts to a path with a key, a body and a caller."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:

        async def post(path: str, key: str = KEY, body: str = BODY) -> httpx.Response:
            headers = {"Idempotency-Key": key, "Authorization": f"Bearer {CALLER}"}
            return await http.post(path, headers=headers, content=body)

        yield post


@asynccontextmanager
async def outbox_in(folder: Path) -> AsyncIterator[tuple[AsyncEngine, Outbox]]:
    """Give an outbox in a file of SQLite."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/outbox.db")
    outbox = Outbox()
    await outbox.create_schema(engine)
    yield engine, outbox
    await engine.dispose()

"""An orders API whose retried requests create one order.

    pip install 'asgi-idempotency[sqlite]' starlette uvicorn
    uvicorn --app-dir examples orders_api:app

Send the same request twice: the second answer is the first one's, marked ``Idempotent-Replayed: true``.

    curl -i localhost:8000/orders -H 'Idempotency-Key: 1f5a' -H 'Authorization: Bearer ann' -d '{"item": "tea"}'

The orders are in SQLite; the keys are in the same file, or wherever ``ORDERS_STORE`` says (``redis://localhost:6379``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiosqlite
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy, open_store

DATABASE = os.environ.get("ORDERS_DB", "orders.sqlite3")
STORE = os.environ.get("ORDERS_STORE", f"sqlite+aiosqlite:///{DATABASE}")
LEASE = float(os.environ.get("ORDERS_LEASE", "30"))  # seconds after which the key of a crashed server is free again

store = open_store(STORE)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    await store.create_schema()  # in production, a migration
    await store.check()
    async with aiosqlite.connect(DATABASE) as database:
        await database.execute("PRAGMA journal_mode = WAL")
        await database.execute(
            "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, customer TEXT, item TEXT, reference TEXT)"
        )
    yield
    await store.aclose()


async def create_order(request: Request) -> JSONResponse:
    order = await request.json()
    customer = request.headers.get("Authorization", "").removeprefix("Bearer ")  # stands for a real log-in
    reference = request.headers.get("Idempotency-Key")
    await asyncio.sleep(order.get("delay", 0))  # a slow stock check: time enough to send duplicates, or to crash
    async with aiosqlite.connect(DATABASE, timeout=30) as database:
        row = await database.execute(
            "INSERT INTO orders (customer, item, reference) VALUES (?, ?, ?)", (customer, order["item"], reference)
        )
        await database.commit()
    return JSONResponse({"id": row.lastrowid, "item": order["item"]}, 201)


async def list_orders(request: Request) -> JSONResponse:
    async with aiosqlite.connect(DATABASE) as database:
        database.row_factory = aiosqlite.Row
        rows = await database.execute_fetchall("SELECT * FROM orders ORDER BY id")
    return JSONResponse([dict(row) for row in rows])


app = Starlette(
    routes=[Route("/orders", create_order, methods=["POST"]), Route("/orders", list_orders)],
    middleware=[Middleware(IdempotencyMiddleware, store=store, policy=Policy(lease=LEASE))],
    lifespan=lifespan,
)

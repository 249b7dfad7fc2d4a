"""An orders API in which the order and its recorded response are one transaction.

    pip install 'asgi-idempotency[sqlite]' fastapi uvicorn
    uvicorn --app-dir examples orders_transactional:app

Send the same request twice: the second answer is the first one's. Kill the server at any moment, start it again and
repeat the request: there is one order.

    curl -i localhost:8000/orders -H 'Idempotency-Key: 1f5a' -H 'Authorization: Bearer ann' \\
        -H 'Content-Type: application/json' -d '{"item": "tea"}'

``ORDERS_DB`` names another database, such as ``postgresql+asyncpg://app@localhost/shop`` (with ``[postgresql]``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import IdempotencyMiddleware, Policy
from idempotency.adapters.fastapi import session
from idempotency.stores.sql import SQLStore

engine = create_async_engine(os.environ.get("ORDERS_DB", "sqlite+aiosqlite:///orders.sqlite3"))
sessions = async_sessionmaker(engine)
store = SQLStore(engine)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class NewOrder(BaseModel):
    item: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await store.create_schema()  # in production, a migration
    await store.check()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
# Without a key there is no session to commit: require one.
app.add_middleware(IdempotencyMiddleware, store=store, session=sessions, policy=Policy(required=True))


@app.post("/orders", status_code=201)
async def create_order(order: NewOrder, session: Annotated[AsyncSession, Depends(session)]) -> dict[str, int | str]:
    # No commit here: the order is committed together with the response that is recorded.
    row = Order(item=order.item)
    session.add(row)
    await session.flush()
    if order.item == "milk":
        # A 409 is not recorded, so the order is rolled back. A 400 or 404 would be recorded, and the order committed.
        raise HTTPException(409, "out of milk")
    return {"id": row.id, "item": row.item}


@app.get("/orders/count")
async def count_orders() -> int:
    async with sessions() as own:
        return await own.scalar(select(func.count()).select_from(Order)) or 0

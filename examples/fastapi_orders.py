"""An orders API in plain SQLAlchemy: ``def`` endpoints, one session dependency, keys optional.

    pip install 'asgi-idempotency[sql]' fastapi uvicorn
    uvicorn --app-dir examples fastapi_orders:app

Send the same request twice: the second answer is the first one's, and there is one order. Without a key there are two.

    curl -i -X POST 'localhost:8000/orders?item=tea' -H 'Idempotency-Key: 1f5a' -H 'Authorization: Bearer token-of-ann'
    curl -s localhost:8000/orders -H 'Authorization: Bearer token-of-ann'

``ORDERS_DB`` names another database, such as ``postgresql+psycopg://app@localhost/shop`` (with ``[postgresql]``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency import IdempotencyMiddleware
from idempotency.adapters.fastapi import session_of
from idempotency.stores.sql import SQLStore

engine = create_engine(os.environ.get("ORDERS_DB", "sqlite:///orders.sqlite3"))
SessionLocal = sessionmaker(engine)
store = SQLStore(engine)
SessionDep = Annotated[Session, Depends(session_of(SessionLocal), scope="function")]

TOKENS = {"token-of-ann": "ann", "token-of-bob": "bob"}


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    item: Mapped[str]


def customer_of(request: Request) -> str:
    """Authenticate: for the middleware, whose key it is; for an endpoint, who orders."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token not in TOKENS:
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})
    return TOKENS[token]


Customer = Annotated[str, Depends(customer_of)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    store.create_schema_sync()  # in production, a migration
    Base.metadata.create_all(engine)
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)
# A replay is answered before any dependency runs, so the middleware authenticates too.
app.add_middleware(IdempotencyMiddleware, store=store, session=SessionLocal, scope=customer_of)


@app.post("/orders", status_code=201)
def create_order(item: str, customer: Customer, session: SessionDep) -> dict[str, int | str]:
    order = Order(customer=customer, item=item)
    session.add(order)
    session.flush()  # not commit(): the order is committed together with the response that is recorded
    if item == "milk":
        raise HTTPException(409, "out of milk")  # a 409 is not recorded, so the order is rolled back
    return {"id": order.id, "item": order.item}


@app.get("/orders")
def list_orders(customer: Customer, session: SessionDep) -> list[str]:
    return list(session.scalars(select(Order.item).where(Order.customer == customer).order_by(Order.id)))

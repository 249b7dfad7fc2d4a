"""An orders API in Flask, in which the order and its recorded response are one transaction.

    pip install 'asgi-idempotency[sql]' flask gunicorn
    gunicorn --chdir examples --workers 2 --threads 4 flask_orders:app

Send the same request twice: the second answer is the first one's. Kill a worker at any moment and repeat the request:
there is one order.

    curl -i localhost:8000/orders -H 'Idempotency-Key: 1f5a' -H 'Authorization: Bearer ann' \\
        -H 'Content-Type: application/json' -d '{"item": "tea"}'

``ORDERS_DB`` names another database, such as ``postgresql+psycopg://app@localhost/shop`` (with ``[psycopg]``).
"""

from __future__ import annotations

import os

from flask import Flask, abort, request
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from idempotency import Policy
from idempotency.stores.sql import SQLStore
from idempotency.wsgi import IdempotencyMiddleware

engine = create_engine(os.environ.get("ORDERS_DB", "sqlite:///orders.sqlite3"))
sessions = sessionmaker(engine)
store = SQLStore(engine)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


store.create_schema_sync()  # in production, a migration
Base.metadata.create_all(engine)

app = Flask(__name__)
# Without a key there is no session to commit: require one.
app.wsgi_app = IdempotencyMiddleware(  # type: ignore[method-assign]
    app.wsgi_app, store=store, session=sessions, policy=Policy(required=True)
)


@app.post("/orders")
def create_order() -> tuple[dict[str, int | str], int]:
    # No commit here: the order is committed together with the response that is recorded.
    session: Session = request.environ["idempotency"].session
    row = Order(item=request.get_json()["item"])
    session.add(row)
    session.flush()
    if row.item == "milk":
        # A 409 is not recorded, so the order is rolled back. A 400 or 404 would be recorded, and the order committed.
        abort(409, "out of milk")
    return {"id": row.id, "item": row.item}, 201


@app.get("/orders/count")
def count_orders() -> dict[str, int]:
    with sessions() as own:
        return {"orders": own.scalar(select(func.count()).select_from(Order)) or 0}

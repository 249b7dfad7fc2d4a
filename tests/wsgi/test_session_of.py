"""One session for a view with and without a key, in Flask and Django."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, abort
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from idempotency import ConfigurationError, drain_sync
from idempotency.errors import TransactionError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.wsgi import IdempotencyMiddleware, session_of
from tests.kit.ledger import Ledger
from tests.kit.servers import with_driver
from tests.kit.targets import unique_name
from tests.kit.wsgi_calls import Effects, call, protect

pytestmark = pytest.mark.stores("sqlite", "postgres", "mariadb")

KEY = {"Idempotency-Key": "k"}


class Shop:
    """A Flask application whose views have their session by ``session_of``; ``errors`` are what its views met."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.errors: list[Exception] = []
        self.app = Flask(__name__)
        self.get_session = get_session = session_of(ledger.sessions)

        @self.app.post("/orders/<item>")
        def order(item: str) -> tuple[str, int]:
            with get_session() as session:
                session.execute(ledger.insert(item))
                if item == "committed":
                    self.commit(session)
                if item == "missing":
                    abort(404)
                if item == "broken":
                    raise LookupError(item)
            return item, 201

        @self.app.get("/orders")
        def orders() -> list[str]:
            with get_session() as session:
                return list(session.execute(ledger.everything).scalars())

    def commit(self, session: Any) -> None:
        try:
            session.commit()
        except TransactionError as error:
            self.errors.append(error)
            raise

    def protect(self) -> None:
        wrapped: Any = IdempotencyMiddleware(self.app.wsgi_app, store=self.ledger.store, session=self.ledger.sessions)
        self.app.wsgi_app = wrapped  # type: ignore[method-assign]

    def post(self, item: str, **headers: str) -> int:
        return self.app.test_client().post(f"/orders/{item}", headers=headers).status_code

    def orders(self) -> Any:
        return self.app.test_client().get("/orders").json


@pytest.fixture
def shop(sync_ledger: Ledger) -> Iterator[Shop]:
    yield Shop(sync_ledger)
    drain_sync()


def test_one_function_serves_reads_and_writes_with_and_without_a_key(shop: Shop) -> None:
    """An order with a key is written once, and its retry is given the recorded response."""
    shop.protect()

    statuses = [shop.post("tea", **KEY), shop.post("tea", **KEY), shop.post("milk")]

    assert statuses == [201] * 3
    assert shop.orders() == ["milk", "tea"]


@pytest.mark.parametrize("item", ["broken", "missing"])
def test_an_exception_that_leaves_the_block_rolls_back(shop: Shop, item: str) -> None:
    """With and without a key, also where the application answers it with a response that is recorded."""
    shop.protect()

    statuses = [shop.post(item, **headers) for headers in (KEY, {})]

    assert statuses == [{"broken": 500, "missing": 404}[item]] * 2
    assert shop.orders() == []


def test_a_commit_of_the_view_is_refused_under_a_key_only(shop: Shop) -> None:
    """It would commit the effect without its record. Without a key it is an ordinary commit."""
    shop.protect()

    statuses = [shop.post("committed", **headers) for headers in (KEY, {})]

    assert statuses == [500, 201]
    assert ["use flush()" in str(error) for error in shop.errors] == [True]
    assert shop.orders() == ["committed"]


def test_the_function_works_without_the_middleware(shop: Shop) -> None:
    """Also outside of any request."""
    assert shop.post("tea", **KEY) == 201
    with shop.get_session() as session:
        session.execute(shop.ledger.insert("milk"))

    assert shop.orders() == ["milk", "tea"]


@pytest.mark.stores("sqlite")
def test_a_middleware_without_sessions_is_named(shop: Shop) -> None:
    """Under a key, an ordinary session would be committed without its record."""

    def answer(environ: Any, start_response: Any) -> Any:
        with shop.get_session():
            return []

    with pytest.raises(TransactionError, match="session="):
        call(protect(Effects(answer), MemoryStore()), key="k")


@pytest.mark.stores("sqlite")
def test_what_makes_no_sessions_for_threads_is_refused() -> None:
    """An engine, as is easily given, and a factory of the other kind."""
    engine: Any = create_engine("sqlite://")
    other: Any = async_sessionmaker()
    with pytest.raises(ConfigurationError, match="session_of takes"):
        session_of(engine)
    with pytest.raises(ConfigurationError, match="takes a sessionmaker"):
        session_of(other)
    assert callable(session_of(sessionmaker()))


@pytest.mark.stores("sqlite")
def test_a_missing_table_is_said_by_each_request_with_a_key(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The view does not run, and the line of the event has the remedy."""
    engine = create_engine(with_driver(postgres_url, "postgresql+psycopg"))
    app, table = Effects(), unique_name("missing")

    answer = call(protect(app, SQLStore(engine, table=table), session=sessionmaker(engine)), key="k")
    engine.dispose()

    assert (answer.status, answer.code, app.runs) == (503, "store-unavailable", 0)
    assert f"has no table {table}: run `idempotency schema create`" in caplog.text

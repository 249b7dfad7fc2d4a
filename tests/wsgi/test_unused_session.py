"""The warning about a route of a WSGI application whose handlers do not use the session of their operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, abort
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from idempotency import current
from idempotency.events import Event
from idempotency.stores.sql import SQLStore
from tests.kit.wsgi_calls import Effects, call, protect


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Any]:
    engine = create_engine(sqlite_url.replace("+aiosqlite", ""))
    SQLStore(engine).create_schema_sync()
    yield engine
    engine.dispose()


def shop() -> Flask:
    app = Flask(__name__)

    @app.post("/orders/<item>")
    def order(item: str) -> str:
        return item

    @app.post("/used")
    def use() -> str:
        current().session.execute(text("SELECT 1"))  # type: ignore[union-attr]
        return ""

    @app.post("/charges")
    def charge() -> str:
        return current().derive("charge")  # type: ignore[union-attr]

    @app.post("/refused")
    def refuse() -> None:
        abort(400)

    return app


def events_of(engine: Any, app: Any, *paths: str, **options: Any) -> list[tuple[str, str]]:
    """Return what happened, when each path is sent under a key of its own, twice."""
    events: list[Event] = []
    options = {"session": sessionmaker(engine), **options}
    protected = protect(app, SQLStore(engine), on_event=events.append, **options)
    for number, path in enumerate(paths):
        for _ in range(2):
            call(protected, path, key=str(number))
    return [(event.kind, event.operation) for event in events if event.kind != "replayed"]


def test_a_route_of_flask_that_does_not_use_its_session_is_named_once(engine: Any) -> None:
    """By its template, after its record; a replay is not named."""
    assert events_of(engine, shop(), "/orders/tea", "/orders/cup") == [
        ("stored", "POST /orders/tea"),
        ("session-unused", "POST /orders/{item}"),
        ("stored", "POST /orders/cup"),
    ]


def test_the_name_is_the_same_without_a_hook(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The line of the log has the template."""
    protected = protect(shop(), SQLStore(engine), session=sessionmaker(engine))

    call(protected, "/orders/tea", key="k")

    assert [record.getMessage()[:35] for record in caplog.records] == ["session-unused POST /orders/{item} "]


@pytest.mark.parametrize("path", ["/used", "/charges", "/refused", "/nowhere"])
def test_what_needs_no_session_is_not_named(engine: Any, path: str) -> None:
    """A session that is used, an effect elsewhere, a refusal, and a path without a route."""
    assert "session-unused" not in dict(events_of(engine, shop(), path))


def test_a_leased_request_is_not_named(engine: Any) -> None:
    """It has no session to use."""
    assert events_of(engine, shop(), "/orders/tea", session=None) == [("stored", "POST /orders/tea")]


def test_without_a_framework_the_path_is_named(engine: Any) -> None:
    """As its routes are not known."""
    assert ("session-unused", "POST /orders/7") in events_of(engine, Effects(), "/orders/7")

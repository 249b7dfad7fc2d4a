"""Effect, response and record in one transaction, through the middleware for WSGI."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from idempotency import ConfigurationError, Policy, current, drain_sync
from idempotency.errors import TransactionError
from idempotency.events import Event
from idempotency.outbox import Outbox
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.wsgi import IdempotencyMiddleware
from tests.kit.ledger import Ledger
from tests.kit.wsgi_calls import Answer, Effects, call, environ_of, protect

pytestmark = pytest.mark.stores("sqlite", "postgres", "mariadb")

LINE = [("Content-Type", "text/plain")]


class Shop:
    """An application that inserts its key and answers as ``then`` says; ``events`` are what happened to its keys."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.then: Any = None
        self.status = "201 Created"
        self.events: list[Event] = []
        self.app = Effects(self._answer)
        self.protected = self.protect(self.app, Policy(lease=5))

    def protect(self, app: Any, policy: Policy) -> IdempotencyMiddleware:
        return protect(app, self.ledger.store, session=self.ledger.sessions, policy=policy, on_event=self.events.append)

    def _answer(self, environ: Any, start_response: Any) -> Any:
        operation = environ["idempotency"]
        operation.session.execute(self.ledger.insert(f"{operation.key}-{operation.attempt}"))
        if self.then is not None:
            self.then(operation)
        start_response(self.status, LINE)
        return [b"run %d" % self.app.runs]

    @property
    def kinds(self) -> list[str]:
        return [each.kind for each in self.events]


@pytest.fixture
def shop(sync_ledger: Ledger) -> Iterator[Shop]:
    yield Shop(sync_ledger)
    drain_sync()


def test_effect_and_response_are_committed_once(shop: Shop) -> None:
    """Before the server hears of the response; the retry replays it."""
    seen: list[list[str]] = []
    answer = Answer()

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        seen.append(shop.ledger.effects_sync())
        return answer.start_response(status, headers)

    body = b"".join(shop.protected(environ_of(key="k"), start_response))
    again = call(shop.protected, key="k")

    assert seen == [["k-1"]]
    assert (again.body, again.replayed, shop.ledger.effects_sync()) == (body, True, ["k-1"])
    assert shop.kinds == ["stored", "replayed"]


@pytest.mark.parametrize("ending", ["500", "409", "raises", "release", "exit"])
def test_what_fails_is_rolled_back(shop: Shop, ending: str) -> None:
    """The effect is gone, the key is free, and the next request runs."""

    def fail(operation: Any) -> None:
        match ending:
            case "500" | "409":
                shop.status = f"{ending} No"
            case "raises":
                raise LookupError
            case "release":
                operation.release()
            case "exit":
                raise SystemExit

    shop.then = fail
    if ending in ("raises", "exit"):
        with pytest.raises((LookupError, SystemExit)):
            call(shop.protected, key="k")
    else:
        assert call(shop.protected, key="k").body == b"run 1"
    assert shop.ledger.effects_sync() == []
    assert shop.kinds == ["released"]

    shop.then, shop.status = None, "201 Created"
    assert call(shop.protected, key="k").body == b"run 2"
    assert shop.ledger.effects_sync() == ["k-1"]


def test_a_superseded_owner_is_rolled_back(shop: Shop) -> None:
    """Another request has taken the key over and committed: its effect and its response are the only ones."""

    def lose(operation: Any) -> None:
        shop.then = None
        operation.session.rollback()  # SQLite has one writer at a time
        shop.ledger.store.release_sync(operation._claim)
        assert call(shop.protected, key="k").body == b"run 2"
        operation.session.execute(shop.ledger.insert("late"))

    shop.then = lose
    late = call(shop.protected, key="k")

    assert (late.body, late.replayed) == (b"run 2", True)
    assert shop.ledger.effects_sync() == ["k-1"]
    assert shop.kinds == ["stored", "superseded", "replayed"]


def test_a_refused_flush_is_the_operations_own_failure(shop: Shop) -> None:
    """What the database refuses reaches the server as the application's error; nothing is committed or recorded."""
    ledger = shop.ledger
    with ledger.sync_engine.begin() as connection:
        connection.execute(text(f"CREATE UNIQUE INDEX {ledger.name}_once ON {ledger.name} (what)"))
        connection.execute(ledger.insert("k-1"))

    with pytest.raises(IntegrityError):
        call(shop.protected, key="k")

    assert ledger.effects_sync() == ["k-1"]
    assert shop.kinds == ["released"]


def test_the_session_ends_with_the_response(shop: Shop) -> None:
    """What runs in close(), or of a response that is sent live, cannot use it any more: nothing would commit that."""
    found: list[object] = []

    class Pieces(list[bytes]):
        def close(self) -> None:
            operation = current()
            assert operation is not None
            with pytest.raises(TransactionError):
                found.append(operation.session)

    def handler(environ: Any, start_response: Any) -> Any:
        environ["idempotency"].session.execute(shop.ledger.insert("once"))
        start_response("200 OK", LINE)
        return Pieces([b"x" * 6, b"y" * 6])

    protected = shop.protect(Effects(handler), Policy(max_response=8))
    call(protected, key="k")

    assert (found, shop.ledger.effects_sync()) == ([], ["once"])
    assert call(protected, key="k").code == "completed-not-replayable"


def test_connections_are_returned(shop: Shop) -> None:
    """After an answer, a failure and a replay the pool has all of its connections."""
    out: list[int] = [0]
    engine = shop.ledger.sync_engine
    event.listen(engine, "checkout", lambda *_: out.append(out.pop() + 1))
    event.listen(engine, "checkin", lambda *_: out.append(out.pop() - 1))

    call(shop.protected, key="a")
    shop.then = lambda operation: (_ for _ in ()).throw(LookupError)
    with pytest.raises(LookupError):
        call(shop.protected, key="b")
    call(shop.protected, key="a")

    assert out == [0]


def test_of_simultaneous_requests_one_commits(shop: Shop) -> None:
    """Ten threads with one key, which wait: one effect, and nine replays of it."""
    protected = shop.protect(shop.app, Policy(wait=20))
    began = threading.Barrier(10)

    def ask(_: int) -> Answer:
        began.wait()
        return call(protected, key="k")

    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(ask, range(10)))

    assert {each.body for each in answers} == {b"run 1"}
    assert sorted(each.replayed for each in answers) == [False] + [True] * 9
    assert shop.ledger.effects_sync() == ["k-1"]


def test_messages_commit_with_the_effect(shop: Shop) -> None:
    """What the operation emits is in the outbox once; of a failed run nothing is."""
    outbox = Outbox(table=f"{shop.ledger.name}_out")
    outbox.create_schema_sync(shop.ledger.sync_engine)
    emitted: list[str] = []

    def emit(operation: Any) -> None:
        emitted.append(
            operation.emit(aggregate_type="order", aggregate_id=7, type="Placed", payload={"a": 1}, outbox=outbox)
        )
        if len(emitted) == 1:
            raise LookupError

    shop.then = emit
    with pytest.raises(LookupError):
        call(shop.protected, key="k")
    call(shop.protected, key="k")
    call(shop.protected, key="k")

    with shop.ledger.sync_engine.connect() as connection:
        rows = connection.execute(text(f"SELECT count(*) FROM {shop.ledger.name}_out")).scalar_one()
    assert rows == 1
    assert emitted[0] == emitted[1]


def test_what_cannot_commit_together_is_refused(shop: Shop) -> None:
    """An async factory, another store, and a factory on another database are refused when the middleware is made."""
    engine = shop.ledger.sync_engine
    for store, session in (
        (shop.ledger.store, async_sessionmaker()),
        (MemoryStore(), sessionmaker(engine)),
        (SQLStore.from_url("sqlite:///elsewhere.db"), sessionmaker(engine)),
    ):
        with pytest.raises(ConfigurationError):
            protect(Effects(), store, session=session)

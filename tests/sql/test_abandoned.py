"""Statements that nobody waits for any more: their connection is closed, and nothing of them goes on in the server."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from idempotency import Policy, drain, drain_sync, idempotent
from idempotency._rules import Claim
from idempotency.errors import StoreError
from idempotency.stores.sql import SQLStore
from tests.kit.server_side import ServerSide
from tests.kit.servers import with_driver, with_port
from tests.kit.targets import unique_name
from tests.kit.tcp_proxy import Proxy

pytestmark = pytest.mark.alone

TIMEOUT = 0.5
SLACK = 3.0
"""Seconds that a loaded machine may add."""

ASYNC = ("postgresql+asyncpg", "postgresql+psycopg", "mysql+aiomysql", "mysql+asyncmy")
SYNC = ("postgresql+psycopg", "postgresql+psycopg2", "postgresql+pg8000", "mysql+pymysql", "mysql+mysqlconnector")


@pytest.fixture
def url(request: pytest.FixtureRequest, driver: str) -> str:
    """The URL of a database of the test's process."""
    fixture = "local_postgres_url" if driver.startswith("postgresql") else "mariadb_url"
    return with_driver(request.getfixturevalue(fixture), driver)


@dataclass
class Bench:
    """A store whose pool has one connection, behind a proxy, and an eye on the server that needs neither."""

    store: SQLStore
    engine: Any
    sessions: Any
    proxy: Proxy
    server: ServerSide
    direct: str
    effects: str

    def insert(self, what: str) -> Any:
        return text(f"INSERT INTO {self.effects} VALUES (:what)").bindparams(what=what)

    def committed(self) -> list[str]:
        """Read the effects past the proxy and the pool."""
        engine = create_engine(self.direct, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            return list(connection.scalars(text(f"SELECT what FROM {self.effects} ORDER BY what")))

    def seen(self, claim: Claim) -> int:
        """Count the records of a claim that are committed."""
        engine = create_engine(self.direct, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            query = text(f"SELECT count(*) FROM {self.store._table.name} WHERE token = :token")
            return int(connection.execute(query, {"token": claim.token}).scalar_one())


def _direct(url: str) -> str:
    return with_driver(url, "postgresql+psycopg" if url.startswith("postgresql") else "mysql+pymysql")


@contextmanager
def _prepared(url: str) -> Iterator[tuple[Proxy, str, str]]:
    name = unique_name("abandoned")
    engine = create_engine(_direct(url), poolclass=sqlalchemy.NullPool)
    SQLStore(engine, table=name).create_schema_sync()
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {name}_effects (what VARCHAR(50) PRIMARY KEY)"))
    with Proxy(sqlalchemy.make_url(url).port or 0) as proxy:
        yield proxy, with_port(url, proxy.port), name


@asynccontextmanager
async def opened(url: str, size: int = 1) -> AsyncIterator[Bench]:
    with _prepared(url) as (proxy, proxied, name):
        engine = create_async_engine(proxied, pool_size=size, max_overflow=0)
        store = SQLStore(engine, table=name, timeout=TIMEOUT)
        yield Bench(store, engine, async_sessionmaker(engine), proxy, ServerSide(url), _direct(url), f"{name}_effects")
        proxy.resume()
        await drain()
        await store.aclose()
        await engine.dispose()


@contextmanager
def opened_sync(url: str) -> Iterator[Bench]:
    with _prepared(url) as (proxy, proxied, name):
        engine = create_engine(proxied, pool_size=1, max_overflow=0)
        store = SQLStore(engine, table=name, timeout=TIMEOUT)
        yield Bench(store, engine, sessionmaker(engine), proxy, ServerSide(url), _direct(url), f"{name}_effects")
        proxy.resume()
        drain_sync()
        engine.dispose()


def new_claim(key: str = "k", **options: Any) -> Claim:
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **options})


async def took(call: Callable[[], Any], *errors: type[BaseException]) -> float:
    """Return how many seconds a call took that must fail."""
    since = monotonic()
    with pytest.raises(errors or StoreError):
        await call()
    return monotonic() - since


@pytest.mark.parametrize("driver", ASYNC)
async def test_a_commit_that_was_given_up_poisons_no_connection(url: str) -> None:
    """After a commit without an answer the next leased claim, on the same pool, is really stored."""
    async with opened(url) as bench:

        @idempotent(bench.store, key=lambda what: what, session=bench.sessions)
        async def order(what: str, session: Any) -> str:
            await session.execute(bench.insert(what))
            if what == "tea":
                bench.proxy.pause()
            return what

        assert await took(lambda: order("tea")) < TIMEOUT + SLACK
        bench.proxy.resume()
        claim = new_claim()

        await bench.store.claim(claim)
        assert bench.seen(claim) == 1
        assert await bench.store.complete(claim, b"result")
        assert await bench.server.quiet(10)

        assert await order("cup") == "cup"
        assert bench.committed() in (["cup"], ["cup", "tea"])


@pytest.mark.parametrize("driver", ASYNC[:3])
@pytest.mark.parametrize("step", ["claim", "savepoint", "flush", "commit", "rollback"])
async def test_a_call_cancelled_in_any_step_leaves_no_connection_behind(url: str, step: str) -> None:
    """The caller goes on at once, also while nothing is answered; the pool's one connection is a new one."""
    async with opened(url) as bench:
        loop = asyncio.get_running_loop()
        frozen = asyncio.Event()

        def freeze() -> None:
            bench.proxy.pause()
            loop.call_soon(frozen.set)

        class Base(sqlalchemy.orm.DeclarativeBase):
            pass

        class Effect(Base):
            __tablename__ = bench.effects
            what: Any = sqlalchemy.Column(sqlalchemy.String(50), primary_key=True)

        rule = {KeyError: "store"} if step == "savepoint" else {}

        @idempotent(bench.store, key=lambda what: what, session=bench.sessions, policy=Policy(outcomes=rule))
        async def order(what: str, session: Any) -> str:
            if step == "flush":
                session.add(Effect(what=what))
            elif step in ("commit", "rollback"):
                await session.execute(bench.insert(what))
            if what == "tea":
                freeze()
            if step == "rollback":
                raise ValueError(what)
            return what

        if step == "claim":
            await order("before")
        if step == "claim":
            freeze()
        elif step == "savepoint":
            event.listen(bench.engine.sync_engine, "savepoint", lambda *_: freeze())
        task = loop.create_task(order("tea"))
        await frozen.wait()
        await asyncio.sleep(0.05)  # for the step to be sent; what comes too early cancels something else, as well
        since = loop.time()
        task.cancel()
        with pytest.raises((asyncio.CancelledError, StoreError, ValueError)):
            await task
        assert loop.time() - since < TIMEOUT + SLACK

        bench.proxy.resume()
        claim = new_claim()
        await bench.store.claim(claim)
        assert bench.seen(claim) == 1
        assert await bench.server.quiet(10)
        assert bench.engine.pool.checkedout() == 0


@pytest.mark.parametrize("driver", SYNC)
def test_a_blocking_verb_ends_in_time(url: str) -> None:
    """A frozen network holds up no thread for longer than the store's timeout and a quarter."""
    with opened_sync(url) as bench:
        bench.store.claim_sync(new_claim("before"))
        bench.proxy.pause()
        since = monotonic()
        with pytest.raises(StoreError):
            bench.store.claim_sync(new_claim())
        assert monotonic() - since < 1.25 * TIMEOUT + SLACK

        bench.proxy.resume()
        claim = new_claim("after")
        bench.store.claim_sync(claim)
        assert bench.seen(claim) == 1


@pytest.mark.parametrize("driver", SYNC)
@pytest.mark.parametrize("step", ["claim", "commit"])
def test_a_blocking_joined_call_ends_in_time(url: str, step: str) -> None:
    """So it is for the claim and the commit of a joined call, and its connection is not used again."""
    with opened_sync(url) as bench:

        @idempotent(bench.store, key=lambda what: what, session=bench.sessions, lock_timeout=0)
        def order(what: str, session: Any) -> str:
            session.execute(bench.insert(what))
            if step == "commit" and what == "tea":
                bench.proxy.pause()
            return what

        order("before")
        if step == "claim":
            bench.proxy.pause()
        since = monotonic()
        with pytest.raises(StoreError):
            order("tea")
        # The commit, and the look whether it was applied after all.
        assert monotonic() - since < 2 * 1.25 * TIMEOUT + SLACK

        bench.proxy.resume()
        claim = new_claim()
        bench.store.claim_sync(claim)
        assert bench.seen(claim) == 1
        assert asyncio.run(bench.server.quiet(10))


@pytest.mark.parametrize("driver", SYNC[:1])
def test_a_blocking_verb_goes_on_where_no_thread_can_begin(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the interpreter exits: it is done without a bound, and the next one has its bound again."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with opened_sync(url) as bench:
        claim = new_claim()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            bench.store.claim_sync(claim)
            assert bench.store.complete_sync(claim, b"result")
        bench.proxy.pause()
        since = monotonic()
        with pytest.raises(StoreError):
            bench.store.claim_sync(new_claim("frozen"))
        assert monotonic() - since < 1.25 * TIMEOUT + SLACK


class _OutOfTimeError(Exception):
    """What the handler of a signal raises."""


def _run_out_of_time(*_: object) -> None:
    raise _OutOfTimeError


@pytest.mark.parametrize("driver", SYNC)
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_statement_that_a_signal_interrupts_is_the_last_of_its_connection(url: str, swallowed: bool) -> None:
    """The next call, on the same pool, is given its own answers."""
    nap = text("SELECT pg_sleep(0.4)" if url.startswith("postgresql") else "SELECT sleep(0.4)")
    with opened_sync(url) as bench:

        @idempotent(bench.store, key=lambda what: what, session=bench.sessions)
        def order(what: str, session: Any) -> str:
            session.execute(bench.insert(what))
            if what == "tea":
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with suppress(_OutOfTimeError) if swallowed else nullcontext():
                    session.execute(nap)
            return what

        before = signal.signal(signal.SIGALRM, _run_out_of_time)
        try:
            # Drivers in C hear of it behind the statement, and nothing is wrong with their connection.
            with suppress(_OutOfTimeError, StoreError, sqlalchemy.exc.DBAPIError):
                order("tea")
        finally:
            signal.signal(signal.SIGALRM, before)

        assert order("cup") == "cup"
        claim = new_claim()
        assert bench.store.claim_sync(claim).token == claim.token
        assert bench.store.complete_sync(claim, b"result")
        assert bench.committed() in (["cup"], ["cup", "tea"])


@contextmanager
def locked(bench: Bench, claim: Claim) -> Iterator[None]:
    """Hold the row of a record in a transaction of another connection."""
    engine = create_engine(bench.direct, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        table = bench.store._table.name
        hit = connection.execute(text(f"UPDATE {table} SET attempt = attempt WHERE token = :t"), {"t": claim.token})
        assert hit.rowcount == 1
        yield
        connection.rollback()


VERBS: dict[str, Callable[[SQLStore, Claim], Any]] = {
    "claim": lambda store, claim: store.claim(claim),
    "renew": lambda store, claim: store.renew(claim),
    "complete": lambda store, claim: store.complete(claim, b"r"),
    "release": lambda store, claim: store.release(claim),
    "forget": lambda store, claim: store.forget(claim.id),
    "resolve": lambda store, claim: store.resolve(claim.id, "done"),
}


@pytest.mark.parametrize(
    ("driver", "verb"),
    [*((driver, "claim") for driver in ASYNC), *((driver, verb) for verb in VERBS for driver in ASYNC[::3])],
)
async def test_a_verb_that_waits_for_a_lock_ends_in_the_server_too(url: str, verb: str) -> None:
    """Retries of a locked row leave no statement waiting in the server, and lose no connection."""
    async with opened(url, size=4) as bench:
        claim = new_claim(hold=verb == "resolve", lease=0.001 if verb in ("resolve", "forget") else 30)
        await bench.store.claim(claim)
        backends = set[Any]()
        event.listen(bench.engine.sync_engine, "connect", lambda driver, _: backends.add(id(driver)))
        with locked(bench, claim):
            for _ in range(2):
                assert await took(lambda: VERBS[verb](bench.store, claim)) < TIMEOUT + SLACK
                assert bench.server.statements() == 0
        assert len(backends) <= 1
        assert bench.engine.pool.checkedout() == 0


@pytest.mark.parametrize("driver", SYNC)
def test_a_blocking_verb_that_waits_for_a_lock_ends_in_the_server_too(url: str) -> None:
    """So it is for the blocking verbs."""
    with opened_sync(url) as bench:
        claim = new_claim()
        bench.store.claim_sync(claim)
        with locked(bench, claim):
            for _ in range(2):
                with pytest.raises(StoreError):
                    bench.store.complete_sync(claim, b"r")
                assert bench.server.statements() == 0


@pytest.mark.parametrize("driver", ASYNC)
async def test_a_commit_that_waits_for_a_lock_ends_in_the_server_too(url: str) -> None:
    """The completion inside a session, which another transaction holds up, leaves nothing waiting in the server."""
    async with opened(url, size=2) as bench:
        claim = new_claim()
        await bench.store.claim(claim)
        with locked(bench, claim):
            async with bench.sessions() as session:
                with pytest.raises(sqlalchemy.exc.DBAPIError):
                    await bench.store.complete_in(session, claim, b"r")
                assert bench.server.statements() == 0


@pytest.mark.parametrize("driver", ASYNC)
async def test_a_connection_in_a_transaction_is_not_used(url: str) -> None:
    """What somebody left open in the pool is not committed with a verb, and the verb not lost in it."""
    async with opened(url) as bench:
        engine = create_async_engine(bench.engine.url, pool_size=1, max_overflow=0, pool_reset_on_return=None)
        store = SQLStore(engine, table=bench.store._table.name, timeout=TIMEOUT)
        connection = await engine.connect()
        driver = (await connection.get_raw_connection()).driver_connection
        await connection.execute(bench.insert("half"))
        await connection.run_sync(lambda sync: sync._dbapi_connection.close())  # as a pool is given one back unended
        assert driver is not None

        claim = new_claim()
        await store.claim(claim)

        assert bench.seen(claim) == 1
        assert bench.committed() == []
        await engine.dispose()


async def test_a_pool_that_always_gives_open_transactions_is_refused_clearly(local_postgres_url: str) -> None:
    """A listener that leaves a transaction open at each checkout is named, and nothing is claimed."""
    async with opened(local_postgres_url) as bench:

        @event.listens_for(bench.engine.sync_engine, "checkout")
        def look(driver: Any, *_: Any) -> None:
            driver.cursor().execute("SELECT 1")

        claim = new_claim()
        with pytest.raises(
            StoreError, match="transaction open: event listeners for connect and checkout must end theirs"
        ):
            await bench.store.claim(claim)
        assert bench.seen(claim) == 0


@pytest.mark.parametrize("driver", ASYNC)
async def test_a_commit_that_fails_behind_a_cancellation_is_heard_of(url: str) -> None:
    """No exception of a commit is left for nobody: its task has an owner that reads it."""
    async with opened(url) as bench:
        loop = asyncio.get_running_loop()
        reported = list[Any]()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        frozen = asyncio.Event()

        @idempotent(bench.store, key=lambda what: what, session=bench.sessions)
        async def order(what: str, session: Any) -> str:
            await session.execute(bench.insert(what))
            bench.proxy.pause()
            loop.call_soon(frozen.set)
            return what

        task = loop.create_task(order("tea"))
        await frozen.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        bench.proxy.cut()
        with pytest.raises((asyncio.CancelledError, StoreError)):
            await task
        del task
        await bench.store.abandoned.wait()
        gc.collect()
        await asyncio.sleep(0)
        assert reported == []


@pytest.mark.parametrize("driver", ASYNC)
def test_an_event_loop_that_ends_leaves_nothing_of_what_was_given_up(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A process ends at once while nothing is answered, without a warning, and the server has nothing open."""
    reported = list[Any]()

    async def main(bench: Bench) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        @idempotent(bench.store, key=lambda what: what, session=bench.sessions)
        async def order(what: str, session: Any) -> str:
            await session.execute(bench.insert(what))
            bench.proxy.pause()
            return what

        with pytest.raises(StoreError):
            await order("tea")
        with pytest.raises(StoreError):
            await bench.store.claim(new_claim())

    with _prepared(url) as (proxy, proxied, name):
        engine = create_async_engine(proxied, pool_size=2, max_overflow=0)
        store = SQLStore(engine, table=name, timeout=TIMEOUT)
        server = ServerSide(url)
        bench = Bench(store, engine, async_sessionmaker(engine), proxy, server, _direct(url), f"{name}_effects")
        since = monotonic()
        asyncio.run(main(bench))
        assert monotonic() - since < 2 * TIMEOUT + SLACK
        del bench, store, engine
        gc.collect()
        proxy.resume()
        assert asyncio.run(server.quiet(10))
    assert reported == []
    assert [record for record in caplog.records if record.name != "asyncio" or "proxy" not in record.getMessage()] == []

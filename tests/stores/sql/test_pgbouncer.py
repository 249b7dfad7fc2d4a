"""The SQL store behind a real PgBouncer: few connections to PostgreSQL, and the next transaction is on another one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import AsyncAdaptedQueuePool, ExceptionContext, NullPool, Pool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idempotency import ConfigurationError, IdempotencyMiddleware, Policy, drain, idempotent
from idempotency._rules import Execute, InProgress, Replay, judge
from idempotency._sagas.journal import Due
from idempotency.errors import StoreError
from idempotency.stores import open_store
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import Reply, call, respond
from tests.kit.saga_requests import entry, leave, looked_at, opening, owned, write
from tests.kit.servers import PgBouncerServer, Proxy, with_driver, with_port
from tests.kit.sql_store import new_claim, until

# As SQLAlchemy documents them.
SETTINGS: dict[str, dict[str, Any]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
    },
    "psycopg": {"prepare_threshold": None},
}
ASYNC = pytest.mark.parametrize("driver", list(SETTINGS))
KEYS = [f"key-{number}" for number in range(120)]


@pytest.fixture(scope="module")
def bouncer(postgres_url: str) -> Iterator[PgBouncerServer]:
    with PgBouncerServer(postgres_url) as server:
        yield server


class Shop:
    """Applications behind one PgBouncer, each with an engine of its own as in a process of its own."""

    def __init__(self, server: PgBouncerServer, driver: str, table: str) -> None:
        self.url = with_driver(server.url, f"postgresql+{driver}")
        self.driver = driver
        self.table = table
        self.errors: list[str] = []
        self.runs: Counter[str] = Counter()
        self.engines: list[AsyncEngine] = []
        self.stores: list[SQLStore] = []

    def note(self, failed: ExceptionContext) -> None:
        self.errors.append(str(failed.sqlalchemy_exception))

    def open(self) -> SQLStore:
        engine = create_async_engine(self.url, poolclass=NullPool, connect_args=SETTINGS[self.driver])
        event.listen(engine.sync_engine, "handle_error", self.note)
        self.engines.append(engine)
        self.stores.append(SQLStore(engine, table=self.table, timeout=30))
        return self.stores[-1]

    async def create(self) -> None:
        await asyncio.gather(*(self.open().create_schema() for _ in range(4)))
        await self.execute(f"CREATE TABLE {self.table}_effects (what VARCHAR(50))")

    async def execute(self, statement: str) -> Any:
        async with self.engines[0].begin() as connection:
            return await connection.execute(text(statement))

    async def effects(self) -> Counter[str]:
        rows = await self.execute(f"SELECT what FROM {self.table}_effects")
        return Counter(rows.scalars())

    async def close(self) -> None:
        for store, engine in zip(self.stores, self.engines, strict=True):
            await store.aclose()
            await engine.dispose()

    def serve(self, mode: str) -> list[Callable[[str], Any]]:
        """Return a function for each application, which has the effect of a key once, and answers."""
        make = {"leased": self._leased, "transactional": self._transactional, "joined": self._joined}[mode]
        return [make(store, engine) for store, engine in zip(self.stores, self.engines, strict=True)]

    def _leased(self, store: SQLStore, _: AsyncEngine) -> Callable[[str], Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.runs[scope["state"]["idempotency"].key] += 1
            await respond(send)

        return posting(IdempotencyMiddleware(app, store=store, scope=None))

    def _transactional(self, store: SQLStore, engine: AsyncEngine) -> Callable[[str], Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            operation = scope["state"]["idempotency"]
            await operation.session.execute(self.insert(operation.key))
            await respond(send)

        return posting(IdempotencyMiddleware(app, store=store, session=async_sessionmaker(engine), scope=None))

    def _joined(self, store: SQLStore, engine: AsyncEngine) -> Callable[[str], Any]:
        @idempotent(store, key=lambda what: what, session=async_sessionmaker(engine), name="order")
        async def order(what: str, *, session: AsyncSession) -> int:
            await session.execute(self.insert(what))
            return 201

        async def run(key: str) -> int:
            return await order(key)

        return run

    def insert(self, what: str) -> Any:
        return text(f"INSERT INTO {self.table}_effects VALUES (:what)").bindparams(what=what)


def posting(app: Any) -> Callable[[str], Any]:
    async def post(key: str) -> int:
        return (await call(app, key=key)).status

    return post


@pytest.fixture
async def shop(bouncer: PgBouncerServer, driver: str, table: str) -> AsyncIterator[Shop]:
    shop = Shop(bouncer, driver, table)
    await shop.create()
    yield shop
    await shop.close()


@ASYNC
@pytest.mark.parametrize("mode", ["leased", "transactional", "joined"])
async def test_120_operations_at_once(shop: Shop, mode: str) -> None:
    """Of 120 operations at once all succeed, without a statement that fails, and their repeats are replays."""
    served = shop.serve(mode)

    answers = await asyncio.gather(*(served[number % 4](key) for number, key in enumerate(KEYS)))
    repeats = await asyncio.gather(*(served[number % 3](key) for number, key in enumerate(KEYS)))

    assert Counter(answers) == Counter(repeats) == {201: 120}
    assert (shop.runs if mode == "leased" else await shop.effects()) == Counter(KEYS)
    assert shop.errors == []


@ASYNC
async def test_duplicates_that_wait_get_the_answer(shop: Shop) -> None:
    """Through a pooler nothing listens, and a duplicate that waits finds its answer by polling."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await go.wait()
        await respond(send, body=b"once")

    apps = [IdempotencyMiddleware(app, store=store, scope=None, policy=Policy(wait=10)) for store in shop.stores]
    first = asyncio.create_task(call(apps[0], key="key"))
    await begun.wait()
    duplicates = [asyncio.create_task(call(apps[number], key="key")) for number in (1, 2, 3)]
    (watchers,) = [side.watchers for side in shop.stores[1]._per_loop.values()]

    async def one_waits() -> bool:
        return bool(watchers._waiting)

    await until(one_waits)
    listener = watchers._listener
    go.set()

    answers: list[Reply] = await asyncio.gather(first, *duplicates)

    assert [(answer.status, answer.body, answer.replayed) for answer in answers] == [
        (201, b"once", False),
        *[(201, b"once", True)] * 3,
    ]
    assert listener is None
    assert shop.errors == []


@ASYNC
async def test_a_statement_that_waits_is_abandoned(shop: Shop) -> None:
    """A claim that waits for a lock for too long fails in time, is not applied later, and blocks no connection."""
    store = SQLStore(shop.engines[0], table=shop.table, timeout=0.5)
    async with shop.engines[1].begin() as connection:
        await connection.execute(text(f"LOCK TABLE {shop.table}"))
        begun = time.monotonic()
        with pytest.raises(StoreError):
            await store.claim(new_claim())
        took = time.monotonic() - begun
    await store.aclose()

    claims = [new_claim() for _ in range(6)]
    records = await asyncio.gather(*(shop.stores[0].claim(claim) for claim in claims))

    assert took < 10
    verdicts = [type(judge(claim, record)) for claim, record in zip(claims, records, strict=True)]
    assert Counter(verdicts) == {Execute: 1, InProgress: 5}


@ASYNC
async def test_nothing_of_a_session_is_set(shop: Shop, bouncer: PgBouncerServer) -> None:
    """No connection of PgBouncer keeps a setting that a verb made."""
    served = shop.serve("joined") + shop.serve("leased")
    await asyncio.gather(*(each(f"setting-{number}") for number, each in enumerate(served)))

    async def limit() -> tuple[int, str]:
        async with shop.engines[0].begin() as connection:
            row = (await connection.execute(text("SELECT pg_backend_pid(), current_setting('lock_timeout')"))).one()
            await connection.execute(text("SELECT pg_sleep(0.05)"))
            return row[0], row[1]

    limits = dict(await asyncio.gather(limit(), limit(), limit()))

    assert len(limits) == 3
    assert set(limits.values()) == {"0"}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
async def test_threads(bouncer: PgBouncerServer, driver: str, table: str) -> None:
    """Blocking verbs, and joined calls in threads, of each driver."""
    url = with_driver(bouncer.url, f"postgresql+{driver}")
    engine = create_engine(url, connect_args=SETTINGS.get(driver, {}))
    errors: list[Any] = []
    event.listen(engine, "handle_error", lambda context: errors.append(context.sqlalchemy_exception))
    store = SQLStore(engine, table=table)
    store.create_schema_sync()
    runs: Counter[str] = Counter()

    @idempotent(store, key=lambda what: what, session=sessionmaker(engine))
    def joined(what: str, *, session: Session) -> str:
        runs[what] += session.connection().scalar(text("SELECT 1")) or 0
        return what

    @idempotent(store, key=lambda what: what)
    def leased(what: str) -> str:
        runs[what] += 1
        return what

    keys = KEYS[:20]
    with ThreadPoolExecutor(8) as threads:
        for order in (joined, leased):
            for _ in range(2):
                assert list(threads.map(order, keys)) == keys
    engine.dispose()

    assert runs == Counter(2 * keys)
    assert errors == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg2", "pg8000"])
@pytest.mark.parametrize("form", ["url", "option"])
async def test_a_store_opened_by_its_url(bouncer: PgBouncerServer, driver: str, form: str, table: str) -> None:
    """With ``pooler`` in its URL or as an option, a store opens an engine that prepares nothing for later."""
    url = with_driver(bouncer.url, f"postgresql+{driver}")
    stores: list[Any] = [
        open_store(f"{url}?pooler=true", table=table) if form == "url" else open_store(url, table=table, pooler=True)
        for _ in range(2)
    ]
    claims = [new_claim(key) for key in KEYS]

    if driver in SETTINGS:
        await stores[0].create_schema()
        for store in stores:
            await asyncio.gather(*(store.claim(claim) for claim in claims))
        for store in stores:
            await store.aclose()
    else:
        await asyncio.to_thread(stores[0].create_schema_sync)
        with ThreadPoolExecutor(4) as threads:
            for store in stores:
                list(threads.map(store.claim_sync, claims))
                store.close()

    prepared = f"SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%{table}%'"
    with psycopg.connect(with_driver(bouncer.url, "postgresql"), prepare_threshold=None) as connection:
        (count,) = connection.execute(f"SELECT count(*), ({prepared}) FROM {table}").fetchall()

    assert count == (120, 0)


def test_a_pooler_that_makes_no_sense() -> None:
    """The option is a boolean, and for PostgreSQL only."""
    for url, options in (
        ("postgresql+asyncpg://host/db?pooler=maybe", {}),
        ("postgresql+asyncpg://host/db", {"pooler": "transaction"}),
        ("sqlite+aiosqlite:///db", {"pooler": True}),
        ("mysql+aiomysql://host/db?pooler=true", {}),
    ):
        with pytest.raises(ConfigurationError, match="pooler"):
            open_store(url, **options)


@ASYNC
@pytest.mark.parametrize("mode", ["leased", "transactional", "joined"])
async def test_pgbouncer_is_killed_in_mid_flight(postgres_url: str, driver: str, mode: str, table: str) -> None:
    """PgBouncer dies while operations run: after its restart each has, by retries, one effect and one answer."""
    keys = KEYS[:40]
    with PgBouncerServer(postgres_url) as bouncer:
        shop = Shop(bouncer, driver, table)
        await shop.create()
        served = shop.serve(mode)

        async def until_answered(number: int, key: str) -> int:
            async with asyncio.timeout(60):
                while True:
                    try:
                        status: int = await served[number % 4](key)
                    except (StoreError, DBAPIError, OSError):  # the handler's own statement may fail too
                        status = 503
                    if status == 201:
                        return status
                    await asyncio.sleep(0.1)

        running = [asyncio.create_task(until_answered(number, key)) for number, key in enumerate(keys)]
        while not any(task.done() for task in running):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(bouncer.kill)
        await asyncio.to_thread(bouncer.start)
        answers = await asyncio.gather(*running)
        await drain()

        assert Counter(answers) == {201: 40}
        assert (shop.runs if mode == "leased" else await shop.effects()) == Counter(keys)
        assert shop.errors != []
        await shop.close()


@ASYNC
@pytest.mark.parametrize("pool", [AsyncAdaptedQueuePool, NullPool])
async def test_a_pooler_that_is_put_in_later(
    bouncer: PgBouncerServer, postgres_url: str, driver: str, pool: type[Pool], table: str
) -> None:
    """A process that goes on while PgBouncer is put in has no failure, and its duplicates that wait poll."""
    with Proxy(make_url(postgres_url).port or 5432) as proxy:
        url = with_driver(with_port(postgres_url, proxy.port), f"postgresql+{driver}")
        engine = create_async_engine(url, poolclass=pool, connect_args=SETTINGS[driver])
        store = SQLStore(engine, table=table)
        await store.create_schema()
        async with store.watch(new_claim()):
            proxy.aim(bouncer.port)
            await asyncio.gather(*(store.claim(new_claim(key)) for key in KEYS))
            async with store.watch(new_claim()) as changed, asyncio.timeout(20):
                for _ in range(5):
                    await changed(60)
        await store.aclose()
        await engine.dispose()


@ASYNC
async def test_statement_mode_is_refused(postgres_url: str, driver: str, table: str) -> None:
    """A PgBouncer in statement mode is named with what to set: it has no transactions."""
    with PgBouncerServer(postgres_url, pool_mode="statement") as server:
        shop = Shop(server, driver, table)
        with pytest.raises(StoreError, match="pool_mode = transaction"):
            await shop.open().claim(new_claim())
        await shop.close()


@pytest.mark.usefixtures("notified_only")
@ASYNC
async def test_session_mode(postgres_url: str, driver: str, table: str) -> None:
    """In session mode a store works as without a pooler; with ``pooler=False``, its watchers are notified."""
    with PgBouncerServer(postgres_url, pool_mode="session", default_pool_size="20") as server:
        engine = create_async_engine(with_driver(server.url, f"postgresql+{driver}"))
        store = SQLStore(engine, table=table, pooler=False)
        await store.create_schema()
        mine = new_claim()
        await store.claim(mine)
        async with store.watch(mine) as changed:
            await store.claim(new_claim(watched=True))
            await asyncio.sleep(0.1)
            await changed(0)
            waiting = asyncio.create_task(changed(60))
            await store.complete(mine, b"done")
            async with asyncio.timeout(20):
                await waiting
        replay = judge(new_claim(), await store.claim(new_claim()))
        await store.aclose()
        await engine.dispose()

    assert replay == Replay(b"done")


@pytest.mark.parametrize(
    ("driver", "settings"),
    [("asyncpg", {"prepared_statement_name_func": lambda: "same"}), ("psycopg", {"prepare_threshold": 0})],
)
async def test_forgotten_settings_are_named(
    postgres_url: str, driver: str, settings: dict[str, Any], table: str
) -> None:
    """Where two clients have a prepared statement of one name, the error names the settings of the driver."""
    with PgBouncerServer(postgres_url, default_pool_size="1") as server:
        engine = create_async_engine(
            with_driver(server.url, f"postgresql+{driver}"), poolclass=NullPool, connect_args=settings
        )
        store = SQLStore(engine, table=table)
        with pytest.raises(StoreError, match=r"statement_cache_size=0.*prepare_threshold=None.*\?pooler=true"):
            await asyncio.gather(*(store.create_schema() for _ in range(3)))
        await store.aclose()
        await engine.dispose()


@pytest.mark.parametrize(
    ("driver", "settings"),
    [("asyncpg", {"server_settings": {"jit": "off"}}), ("psycopg", {"options": "-c jit=off"})],
)
async def test_a_startup_parameter_that_is_refused(
    bouncer: PgBouncerServer, driver: str, settings: dict[str, Any], table: str
) -> None:
    """A parameter of the connection that PgBouncer does not know is named as what to remove."""
    engine = create_async_engine(with_driver(bouncer.url, f"postgresql+{driver}"), connect_args=settings)
    store = SQLStore(engine, table=table)
    with pytest.raises(StoreError, match="ignore_startup_parameters"):
        await store.claim(new_claim())
    await store.aclose()
    await engine.dispose()


@ASYNC
@pytest.mark.parametrize("limit", ["max_client_conn", "query_wait_timeout"])
async def test_a_pgbouncer_that_is_full_is_named(postgres_url: str, driver: str, limit: str, table: str) -> None:
    """Where PgBouncer has no room for another client, the error says so: the server need not be started."""
    with PgBouncerServer(postgres_url, **{"default_pool_size": "1", limit: "1"}) as server:
        shop = Shop(server, driver, table)
        store = shop.open()
        async with shop.engines[0].begin() as connection:
            await connection.execute(text("SELECT 1"))
            with pytest.raises(StoreError, match=f"{limit}.*enlarge"):
                await store.claim(new_claim())
        await shop.close()


@ASYNC
async def test_doctor_sees_the_pooler(shop: Shop, postgres_url: str) -> None:
    """Doctor notes that a pooler is in between, and only then."""
    direct = create_async_engine(with_driver(postgres_url, f"postgresql+{shop.driver}"))
    beside = SQLStore(direct, table=shop.table)

    found = [await store.examine() for store in (shop.stores[0], beside)]
    noted = [[finding.level for finding in findings if "pooler" in finding.what] for findings in found]
    await beside.aclose()
    await direct.dispose()

    assert noted == [["note"], []]


@ASYNC
async def test_sagas_by_any_connection(shop: Shop) -> None:
    """Each request, and a step in the transaction of its effect, is one transaction: none fails or is lost."""
    await shop.stores[0].create_saga_schema()
    keys = KEYS[:40]

    async def run(store: SQLStore, engine: AsyncEngine, key: str) -> None:
        await owned(store, owner := opening(key=key))
        await store.journal(write(owner, entry("begun")))
        async with AsyncSession(engine) as session:
            await session.execute(shop.insert(key))
            await store.journal_in(session, write(owner, entry("step")))
            await session.commit()
        assert await store.journal(leave(owner, due=0.0))

    sides = list(zip(shop.stores, shop.engines, strict=True))
    await asyncio.gather(*(run(*sides[number % 4], key) for number, key in enumerate(keys)))

    due = await shop.stores[1].journal(Due(names=["trip"]))
    sagas = [await looked_at(shop.stores[2], row.id) for row in due]
    assert Counter(saga.row.key for saga in sagas) == await shop.effects() == Counter(keys)
    assert all({each.name for each in saga.entries} == {"begun", "step"} for saga in sagas)
    assert shop.errors == []

"""Whatever a handler does first, or ends by a text or a cursor: its effect is in the transaction, or it is refused."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from idempotency import ConfigurationError, Policy
from idempotency.errors import TransactionError
from tests.http.test_transactional import INSERT_A_CUP, Order, Shop, first_answer, open_shop
from tests.kit.servers import MariaDBServer
from tests.kit.targets import Target

EVERY = pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy", "sqlite")
pytestmark = EVERY


@pytest.fixture
async def shop(target: Target) -> AsyncIterator[Shop]:
    async with open_shop(target, target.url) as shop:
        yield shop


async def tell_the_driver(session: AsyncSession, *statements: str) -> None:
    """Execute statements past SQLAlchemy, as its users do for what it does not know."""
    raw: Any = await (await session.connection()).get_raw_connection()
    for statement in statements:
        if raw.dbapi_connection.dbapi.__class__.__name__.endswith(("aiomysql_dbapi", "asyncmy_dbapi")):
            async with raw.driver_connection.cursor() as cursor:
                await cursor.execute(statement)
        else:
            await raw.driver_connection.execute(statement)


async def in_a_savepoint(session: AsyncSession) -> None:
    async with session.begin_nested():
        session.add(Order(item="tea"))


async def in_savepoints_of_which_one_fails(session: AsyncSession) -> None:
    async with session.begin_nested():
        with suppress(ValueError):
            async with session.begin_nested():
                session.add(Order(item="milk"))
                await session.flush()
                raise ValueError
        session.add(Order(item="tea"))


async def in_a_savepoint_behind_a_read(session: AsyncSession) -> None:
    await session.execute(select(Order))
    await in_a_savepoint(session)


async def in_a_savepoint_by_text(session: AsyncSession) -> None:
    for statement in ("SAVEPOINT mine", "INSERT INTO orders VALUES ('tea')", "RELEASE SAVEPOINT mine"):
        await session.execute(text(statement))


async def of_several_rows(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO orders VALUES (:item)"), [{"item": "tea"}])


async def by_the_driver(session: AsyncSession) -> None:
    await tell_the_driver(session, "INSERT INTO orders VALUES ('tea')")


async def by_the_driver_in_a_savepoint(session: AsyncSession) -> None:
    await tell_the_driver(session, "SAVEPOINT mine", "INSERT INTO orders VALUES ('tea')", "RELEASE SAVEPOINT mine")


EFFECTS = [
    in_a_savepoint,
    in_savepoints_of_which_one_fails,
    in_a_savepoint_behind_a_read,
    in_a_savepoint_by_text,
    of_several_rows,
    by_the_driver,
    by_the_driver_in_a_savepoint,
]


async def check_that_it_is_undone(shop: Shop, effect: Any) -> None:
    failing = [True, False]

    async def handle(session: AsyncSession) -> None:
        await effect(session)
        if failing.pop(0):
            raise ValueError

    shop.serve(handle, Policy(lease=5))

    assert isinstance(await shop.raised("k"), ValueError)
    assert await shop.orders() == []
    assert await first_answer(shop, "k") == 201
    assert await shop.orders() == ["tea"]


@pytest.mark.parametrize("effect", EFFECTS)
async def test_what_a_handler_does_first_is_undone_with_the_rest(shop: Shop, effect: Any) -> None:
    """An effect that is the session's first statement is rolled back when the handler fails, and there once after."""
    await check_that_it_is_undone(shop, effect)


async def by_an_expression(session: AsyncSession) -> None:
    await session.execute(text("WITH new(item) AS (SELECT 'tea') INSERT INTO orders SELECT item FROM new"))


async def in_a_new_table(session: AsyncSession) -> None:
    await session.execute(text("CREATE TABLE teas (item VARCHAR(40))"))
    await session.execute(text("DROP TABLE teas"))
    await session.execute(text("CREATE UNIQUE INDEX one_each ON orders (item)"))
    await session.execute(text("INSERT INTO orders VALUES ('tea')"))


async def in_a_new_table_by_the_driver(session: AsyncSession) -> None:
    await tell_the_driver(session, "CREATE UNIQUE INDEX one_each ON orders (item)", "INSERT INTO orders VALUES ('tea')")


@pytest.mark.stores("postgres", "postgres_psycopg", "sqlite")
@pytest.mark.parametrize("effect", [by_an_expression, in_a_new_table, in_a_new_table_by_the_driver])
async def test_what_a_handler_defines_first_is_undone_with_the_rest(shop: Shop, effect: Any) -> None:
    """So is an effect that is a definition, or begins with an expression."""
    await check_that_it_is_undone(shop, effect)


async def in_the_header(session: AsyncSession) -> None:
    await session.execute(text("PRAGMA user_version = 7"))
    await session.execute(text("INSERT INTO orders SELECT 'tea' FROM pragma_user_version WHERE user_version = 7"))


async def behind_a_setting(session: AsyncSession) -> None:
    await session.execute(text("PRAGMA foreign_keys = ON"))
    assert (await session.execute(text("PRAGMA foreign_keys"))).scalar_one() == 1
    await in_a_savepoint(session)


async def behind_its_own_begin(session: AsyncSession) -> None:
    await session.execute(text("BEGIN IMMEDIATE"))
    await in_a_savepoint(session)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("effect", [in_the_header, behind_a_setting, behind_its_own_begin])
async def test_what_only_sqlite_knows_is_undone_with_the_rest(shop: Shop, effect: Any) -> None:
    """A PRAGMA that stores something is rolled back; a setting, and a BEGIN of the handler's, work as ever."""
    await check_that_it_is_undone(shop, effect)
    await shop.execute("PRAGMA user_version = 0")


def _leave_it_to_nobody(connection: Any, _: object) -> None:
    connection.isolation_level = None


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN")


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("effect", [in_a_savepoint, of_several_rows, by_the_driver])
async def test_a_driver_that_begins_nothing_has_it_begun(target: Target, effect: Any, begins: bool) -> None:
    """With isolation_level=None the transaction is begun here, unless the engine's own listener has done so."""
    async with open_shop(target, target.url) as shop:
        event.listen(shop.engine.sync_engine, "connect", _leave_it_to_nobody)
        if begins:
            event.listen(shop.engine.sync_engine, "begin", _begin)
        await shop.engine.dispose()

        await check_that_it_is_undone(shop, effect)


@pytest.mark.stores("sqlite")
async def test_a_read_takes_no_lock_and_no_snapshot(shop: Shop) -> None:
    """While a handler has only read, others write; and it may still write itself, whatever was committed since."""

    async def handle(session: AsyncSession) -> None:
        assert (await session.execute(select(Order))).all() == []
        await shop.execute("INSERT INTO orders VALUES ('cup')")
        session.add(Order(item="tea"))

    shop.serve(handle, Policy(lease=5))

    assert await shop.raised("k") is None
    assert sorted(await shop.orders()) == ["cup", "tea"]


@pytest.mark.parametrize("words", ["COMMIT", "commit work", "/* all of it */ COMMIT"])
async def test_a_text_that_commits_is_refused(shop: Shop, words: str) -> None:
    """It is not sent: the effect is rolled back, and nothing is recorded."""

    async def handle(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)
        await session.execute(text(words))

    shop.serve(handle, Policy(lease=5))

    for _ in range(2):
        assert isinstance(await shop.raised("k"), TransactionError)
        assert await shop.orders() == []


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy")
async def test_a_text_that_commits_among_others_is_refused(shop: Shop) -> None:
    """Some drivers send several statements in one text: none of them is sent, first in the session or not."""

    async def handle(session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO orders VALUES ('tea;'); COMMIT; INSERT INTO orders VALUES ('pot')"))

    shop.serve(handle, Policy(lease=5))

    assert isinstance(await shop.raised("k"), TransactionError)
    assert await shop.orders() == []


@pytest.mark.stores("postgres_psycopg", "mariadb")
async def test_a_semicolon_ends_nothing_by_itself(shop: Shop) -> None:
    """Neither in a quote, a comment, or a body, nor between statements that commit nothing."""
    words = ["INSERT INTO orders VALUES ('; COMMIT')", "INSERT INTO orders VALUES ('tea'); SELECT 1; /* ; COMMIT */"]
    if shop.engine.dialect.name == "postgresql":
        words.append("DO $$ BEGIN INSERT INTO orders VALUES ('pot'); END; $$")
        words.append("CREATE FUNCTION pg_temp.one() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END")

    async def handle(session: AsyncSession) -> None:
        for each in words:
            await session.execute(text(each))

    shop.serve(handle, Policy(lease=5))

    assert await shop.raised("k") is None
    assert {"; COMMIT", "tea"} <= set(await shop.orders())


@pytest.mark.stores("mariadb", "mariadb_asyncmy")
@pytest.mark.parametrize(
    "words",
    [
        "/*! COMMIT */",
        "/*M!100100 COMMIT */",
        "# all of it\nCOMMIT",
        "/*!50001 CREATE TABLE never_there (item INT) */",
        "SET STATEMENT max_statement_time = 5 FOR CREATE TABLE never_there (item INT)",
        "SET @mine = 1, autocommit = 1",
        "ANALYZE TABLE orders",
        "CHECK TABLE orders",
    ],
)
async def test_what_mariadb_executes_in_other_words_is_refused(shop: Shop, words: str) -> None:
    """What commits is refused also where it stands in a comment that is executed, or behind something else."""
    await test_what_mariadb_commits_by_itself_is_refused(shop, words, False)


@pytest.mark.stores("mariadb", "mariadb_asyncmy")
@pytest.mark.parametrize(
    "words", ["CREATE TABLE never_there (item INT)", "START TRANSACTION", "TRUNCATE TABLE orders", "SET autocommit = 1"]
)
@pytest.mark.parametrize("first", [True, False])
async def test_what_mariadb_commits_by_itself_is_refused(shop: Shop, words: str, first: bool) -> None:
    """Neither as the first statement nor behind another is it sent; what concerns a temporary table is."""

    async def handle(session: AsyncSession) -> None:
        await session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS mine (item INT)"))
        if not first:
            await session.execute(INSERT_A_CUP)
        await session.execute(text(words))

    shop.serve(handle, Policy(lease=5))

    assert isinstance(await shop.raised("k"), TransactionError)
    assert await shop.orders() == []
    with pytest.raises(sqlalchemy.exc.ProgrammingError):
        await shop.execute("SELECT * FROM never_there")


async def by_a_text(session: AsyncSession) -> None:
    await session.execute(text("ROLLBACK"))


async def by_a_cursor(session: AsyncSession) -> None:
    await session.execute(text("SELECT item FROM orders"))
    await tell_the_driver(session, "ROLLBACK")


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "sqlite")
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("end", [by_a_text, by_a_cursor])
async def test_a_transaction_that_was_ended_past_its_session_is_refused(shop: Shop, end: Any, goes_on: bool) -> None:
    """What came before is gone, so that what comes after is not committed alone, and nothing is recorded."""

    async def handle(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)
        await end(session)
        if goes_on:
            await session.execute(text("INSERT INTO orders VALUES ('tea')"))

    shop.serve(handle, Policy(lease=5))

    for _ in range(2):
        assert isinstance(await shop.raised("k"), TransactionError)
        assert await shop.orders() == []


async def by_a_cursor_first(session: AsyncSession) -> None:
    await tell_the_driver(session, "INSERT INTO orders VALUES ('tea')", "COMMIT")


async def by_a_cursor_behind_a_read(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await by_a_cursor_first(session)


async def by_the_drivers_connection(session: AsyncSession) -> None:
    def commit(connection: Any) -> None:
        cursor = connection.connection.cursor()
        cursor.execute("INSERT INTO orders VALUES ('tea')")
        connection.connection.commit()

    await (await session.connection()).run_sync(commit)


@pytest.mark.stores("postgres", "postgres_psycopg", "sqlite")
@pytest.mark.parametrize("end", [by_a_cursor_first, by_a_cursor_behind_a_read, by_the_drivers_connection])
async def test_a_commit_past_a_session_that_has_done_nothing_is_no_success(shop: Shop, end: Any) -> None:
    """What the driver has committed stays, and nothing is recorded with what comes after."""

    async def handle(session: AsyncSession) -> None:
        await end(session)

    shop.serve(handle, Policy(lease=5))

    assert isinstance(await shop.raised("k"), TransactionError)
    assert await shop.orders() == ["tea"]


@pytest.mark.stores("sqlite")
async def test_a_constraint_that_rolls_back_is_no_success(shop: Shop) -> None:
    """A handler that swallows its error goes on without its first effect: an error, and nothing is there."""

    async def handle(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)
        with suppress(sqlalchemy.exc.IntegrityError):
            await session.execute(text("INSERT OR ROLLBACK INTO orders VALUES ('cup')"))
        await session.execute(text("INSERT INTO orders VALUES ('tea')"))

    shop.serve(handle, Policy(lease=5))

    assert isinstance(await shop.raised("k"), TransactionError)
    assert await shop.orders() == []


@pytest.mark.stores("mariadb", "mariadb_asyncmy")
async def test_a_deadlock_that_is_swallowed_is_no_success(shop: Shop) -> None:
    """The server has rolled back all of the transaction, so that nothing of what follows is committed."""
    await shop.execute("INSERT INTO orders VALUES ('one'), ('other')")
    waits = text("SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
    locks = [text(f"SELECT item FROM orders WHERE item = '{item}' FOR UPDATE") for item in ("one", "other")]

    async def handle(session: AsyncSession) -> None:
        await session.execute(INSERT_A_CUP)
        await session.execute(locks[0])
        async with shop.engine.connect() as other, shop.engine.connect() as watcher:
            # It has changed more, so that it is not the one that is rolled back.
            for number in range(9):
                await other.execute(text(f"INSERT INTO orders VALUES ('{number}')"))
            await other.execute(locks[1])
            waiting = asyncio.ensure_future(other.execute(locks[0]))
            while not (await watcher.execute(waits)).scalar_one():
                await asyncio.sleep(0.15)
            with pytest.raises(sqlalchemy.exc.OperationalError, match="1213"):
                await session.execute(locks[1])
            await waiting
        await session.execute(text("INSERT INTO orders VALUES ('tea')"))

    shop.serve(handle, Policy(lease=20))

    assert isinstance(await shop.raised("k"), TransactionError)
    assert sorted(await shop.orders()) == ["one", "other"]


@pytest.mark.stores("mariadb")
@pytest.mark.parametrize(("setting", "goes_on"), [("ON", False), ("OFF", True)])
async def test_a_lock_timeout_that_is_swallowed_is_no_success_where_it_rolls_back(setting: str, goes_on: bool) -> None:
    """With innodb_rollback_on_timeout the server has rolled back all of the transaction, else the statement alone."""

    async def handle(session: AsyncSession) -> None:
        await session.execute(text("SET innodb_lock_wait_timeout = 1"))
        await session.execute(INSERT_A_CUP)
        with suppress(sqlalchemy.exc.OperationalError):
            await session.execute(text("UPDATE stock SET item = 1"))
        await session.execute(text("INSERT INTO orders VALUES ('tea')"))

    with MariaDBServer(innodb_rollback_on_timeout=setting) as server:
        async with open_shop(Target.of("mariadb", server.url), server.url) as shop:
            shop.serve(handle, Policy(lease=20))
            await shop.execute("CREATE TABLE stock (item INT PRIMARY KEY)", "INSERT INTO stock VALUES (1)")
            async with shop.engine.connect() as other:
                await other.execute(text("SELECT item FROM stock FOR UPDATE"))
                failure = await shop.raised("k")

            assert isinstance(failure, TransactionError) is not goes_on
            assert sorted(await shop.orders()) == (["cup", "tea"] if goes_on else [])


class _CommitsByItself(sqlite3.Connection):
    autocommit = True


def _commit_by_itself(connection: Any, *_: object) -> None:
    connection.autocommit = True


@pytest.mark.stores("postgres", "postgres_psycopg", "mariadb", "mariadb_asyncmy", "sqlite")
async def test_a_driver_that_commits_by_itself_is_refused(target: Target) -> None:
    """Whatever has set it, no statement is sent: neither an effect nor a record is there."""
    async with open_shop(target, target.url) as shop:
        engine = shop.engine.sync_engine
        if target.kind == "sqlite":
            event.listen(engine, "do_connect", lambda d, r, a, options: options.update(factory=_CommitsByItself))
        elif target.kind.startswith("mariadb"):
            event.listen(engine, "checkout", lambda connection, *_: connection.autocommit(True))
        else:
            event.listen(engine, "checkout", _commit_by_itself)
        await shop.engine.dispose()

        async def handle(session: AsyncSession) -> None:
            await session.execute(INSERT_A_CUP)

        shop.serve(handle, Policy(lease=5))

        assert isinstance(await shop.raised("k"), ConfigurationError)
        assert await shop.orders() == []

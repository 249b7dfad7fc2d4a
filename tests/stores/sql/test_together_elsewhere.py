"""Calls that are sent together get what they get alone: on other settings, other engines and other tables."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import psycopg
import pytest
from sqlalchemy import NullPool, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotency._rules import Claim, Record, State
from idempotency._sql.bounded import InFlight
from idempotency.errors import StoreError
from idempotency.stores.encryption import Encryption
from idempotency.stores.sql import SQLStore
from idempotency.stores.sql._database import Database
from tests.kit.servers import PgBouncerServer, with_driver, with_port
from tests.kit.sql_store import POSTGRES, is_idle, new_claim
from tests.kit.tcp_proxy import Proxy

ON_EACH = pytest.mark.parametrize("driver", POSTGRES)
KEYS = 6


def described(answer: object, claim: Claim) -> str:
    """Describe an answer by what does not change from one run to the next."""
    if isinstance(answer, Record):
        owner = "mine" if answer.token == claim.token else "another's"
        return f"{answer.state.name} {owner} {answer.attempt} {answer.result!r} {answer.lease_left > 0}"
    return f"{type(answer).__name__} {answer}"


class Story:
    """What happens to the records of some keys, each step as calls of one moment, and the answers in order."""

    def __init__(self, store: SQLStore, name: str) -> None:
        self._store = store
        self._name = name
        self.answers: list[str] = []

    def claims(self, *keys: str, **options: Any) -> list[Claim]:
        return [new_claim(f"{self._name}-{key}", **options) for key in keys]

    async def step(self, verb: Callable[..., Awaitable[object]], claims: Sequence[Claim], *more: Sequence[Any]) -> None:
        found = await self._gather(*map(verb, claims, *more), return_exceptions=True)
        for claim, answer in zip(claims, found, strict=True):
            assert isinstance(answer, Record | bool | StoreError), repr(answer)
            key = claim.key.removeprefix(f"{self._name}-")
            self.answers.append(f"{verb.__name__} {key}: {described(answer, claim)}")

    async def play(self, gather: Any) -> list[str]:
        self._gather = gather
        names = [str(number) for number in range(KEYS)]
        claims, short = self.claims(*names, "bad"), self.claims("lapsed", lease=0.0) + self.claims("gone", ttl=0.001)
        store = self._store
        await self.step(store.claim, claims + short)
        results = [name.encode() * 3 for name in names]
        states = [State.UNKNOWN if name == "1" else State.DONE for name in names]
        # The last two run on.
        await self.step(store.complete, claims[: KEYS - 2], results[: KEYS - 2], states[: KEYS - 2])
        await self.step(store.complete, short[1:], [b"gone"])
        await self.step(store.complete, self.claims(*names), [b"by a stranger"] * KEYS)
        await asyncio.sleep(0.005)
        changed = self.claims("2", fingerprint=b"g" * 32)
        await self.step(store.claim, [*self.claims("gone", *names, "lapsed", "fresh"), *changed, claims[KEYS - 1]])
        await self.step(store.release, claims[KEYS - 1 :])
        await self.step(store.claim, self.claims(*names))
        return self.answers


async def assert_same(store: SQLStore) -> list[str]:
    """Check that calls of one moment have the answers that they have one after another, each alone."""
    flown: list[int] = []
    fetch = Database.fetch

    def counting(database: Database, verb: Literal["claim", "complete"], values: Any, statement: InFlight) -> Any:
        flown.append(values["ids"].count(",") + 1)
        return fetch(database, verb, values, statement)

    # The first claim tries the driver.
    with suppress(StoreError):
        await store.claim(new_claim("warm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "fetch", counting)
        with_others = await Story(store, "together").play(asyncio.gather)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "together", None)
        alone = await Story(store, "alone").play(in_turn)
    assert with_others == alone
    assert max(flown, default=0) >= KEYS or all("StoreError" in each for each in alone if "claim" in each)
    return alone


async def in_turn(*calls: Awaitable[Any], return_exceptions: bool) -> list[Any]:
    return [(await asyncio.gather(call, return_exceptions=return_exceptions))[0] for call in calls]


@asynccontextmanager
async def opened(url: str, table: str, **options: Any) -> AsyncIterator[SQLStore]:
    engine = create_async_engine(url, **options)
    store = SQLStore(engine, table=table)
    try:
        yield store
        assert await is_idle(engine)
    finally:
        await store.aclose()
        await engine.dispose()


def with_settings(url: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the argument for an engine whose connections begin with ``settings``, as those of a role do."""
    if "asyncpg" in url:
        return {"connect_args": {"server_settings": dict(settings)}}
    options = [f"-c {name}={value}".replace(" ", r"\ ").replace(r"-c\ ", "-c ") for name, value in settings.items()]
    return {"connect_args": {"options": " ".join(options)}}


@ON_EACH
@pytest.mark.parametrize(
    "settings",
    [
        {"default_transaction_isolation": "serializable"},
        {"default_transaction_isolation": "repeatable read"},
        {"default_transaction_read_only": "on"},
        {"statement_timeout": "5000", "lock_timeout": "1"},
        {"lock_timeout": "0", "synchronous_commit": "off", "bytea_output": "escape"},
    ],
    ids=lambda settings: next(iter(settings.items())),
)
async def test_settings_of_a_role(store: SQLStore, url: str, table: str, settings: dict[str, str]) -> None:
    # Of a pool of four, one call at a time is sent alone: two that are serializable may fail each other.
    async with opened(url, table, pool_size=4, **with_settings(url, settings)) as other:
        answers = await assert_same(other)

    refused = [each for each in answers if "Error" in each]
    assert refused == [each for each in answers if "default_transaction_read_only" in settings]
    assert all("is read-only" in each for each in refused)


@ON_EACH
@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 1, "max_overflow": 0},
        {"poolclass": NullPool},
        {"pool_pre_ping": True, "pool_recycle": 0},
        {"isolation_level": "SERIALIZABLE", "pool_size": 4},
        {"isolation_level": "AUTOCOMMIT"},
        {"execution_options": {"schema_translate_map": {None: "public"}}},
    ],
    ids="-".join,
)
async def test_engines(store: SQLStore, url: str, table: str, options: dict[str, Any]) -> None:
    async with opened(url, table, **options) as other:
        await assert_same(other)


@pytest.mark.parametrize("cache", ["prepared_statement_cache_size", "statement_cache_size"])
async def test_no_cache_of_statements(store: SQLStore, url: str, table: str, cache: str) -> None:
    async with opened(url, table, connect_args={cache: 0}) as other:
        await assert_same(other)


@ON_EACH
@pytest.mark.parametrize(
    "options",
    [
        {"encryption": Encryption(Encryption.new_key())},
        {"digest_names": True},
        {"encryption": Encryption(Encryption.new_key()), "digest_names": True},
    ],
    ids="-".join,
)
async def test_sealed_records(engine: AsyncEngine, table: str, options: dict[str, Any]) -> None:
    store = SQLStore(engine, table=table, **options)
    await store.create_schema()
    answers = await assert_same(store)
    results = await asyncio.to_thread(run, engine.url.render_as_string(False), f"SELECT result, key FROM {table}")

    assert "claim 2: DONE another's 1 b'222' True" in answers
    assert not any(b"222" in (result or b"") for result, _ in results if "encryption" in options)
    assert not any(name in key for _, key in results for name in ("together", "alone"))


@ON_EACH
async def test_names_with_the_signs_of_an_array(store: SQLStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of a flight are sent as text, in which these have a meaning."""
    await store.claim(new_claim("warm"))
    sent: list[str] = []
    fetch = Database.fetch

    def counting(database: Database, verb: str, *arguments: Any) -> Any:
        sent.append(verb)
        return fetch(database, verb, *arguments)

    monkeypatch.setattr(Database, "fetch", counting)
    names = ['a"b', "a\\b", '\\"', "{a,b}", ",", "NULL", "null", " ", "", "a\nb", "a\0b", "'a'", "é", "%s", ":a"]
    claims = [new_claim(name) for name in names]

    await asyncio.gather(*map(store.claim, claims))

    assert sent == ["claims"]
    entries = [await store.inspect(claim.id) for claim in claims]
    assert [entry.key for entry in entries if entry is not None] == names


TABLES = {
    "partitioned": """
        DROP TABLE {t};
        CREATE TABLE {t} (LIKE {t}_plain INCLUDING DEFAULTS, PRIMARY KEY (id)) PARTITION BY HASH (id);
        CREATE TABLE {t}_0 PARTITION OF {t} FOR VALUES WITH (MODULUS 3, REMAINDER 0);
        CREATE TABLE {t}_1 PARTITION OF {t} FOR VALUES WITH (MODULUS 3, REMAINDER 1);
        CREATE TABLE {t}_2 PARTITION OF {t} FOR VALUES WITH (MODULUS 3, REMAINDER 2);
    """,
    "a column with a name of ours": "ALTER TABLE {t} ADD COLUMN applied boolean",
    "lacks a column": "ALTER TABLE {t} DROP COLUMN watched",
    "a trigger that raises": """
        CREATE FUNCTION {t}_refuse() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN IF NEW.key LIKE ''%bad'' THEN RAISE ''not this key''; END IF; RETURN NEW; END';
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_refuse();
    """,
    "a trigger that skips": """
        CREATE FUNCTION {t}_skip() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN IF NEW.key LIKE ''%bad'' THEN RETURN NULL; END IF; RETURN NEW; END';
        CREATE TRIGGER skip BEFORE INSERT OR UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_skip();
    """,
    "a constraint": "ALTER TABLE {t} ADD CHECK (key NOT LIKE '%bad')",
    "a deferred constraint": """
        CREATE TABLE {t}_names (name text PRIMARY KEY);
        ALTER TABLE {t} ADD COLUMN name text GENERATED ALWAYS AS (CASE WHEN key LIKE '%bad' THEN 'bad' END) STORED
            REFERENCES {t}_names DEFERRABLE INITIALLY DEFERRED;
    """,
    "row security": """
        ALTER TABLE {t} ENABLE ROW LEVEL SECURITY; ALTER TABLE {t} FORCE ROW LEVEL SECURITY;
        CREATE POLICY most ON {t} USING (key NOT LIKE '%bad' AND key NOT LIKE '%3');
        CREATE ROLE {t}_role; GRANT ALL ON {t} TO {t}_role;
    """,
    "a view": "DROP TABLE {t}; CREATE VIEW {t} AS SELECT * FROM {t}_plain",
}
"""What an application, or who runs its database, may do to the table. ``{t}_plain`` is another one, as it was made."""

# Of the calls of a story; where the table lacks a column, all.
REFUSED = {
    "partitioned": 0,
    "a column with a name of ours": 0,
    "a trigger that raises": 1,
    "a trigger that skips": 1,
    "a constraint": 1,
    "a deferred constraint": 1,
    "row security": 4,
    "a view": 0,
}


@ON_EACH
@pytest.mark.parametrize("kind", list(TABLES))
async def test_tables(url: str, table: str, kind: str) -> None:
    async with opened(url, table) as store, opened(url, f"{table}_plain") as plain:
        await store.create_schema()
        await plain.create_schema()
    change = TABLES[kind].replace("{t}", table)
    await asyncio.to_thread(run, url, change)
    role = {"role": f"{table}_role"} if kind == "row security" else {}
    try:
        async with opened(url, table, **with_settings(url, role)) as store:
            answers = await assert_same(store)
    finally:
        await asyncio.to_thread(run, url, f"DROP OWNED BY {table}_role; DROP ROLE {table}_role" if role else "")

    refused = [each for each in answers if "Error" in each]
    assert len(refused) == REFUSED.get(kind, len(answers)), refused


def run(url: str, statements: str) -> list[Any]:
    with psycopg.connect(with_driver(url, "postgresql"), autocommit=True) as connection:
        cursor = connection.execute(statements.encode())
        return cursor.fetchall() if cursor.description else []


@ON_EACH
async def test_a_table_that_is_made_anew(store: SQLStore, url: str, table: str) -> None:
    """The statements of every connection are prepared for a table that is gone."""
    for change in (f"ALTER TABLE {table} ADD COLUMN note text", f"DROP TABLE {table}"):
        for turn in range(7):
            claims = [new_claim(f"{change}-{turn}-{number}") for number in range(6)]
            await asyncio.gather(*map(store.claim, claims))
            await asyncio.gather(*(store.complete(claim, b"before") for claim in claims))
        await asyncio.to_thread(run, url, change)
        await store.create_schema()

        claims = [new_claim(f"{change}-after-{number}") for number in range(6)]
        records = await asyncio.gather(*map(store.claim, claims))
        completed = await asyncio.gather(*(store.complete(claim, b"after") for claim in claims))

        assert [record.token for record in records] == [claim.token for claim in claims]
        assert completed == [True] * 6


@ON_EACH
async def test_a_pooler_that_is_put_in_while_calls_are_sent_together(
    store: SQLStore, url: str, table: str, proxy: Proxy
) -> None:
    through = SQLStore.from_url(with_port(url, proxy.port), table=table)
    claims = [new_claim(str(number)) for number in range(60)]
    with PgBouncerServer(url) as bouncer:
        await asyncio.gather(*map(through.claim, claims[:20]))
        await asyncio.gather(*map(through.claim, claims[20:40]))
        proxy.aim(bouncer.port)

        records = await asyncio.gather(*map(through.claim, claims[40:]), return_exceptions=True)
        completed = await asyncio.gather(
            *(through.complete(claim, b"done") for claim in claims), return_exceptions=True
        )
        replays = await asyncio.gather(*(store.claim(new_claim(claim.key)) for claim in claims))
        await through.aclose()

    # Without the settings for a pooler, a call may fail, as it does alone, and says which they are.
    wrong = [each for each in [*records, *completed] if isinstance(each, BaseException)]
    assert all(isinstance(each, StoreError) and "prepared" in str(each) for each in wrong), wrong
    for claim, record, done, replay in zip(claims[40:], records, completed[40:], replays[40:], strict=True):
        assert not isinstance(record, Record) or record.token == claim.token
        assert done is not True or replay.result == b"done"


@ON_EACH
async def test_a_claim_that_is_refused_costs_no_connection(url: str, table: str) -> None:
    """Nor is every other claim sent alone, where the error is that of one row."""
    async with opened(url, table) as store:
        await store.create_schema()
        await asyncio.to_thread(run, url, TABLES["a trigger that raises"].replace("{t}", table))
        (side,) = store._per_loop.values()
        connections: list[object] = []
        alone: list[object] = []

        async def play(name: str) -> list[Any]:
            claims = [new_claim(f"{name}-{number}") for number in range(15)] + [new_claim(f"{name}-bad")]
            return await asyncio.gather(*map(store.claim, claims), return_exceptions=True)

        await play("warm")
        event.listen(side._engine.sync_engine, "connect", lambda *_: connections.append(1))
        with pytest.MonkeyPatch.context() as patch:
            perform = Database.perform
            patch.setattr(Database, "perform", lambda *arguments: alone.append(1) or perform(*arguments))
            answers = [await play(str(number)) for number in range(5)]

    assert all(isinstance(each, Record) for answer in answers for each in answer[:15])
    assert all(isinstance(answer[15], StoreError) for answer in answers)
    assert connections == []
    assert len(alone) == 5

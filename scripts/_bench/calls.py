"""Functions under ``idempotent``: one transaction beside three by hand, and a call on Redis beside raw round trips."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import redis
from measure import Case, medians
from redis_subject import Redis
from sql_subject import SQL
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from subjects import Subject, claim_of

from idempotency import idempotent
from idempotency._rules import Claim, Execute, Record, judge
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore

CONCURRENCY = (1, 8)

_CALLS = 64
_TRIPS = 20
_WAIT = 30.0
_BLOCKING = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mysql+pymysql"}
_numbers = count()


@dataclass(frozen=True)
class Throughput:
    """Calls per second, with so many at a time: joined, and the same statements by hand in one transaction or three."""

    name: str
    concurrency: int
    joined: float
    one: float
    three: float


@dataclass(frozen=True)
class Trips:
    """Medians in microseconds, all blocking: a call on a store opened by URL, and on one made with a client; the
    scripts of a call, sent raw by that client, and as many GETs.
    """

    opened: float
    given: float
    scripts: float
    gets: float


async def joined(subject: SQL, rounds: int) -> AsyncIterator[Throughput]:
    """Measure the blocking and the asyncio driver of one database, whose table of records ``subject`` has made."""
    url = make_url(subject.url)
    blocking = url.set(drivername=_BLOCKING.get(url.get_backend_name(), url.get_backend_name()))
    with _blocking_cases(blocking, subject.place) as cases:
        async for cost in _compared(f"{subject.name} {blocking.get_driver_name()}", cases, rounds):
            yield cost
    async with _async_cases(url, subject.place) as cases:
        async for cost in _compared(f"{subject.name} {url.get_driver_name()}", cases, rounds):
            yield cost


_Batches = dict[str, Callable[..., Awaitable[None]]]
"""Functions that run keys, so many at a time, one for each way that :class:`Throughput` has."""


async def _compared(name: str, batches: _Batches, rounds: int) -> AsyncIterator[Throughput]:
    for concurrency in CONCURRENCY:
        cases = [
            Case(kind, lambda: [_new_key() for _ in range(_CALLS)], partial(batch, concurrency))
            for kind, batch in batches.items()
        ]
        took = await medians(cases, rounds, warm_up=2)
        yield Throughput(name, concurrency, **{kind: _CALLS * 1e6 / took[kind] for kind in batches})


@contextmanager
def _blocking_cases(url: Any, place: str) -> Iterator[_Batches]:
    store = SQLStore.from_url(url, table=place)
    engine = create_engine(url, **_options(url))
    sessions = sessionmaker(engine)
    with _effects(engine, place) as effects:

        @idempotent(store, key=lambda name: name, session=sessions, lock_timeout=_WAIT)
        def joined(name: str, session: Session) -> dict[str, str]:
            session.execute(effects.insert(), {"name": name})
            return {"order": name}

        def claimed(session: Session, claim: Claim) -> None:
            _expect_ours(claim, store.claim_in_sync(session, claim, wait=_WAIT))

        def completed(session: Session, claim: Claim) -> None:
            _expect(store.complete_in_sync(session, claim, _result(claim)))

        def one(name: str) -> None:
            claim = claim_of(name)
            with sessions.begin() as session:
                claimed(session, claim)
                session.execute(effects.insert(), {"name": name})
                completed(session, claim)

        def three(name: str) -> None:
            claim = claim_of(name)
            with sessions.begin() as session:
                claimed(session, claim)
            with sessions.begin() as session:
                session.execute(effects.insert(), {"name": name})
            with sessions.begin() as session:
                completed(session, claim)

        with ThreadPoolExecutor(max(CONCURRENCY)) as threads:
            yield {each.__name__: partial(_in_threads, threads, each) for each in (joined, one, three)}
    engine.dispose()


@asynccontextmanager
async def _async_cases(url: Any, place: str) -> AsyncIterator[_Batches]:
    store = SQLStore.from_url(url, table=place)
    engine = create_async_engine(url, **_options(url))
    sessions = async_sessionmaker(engine)
    blocking = create_engine(url.set(drivername=_BLOCKING.get(url.get_backend_name(), url.get_backend_name())))
    with _effects(blocking, place) as effects:

        @idempotent(store, key=lambda name: name, session=sessions, lock_timeout=_WAIT)
        async def joined(name: str, session: AsyncSession) -> dict[str, str]:
            await session.execute(effects.insert(), {"name": name})
            return {"order": name}

        async def claimed(session: AsyncSession, claim: Claim) -> None:
            _expect_ours(claim, await store.claim_in(session, claim, wait=_WAIT))

        async def completed(session: AsyncSession, claim: Claim) -> None:
            _expect(await store.complete_in(session, claim, _result(claim)))

        async def one(name: str) -> None:
            claim = claim_of(name)
            async with sessions.begin() as session:
                await claimed(session, claim)
                await session.execute(effects.insert(), {"name": name})
                await completed(session, claim)

        async def three(name: str) -> None:
            claim = claim_of(name)
            async with sessions.begin() as session:
                await claimed(session, claim)
            async with sessions.begin() as session:
                await session.execute(effects.insert(), {"name": name})
            async with sessions.begin() as session:
                await completed(session, claim)

        yield {each.__name__: partial(_in_tasks, each) for each in (joined, one, three)}
        await engine.dispose()
    blocking.dispose()


@contextmanager
def _effects(engine: Engine, place: str) -> Iterator[Table]:
    table = Table(f"{place}_effect", MetaData(), Column("id", Integer, primary_key=True), Column("name", String(64)))
    table.create(engine)
    try:
        yield table
    finally:
        table.drop(engine)


def _options(url: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"pool_size": max(CONCURRENCY)}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": _WAIT}
    return options


def _result(claim: Claim) -> bytes:
    return json.dumps({"order": claim.key}).encode()


def _expect_ours(claim: Claim, record: Record | None) -> None:
    _expect(record is not None and isinstance(judge(claim, record), Execute))


def _expect(ours: bool) -> None:
    if not ours:
        raise AssertionError("a new key was not claimed and completed")


async def _in_threads(
    threads: ThreadPoolExecutor, function: Callable[..., Any], concurrency: int, keys: Iterable[str]
) -> None:
    waiting = iter(keys)

    def work() -> None:
        for key in waiting:
            function(key)

    for running in [threads.submit(work) for _ in range(concurrency)]:
        running.result()


async def _in_tasks(function: Callable[..., Awaitable[Any]], concurrency: int, keys: Iterable[str]) -> None:
    waiting = iter(keys)

    async def work() -> None:
        for key in waiting:
            await function(key)

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def trips(subject: Redis, rounds: int) -> Trips:
    """Measure blocking calls, and raw, by a client with default options, their two scripts and two GETs."""
    client = redis.Redis.from_url(subject.url)
    store = RedisStore.from_url(subject.url, prefix=subject.place)
    given = idempotent(RedisStore(client, prefix=subject.place), key=lambda name: name)(_order)
    opened = idempotent(store, key=lambda name: name)(_order)

    def scripts() -> tuple[Any, Any]:
        claim = claim_of(_new_key())
        return subject.command("claim", claim), subject.command("complete", claim)

    def send_both(commands: tuple[Any, Any]) -> None:
        for command in commands:
            client.execute_command(*command)

    names = [("GET", "idempotency-bench")] * 2
    cases = [
        Case("opened", _new_key, partial(_blocking, opened), repeat=_TRIPS),
        Case("given", _new_key, partial(_blocking, given), repeat=_TRIPS),
        Case("scripts", scripts, partial(_blocking, send_both), repeat=_TRIPS),
        Case("gets", lambda: names, partial(_blocking, send_both), repeat=_TRIPS),
    ]
    try:
        return Trips(**await medians(cases, rounds))
    finally:
        store.close()
        client.close()


def _order(name: str) -> dict[str, str]:
    return {"order": name}


async def _blocking(function: Callable[[Any], Any], argument: Any) -> None:
    function(argument)


def _new_key() -> str:
    return f"call-{next(_numbers)}"


async def measure(subject: Subject, rounds: int) -> AsyncIterator[Throughput | Trips]:
    """Measure what applies to the store. To the one in memory nothing does."""
    if isinstance(subject, SQL):
        async for cost in joined(subject, rounds):
            yield cost
    elif isinstance(subject, Redis):
        yield await trips(subject, 10 * rounds)

"""What cannot work is refused where it is made: by ConfigurationError, which names the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from idempotency import (
    ConfigurationError,
    IdempotencyMiddleware,
    Policy,
    idempotent,
    idempotent_consumer,
    open_store,
)
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import FaultyStore

FILE = "sqlite:///records"
AWAITED_FILE = "sqlite+aiosqlite:///records"


async def app(scope: Any, receive: Any, send: Any) -> None: ...


async def awaited(message: Any) -> None: ...


def called(message: Any) -> None: ...


def middleware(store: Any, **options: Any) -> Any:
    return IdempotencyMiddleware(app, store=store, **options)


def function(store: Any, **options: Any) -> Any:
    return idempotent(store, **{"key": lambda _: "k", **options})(awaited)


def consumer(store: Any, **options: Any) -> Any:
    return idempotent_consumer(store, **{"consumer": "c", "key": lambda _: "k", **options})(awaited)


def sync_function(store: Any, **options: Any) -> Any:
    return idempotent(store, **{"key": lambda _: "k", **options})(called)


def sync_consumer(store: Any, **options: Any) -> Any:
    return idempotent_consumer(store, **{"consumer": "c", "key": lambda _: "k", **options})(called)


AWAITING = [middleware, function, consumer]
BLOCKING = [sync_function, sync_consumer]
DECORATED = [function, consumer, sync_function, sync_consumer]


class Renewless:
    """A store of one's own that lacks a verb."""

    def __init__(self) -> None:
        self._inner = MemoryStore()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "renew")):
            raise AttributeError(name)
        return getattr(self._inner, name)


ONE_SIDED: dict[str, tuple[Callable[[], Any], str]] = {
    "engine": (lambda: SQLStore(create_engine(FILE)), "pass an AsyncEngine"),
    "blocking client": (lambda: RedisStore(redis.Redis()), "give it a redis.asyncio client"),
    "URL of a blocking driver": (lambda: open_store(FILE), "use sqlite\\+aiosqlite://"),
    "URL of psycopg2": (lambda: open_store("postgresql+psycopg2://h/d"), "use postgresql\\+asyncpg://"),
    "wrapped engine": (lambda: FaultyStore(SQLStore(create_engine(FILE))), "pass an AsyncEngine"),
    "lacks a verb": (Renewless, "lacks renew; use a store that has"),
    "class": (lambda: MemoryStore, "not the class MemoryStore: call it"),
    "something else": (object, "as open_store\\(url\\) makes it, not object"),
}
OTHER_SIDED: dict[str, tuple[Callable[[], Any], str]] = {
    "engine": (lambda: SQLStore(create_async_engine(AWAITED_FILE)), "pass an Engine, of create_engine"),
    "client": (lambda: RedisStore(redis.asyncio.Redis()), "give it a sync_client"),
    "URL": (lambda: open_store(AWAITED_FILE), "use sqlite://"),
    "URL of asyncpg": (lambda: open_store("postgresql+asyncpg://h/d"), "use postgresql\\+psycopg://"),
    "lacks a verb": (Renewless, "lacks renew_sync; use a store that has"),
    "class": (lambda: MemoryStore, "not the class MemoryStore: call it"),
    "something else": (object, "as open_store\\(url\\) makes it, not object"),
    "URL as text": (lambda: "memory://", "as open_store\\(url\\) makes it, not str"),
}


@pytest.mark.parametrize("make", AWAITING)
@pytest.mark.parametrize(("store", "remedy"), ONE_SIDED.values(), ids=ONE_SIDED.keys())
def test_a_store_whose_verbs_cannot_be_awaited_is_refused(make: Any, store: Any, remedy: str) -> None:
    """By the middleware, a function and a consumer, and not at their first key."""
    with pytest.raises(ConfigurationError, match=remedy):
        make(store())


@pytest.mark.parametrize("make", BLOCKING)
@pytest.mark.parametrize(("store", "remedy"), OTHER_SIDED.values(), ids=OTHER_SIDED.keys())
def test_a_store_whose_verbs_can_only_be_awaited_is_refused(make: Any, store: Any, remedy: str) -> None:
    """By a synchronous function and a synchronous consumer."""
    with pytest.raises(ConfigurationError, match=remedy):
        make(store())


@pytest.mark.parametrize("url", [FILE, "postgresql+psycopg2://h/d"])
def test_a_url_whose_driver_blocks_is_refused_by_the_middleware(url: str) -> None:
    """A URL is as good as the store that it opens."""
    with pytest.raises(ConfigurationError, match="is a synchronous driver: use "):
        middleware(url)


@pytest.mark.parametrize("make", [*AWAITING, *BLOCKING])
@pytest.mark.parametrize("store", [MemoryStore, lambda: open_store("redis://h"), FaultyStore])
def test_a_store_with_both_sides_serves_both(make: Any, store: Any) -> None:
    """So does a URL of a driver with two sides."""
    make(store())
    make(open_store("postgresql+psycopg://h/d"))


SYNC_SESSIONS: list[Callable[[], Any]] = [
    lambda: sessionmaker(create_engine(FILE)),
    lambda: async_sessionmaker(create_engine(FILE)),
    lambda: sessionmaker(create_async_engine(AWAITED_FILE), class_=AsyncSession),
    lambda: create_async_engine(AWAITED_FILE),
    lambda: AsyncSession(create_async_engine(AWAITED_FILE)),
]
AWAITED_SESSIONS: list[Callable[[], Any]] = [
    lambda: async_sessionmaker(create_async_engine(AWAITED_FILE)),
    lambda: sessionmaker(create_async_engine(AWAITED_FILE)),
    lambda: sessionmaker(create_async_engine(AWAITED_FILE), class_=AsyncSession),
    lambda: create_engine(FILE),
    lambda: Session(create_engine(FILE)),
]


@pytest.mark.parametrize("make", AWAITING)
@pytest.mark.parametrize("sessions", SYNC_SESSIONS)
def test_sessions_that_cannot_be_awaited_are_refused(make: Any, sessions: Any) -> None:
    """Whether it is their factory, their class or their engine that is of the wrong side."""
    store, of_wrong_side = SQLStore(create_async_engine(AWAITED_FILE)), sessions()
    # The middleware takes a synchronous sessionmaker, beside a store that is synchronous too.
    of_threads = type(of_wrong_side) is sessionmaker and not issubclass(of_wrong_side.class_, AsyncSession)
    both = make is middleware and of_threads
    with pytest.raises(ConfigurationError, match="pass an Engine" if both else "async_sessionmaker"):
        make(store, session=of_wrong_side)


@pytest.mark.parametrize("make", BLOCKING)
@pytest.mark.parametrize("sessions", AWAITED_SESSIONS)
def test_sessions_that_can_only_be_awaited_are_refused(make: Any, sessions: Any) -> None:
    """The reverse."""
    store = SQLStore(create_engine(FILE))
    with pytest.raises(ConfigurationError, match="sessionmaker"):
        make(store, session=sessions())


@pytest.mark.parametrize("make", [middleware, *DECORATED])
def test_sessions_beside_a_store_that_is_no_database_are_refused(make: Any) -> None:
    """Nothing else commits with a session."""
    sessions = sessionmaker(create_engine(FILE)) if make in BLOCKING else async_sessionmaker()
    with pytest.raises(ConfigurationError, match="session= needs an SQLStore"):
        make(MemoryStore(), session=sessions)


class Uncounted:
    """A store with the verbs, and nothing of housekeeping."""

    def __init__(self) -> None:
        self._inner = MemoryStore()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "inspect")):
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize(("make", "verb"), [(consumer, "inspect"), (sync_consumer, "inspect_sync")])
def test_max_attempts_on_a_store_that_shows_no_records_is_refused(make: Any, verb: str) -> None:
    """Without it such a store will do."""
    make(Uncounted())
    with pytest.raises(ConfigurationError, match=f"lacks {verb};"):
        make(Uncounted(), max_attempts=3)


@pytest.mark.parametrize("make", DECORATED)
def test_a_policy_of_requests_serves_functions_and_consumers_too(make: Any) -> None:
    """One policy may be shared: what says something of requests only has no meaning for them."""
    make(MemoryStore(), policy=Policy(required=True, methods={"PUT"}, fingerprint="json", outcomes={404: "store"}))


@pytest.mark.parametrize("make", DECORATED)
@pytest.mark.parametrize(
    "options", [{"policy": {"ttl": 5}}, {"on_event": "log"}, {"key": "id"}, {"codec": object()}, {"lock_timeout": -1}]
)
def test_an_option_of_the_wrong_kind_is_refused(make: Any, options: dict[str, Any]) -> None:
    """Not when it is used for the first time."""
    if "lock_timeout" in options:
        engine = create_engine(FILE) if make in BLOCKING else create_async_engine(AWAITED_FILE)
        sessions: Any = sessionmaker if make in BLOCKING else async_sessionmaker
        store: Any = SQLStore(engine)
        options = {**options, "session": sessions(engine)}
    else:
        store = MemoryStore()
    with pytest.raises(ConfigurationError):
        make(store, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": {"ttl": 5}},
        {"policies": ["/orders"]},
        {"policies": {"/orders": {"ttl": 5}}},
        {"header_name": "Idempotency Key"},
        {"header_name": "Schlüssel"},
        {"header_name": b"key"},
        {"replayed_header": ""},
        {"secret": ""},
        {"secret": 7},
        {"on_event": "log"},
        {"scope": "cookie"},
    ],
)
def test_a_wrong_option_of_the_middleware_is_refused(options: dict[str, Any]) -> None:
    """Not at the first request that has a key."""
    with pytest.raises(ConfigurationError):
        middleware(MemoryStore(), **options)


@pytest.mark.parametrize("make", [consumer, sync_consumer])
@pytest.mark.parametrize("options", [{"max_attempts": "3"}, {"max_attempts": 2.5}, {"max_attempts": True}])
def test_a_wrong_number_of_attempts_is_refused(make: Any, options: dict[str, Any]) -> None:
    """It would be compared with a count only when a message fails."""
    with pytest.raises(ConfigurationError, match="max_attempts"):
        make(MemoryStore(), **options)


@pytest.mark.parametrize("url", ["memory://", "redis://h", AWAITED_FILE])
def test_an_unknown_option_of_a_store_is_refused(url: str) -> None:
    """The error says which there are."""
    with pytest.raises(ConfigurationError, match="'prefex'; the store's options are "):
        open_store(url, prefex="x")


def test_an_unknown_option_of_a_consumer_is_refused() -> None:
    """The error says which there are."""
    with pytest.raises(ConfigurationError, match="unknown options: max_attempt; there are .*max_attempts"):
        consumer(MemoryStore(), max_attempt=3)

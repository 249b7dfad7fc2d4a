"""From a URL to a store, or to an error that says what to do."""

from __future__ import annotations

import sys
import traceback

import pytest

from idempotency.errors import ConfigurationError
from idempotency.stores import open_store
from idempotency.stores.memory import MemoryStore

SECRET = "hunter2"


async def test_memory() -> None:
    """memory:// opens a memory store with the options given."""
    store = open_store("memory://", max_records=7)

    assert isinstance(store, MemoryStore)
    assert store._max_records == 7


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://localhost:6379/0", "RedisStore"),
        ("rediss://localhost:6379/0", "RedisStore"),
        ("unix:///tmp/redis.sock", "RedisStore"),
        ("redis+cluster://localhost:6379", "RedisStore"),
        ("redis+sentinel://localhost:26379/mymaster", "RedisStore"),
        ("REDIS://localhost", "RedisStore"),
        ("sqlite+aiosqlite:///records.sqlite3", "SQLStore"),
        ("sqlite:///records.sqlite3", "SQLStore"),
        ("postgresql+asyncpg://localhost/db", "SQLStore"),
        ("postgresql+psycopg://localhost/db", "SQLStore"),
        ("mysql+aiomysql://localhost/db", "SQLStore"),
        ("mysql+asyncmy://localhost/db", "SQLStore"),
        ("mariadb+aiomysql://localhost/db", "SQLStore"),
    ],
)
async def test_scheme_picks_the_store(url: str, name: str) -> None:
    """The scheme of a URL picks the store, which connects to nothing before its first use."""
    store = open_store(url)

    assert type(store).__name__ == name
    await store.aclose()


@pytest.mark.parametrize(
    ("url", "module", "install"),
    [
        ("redis://localhost", "redis", "pip install 'asgi-idempotency[redis]'"),
        ("redis+cluster://localhost", "redis", "pip install 'asgi-idempotency[redis]'"),
        ("sqlite+aiosqlite:///records.sqlite3", "sqlalchemy", "pip install 'asgi-idempotency[sqlite]'"),
        ("sqlite+aiosqlite:///records.sqlite3", "aiosqlite", "pip install 'asgi-idempotency[sqlite]'"),
        ("postgresql+asyncpg://localhost/db", "asyncpg", "pip install 'asgi-idempotency[postgresql]'"),
        ("postgresql+psycopg://localhost/db", "psycopg", "pip install 'asgi-idempotency[psycopg]'"),
        ("mysql+aiomysql://localhost/db", "aiomysql", "pip install 'asgi-idempotency[mysql]'"),
        ("mysql+asyncmy://localhost/db", "asyncmy", "pip install 'asyncmy'"),
        ("mysql://localhost/db", "MySQLdb", "synchronous code mysql+pymysql:// (pip install 'pymysql')"),
    ],
)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, module: str, install: str) -> None:
    """An extra or driver that is not installed is an error with the command that installs it."""
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ConfigurationError) as caught:
        open_store(url)

    assert str(caught.value).endswith(install)


@pytest.mark.parametrize(
    "url",
    [
        f"nosuch://user:{SECRET}@localhost/db",
        f"postgresql+nosuch://user:{SECRET}@localhost/db",
        f"redis://user:{SECRET}@localhost:port/0",
        f"redis://user:{SECRET}@localhost:6379/0?nosuch=1",
        f"redis+cluster://user:{SECRET}@localhost:port",
        f"redis+sentinel://user:{SECRET}@localhost:26379",
        f"postgresql+asyncpg://user:{SECRET}@localhost:port/db",
        f"user:{SECRET}@localhost",
        f"memory://user:{SECRET}@localhost",
        "",
    ],
)
def test_wrong_url_is_refused(url: str) -> None:
    """A URL that cannot be read is a configuration error, and nothing it prints holds the password."""
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)

    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_unknown_scheme_lists_the_known() -> None:
    """An unknown scheme is told which there are."""
    with pytest.raises(ConfigurationError, match=r"no store is known for nosuch://.*redis://.*SQLAlchemy"):
        open_store("nosuch://localhost")


def test_unknown_option_is_refused() -> None:
    """An option the store does not have is an error, not ignored."""
    with pytest.raises(TypeError, match="max_record'"):
        open_store("memory://", max_record=1)

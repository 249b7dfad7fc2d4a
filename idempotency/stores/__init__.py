"""The stores of records: memory, Redis and SQL."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from idempotency._sql.requirements import DATABASES, not_installed, sqlalchemy_not_installed
from idempotency.errors import ConfigurationError, UnknownOptionError
from idempotency.stores.base import Housekeeping, Store, SyncStore

__all__ = ["AnyStore", "Housekeeping", "Store", "SyncStore", "open_store"]

_REDIS = frozenset({"redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"})
_SCHEMES = (
    "memory://, redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// or an SQLAlchemy URL of "
    + ", ".join(DATABASES.values())
)


class AnyStore(Store, SyncStore, Housekeeping, Protocol):
    """A store with both sets of verbs and housekeeping; the driver in its URL may serve only one of the two sets."""


def open_store(url: str, **options: Any) -> AnyStore:
    """Open the store that a URL names; it connects at its first use, and ``aclose`` or ``close`` closes it.

    ``url`` is memory://, redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// or any SQLAlchemy URL;
    ``options`` are those of the store's class, such as ``encryption``. Raises
    :class:`~idempotency.errors.ConfigurationError` for a URL that cannot be read, and when the extra or driver it needs
    is not installed, naming what to install.
    """
    if not isinstance(url, str):
        raise ConfigurationError(
            f"open_store takes a URL, not {type(url).__name__}; a client or engine goes to its store"
        )
    scheme, separator, _ = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ConfigurationError(f"a store URL starts with {_SCHEMES}")
    if scheme == "memory":
        return _open_memory(url, options)
    if scheme in _REDIS:
        return _open_redis(url, options)
    return _open_sql(url, scheme, options)


def _open_memory(url: str, options: dict[str, Any]) -> AnyStore:
    from idempotency.stores.memory import MemoryStore

    if url != "memory://":
        raise ConfigurationError("memory:// takes no host, path or query; give its options as arguments")
    return _made(MemoryStore, options)


def _open_redis(url: str, options: dict[str, Any]) -> AnyStore:
    try:
        import redis  # noqa: F401
    except ImportError as error:
        raise not_installed("redis", "redis", "asgi-idempotency[redis]") from error
    from idempotency.stores.redis import RedisStore

    try:
        return _made(partial(RedisStore.from_url, url), options)
    except ConfigurationError:
        raise
    except ValueError:
        # The client's own message may quote the part of the URL that has the password in it.
        raise ConfigurationError(f"this {url.partition('://')[0]}:// URL cannot be read") from None


def _open_sql(url: str, scheme: str, options: dict[str, Any]) -> AnyStore:
    if scheme.partition("+")[0] not in DATABASES:
        raise ConfigurationError(f"no store is known for {scheme}://; a store URL starts with {_SCHEMES}")
    try:
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise sqlalchemy_not_installed(scheme) from error
    from idempotency.stores.sql import SQLStore

    return _made(partial(SQLStore.from_url, url), options)


def _made(make: Callable[..., AnyStore], options: dict[str, Any]) -> AnyStore:
    known = inspect.signature(make).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        # The message is the one that Python has for an unknown argument of a call.
        raise UnknownOptionError(
            f"got an unexpected keyword argument {unknown[0]!r}; the store's options are "
            f"{', '.join(name for name in known if name != 'url')}"
        )
    return make(**options)

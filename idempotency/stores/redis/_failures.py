"""What redis-py raises, and how a failure is described to an operator."""

from __future__ import annotations

import re

import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

CLIENT_ERRORS = (RedisError, RedisClusterException, OSError, RuntimeError)
"""What redis-py raises. RuntimeError comes from a client of another event loop."""

_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+) ")
_KINDS = {"OOM": OutOfMemoryError, "READONLY": ReadOnlyError, "NOPERM": NoPermissionError}


def unwrapped(error: BaseException) -> BaseException:
    """Return the error of the command that a script called: Redis before 7 wraps it in an error of the script."""
    found = _IN_SCRIPT.search(str(error)) if isinstance(error, ResponseError) else None
    kind = _KINDS.get(found[1]) if found else None
    return kind(str(error)) if kind is not None else error


def describe_failure(error: BaseException, timeout: float) -> str:
    """Describe what went wrong and what to do about it. ``timeout``: the store's, in seconds."""
    match unwrapped(error):
        case AuthenticationError():
            return "the user or password is wrong; correct the URL"
        case NoPermissionError():
            return f"the user may not do this ({error}); grant it +eval, +evalsha and the commands of the scripts"
        case ReadOnlyError():
            return "this is a replica; give the address of the primary, or of the sentinels"
        case OutOfMemoryError():
            return "the memory is full; raise maxmemory"
        case BusyLoadingError():
            return "the server is still loading its data; it can be tried again soon"
        case MaxConnectionsError():
            return "all connections of the client are in use; raise its max_connections"
        case TimeoutError() | redis.TimeoutError():
            return f"no answer within {timeout:g} s; check that the server is up and reachable"
        case redis.ConnectionError() | OSError():
            return f"{error}; start the server, or correct the URL"
        case RuntimeError():
            return f"{error}; an asyncio client works in one event loop: open the store with RedisStore.from_url"
        case _:
            return str(error)

"""How a command travels: over one connection of the client's pool, or through the client where that is due."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any

import redis
import redis.asyncio as aioredis
from redis.asyncio import cluster as aiocluster
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import (
    AskError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from idempotency.stores.redis._wire import EVAL, EVALSHA, Command, pack

Send = Callable[[Command], Awaitable[Any]]
SendSync = Callable[[Command], Any]
Wait = tuple[Any, ...]
"""A WAIT or WAITAOF command."""

# Before redis-py 5.3 a pool asks for the name of the command; since then it warns of one.
_NAME = (
    ("EVALSHA",)
    if inspect.signature(ConnectionPool.get_connection).parameters["command_name"].default is inspect.Parameter.empty
    else ()
)

_AGAIN = (redis.ConnectionError, ReadOnlyError)
"""An idle connection that the server had dropped, or a primary that was demoted: verbs may be repeated."""

_WRAPPED = re.compile(r"@user_script: ?\d+: -([A-Z]+) ")
_WITHIN = {"OOM": OutOfMemoryError, "READONLY": ReadOnlyError, "NOPERM": NoPermissionError}

RAW = {"NEVER_DECODE": True}
"""Replies are bytes, whatever the client is set to (an option of redis-py's ``execute_command``)."""


def unwrapped(error: BaseException) -> BaseException:
    """Return the error of the command a script called, which Redis before 7 wraps in one of the script."""
    found = _WRAPPED.search(str(error)) if isinstance(error, ResponseError) else None
    kind = _WITHIN.get(found[1]) if found else None
    return kind(str(error)) if kind is not None else error


def sender(client: Any, own: bool) -> Send:
    """Choose how a client's commands are sent; ``own`` says that nothing else is sent through it at the same time."""
    if _is_plain(client):
        return _direct(_Kept(client.connection_pool) if own else _Borrowed(client.connection_pool))
    return _through(client)


def _is_plain(client: Any) -> bool:
    """Say whether nobody but redis-py itself has a part in this client's commands.

    A subclass, a tracer that wraps ``execute_command``, or a double of the server must see every command.
    """
    return (
        type(client) is aioredis.Redis
        and inspect.isfunction(aioredis.Redis.execute_command)
        and not hasattr(aioredis.Redis.execute_command, "__wrapped__")
        and not client.single_connection_client
        and type(client.connection_pool).__module__.startswith("redis.asyncio.")
        and client.connection_pool.connection_class.__module__.startswith("redis.asyncio.")
    )


class _Borrowed:
    """Connections of a pool that others use too: back in it after every command."""

    __slots__ = ("_pool", "give")

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.give: Callable[[Any], Awaitable[None]] = pool.release

    async def take(self) -> Any:
        return await self._pool.get_connection(*_NAME)

    def drop(self) -> None:
        pass  # the pool looks at each connection before it gives it out


class _Kept:
    """Connections of our own pool: kept, because taking one out and putting it back costs a tenth of a round trip."""

    __slots__ = ("_age", "_idle", "_pool")

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: list[tuple[Any, int]] = []
        self._age = 0

    async def take(self) -> Any:
        if not self._idle:
            return await self._pool.get_connection(*_NAME)
        connection, age = self._idle.pop()
        try:
            if age != self._age:
                await connection.disconnect()
            if not connection.is_connected:
                await connection.connect()
        except BaseException:
            self._idle.append((connection, age))
            raise
        return connection

    async def give(self, connection: Any) -> None:
        self._idle.append((connection, self._age))

    def drop(self) -> None:
        # They are made anew as they are taken: here nothing can be interrupted, and lost.
        self._age += 1


def _direct(connections: _Borrowed | _Kept) -> Send:
    """Send over a connection of the pool: 15 to 30 % less work than ``execute_command``.

    ``send_packed_command`` and ``read_response`` disconnect when they fail or are cancelled, so a connection that is
    given back never holds the reply to another command.
    """

    async def send(command: Command) -> Any:
        try:
            return await once(command)
        except _AGAIN:
            # Where one had idled too long, the others have as well.
            connections.drop()
            return await once(command)

    async def once(command: Command) -> Any:
        script, rest = command
        connection = await connections.take()
        try:
            await connection.send_packed_command(pack(b"EVALSHA", script.sha, rest))
            try:
                return await connection.read_response(disable_decoding=True)
            except NoScriptError:
                await connection.send_packed_command(pack(b"EVAL", script.text, rest))
                return await connection.read_response(disable_decoding=True)
        except ResponseError as error:
            told = unwrapped(error)
            if isinstance(told, ReadOnlyError):
                await connection.disconnect()
            raise told from error
        finally:
            await connections.give(connection)

    return send


def _through(client: Any) -> Send:
    async def send(command: Command) -> Any:
        try:
            return await once(command)
        except (redis.ConnectionError, ResponseError) as error:
            pool = _to_reconnect(error, client)
            if pool is None:
                raise
            await pool.disconnect(inuse_connections=False)
            return await once(command)

    async def once(command: Command) -> Any:
        script, rest = command
        try:
            return await client.execute_command(EVALSHA, script.sha, *rest, **RAW)
        except NoScriptError:
            return await client.execute_command(EVAL, script.text, *rest, **RAW)

    return send


def _to_reconnect(error: Exception, client: Any) -> Any:
    """Return the pool whose connections are to be made anew before the command is sent again, or None.

    A primary that was demoted is left by making a new connection from the pool: redis-py repeats a command on the old
    one, to the same address. A cluster finds its way by itself.
    """
    if isinstance(unwrapped(error), _AGAIN):
        return getattr(client, "connection_pool", None)
    return None


def sender_sync(client: Any, own: bool = False) -> SendSync:
    """Choose how a blocking client's commands are sent; see :func:`sender`."""
    if _is_plain_sync(client):
        return _direct_sync(_KeptSync(client.connection_pool) if own else _BorrowedSync(client.connection_pool))
    return _through_sync(client)


def _is_plain_sync(client: Any) -> bool:
    """See :func:`_is_plain`."""
    return (
        type(client) is redis.Redis
        and inspect.isfunction(redis.Redis.execute_command)
        and not hasattr(redis.Redis.execute_command, "__wrapped__")
        and client.connection is None
        and type(client.connection_pool).__module__.startswith("redis.connection")
        and client.connection_pool.connection_class.__module__.startswith("redis.connection")
    )


class _BorrowedSync:
    """See :class:`_Borrowed`."""

    __slots__ = ("drop", "give", "take")

    def __init__(self, pool: Any) -> None:
        self.take: Callable[[], Any] = functools.partial(pool.get_connection, *_NAME)
        self.give: Callable[[Any], None] = pool.release
        self.drop: Callable[[], None] = functools.partial(pool.disconnect, inuse_connections=False)


class _KeptSync:
    """See :class:`_Kept`; of a blocking round trip, taking and putting back is a third."""

    __slots__ = ("_age", "_idle", "_pool")

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: list[tuple[Any, int]] = []
        self._age = 0

    def take(self) -> Any:
        try:
            connection, age = self._idle.pop()
        except IndexError:  # not asked before: another thread may take the last one in between
            return self._pool.get_connection(*_NAME)
        if age != self._age:
            connection.disconnect()
        return connection  # sending connects it where it is not

    def give(self, connection: Any) -> None:
        self._idle.append((connection, self._age))

    def drop(self) -> None:
        self._age += 1


def _direct_sync(connections: _BorrowedSync | _KeptSync) -> SendSync:
    """Send over a connection of the pool; see :func:`_direct`."""

    def send(command: Command) -> Any:
        try:
            return once(command)
        except _AGAIN:
            # Where one had idled too long, the others have as well.
            connections.drop()
            return once(command)

    def once(command: Command) -> Any:
        script, rest = command
        connection = connections.take()
        try:
            connection.send_packed_command((pack(b"EVALSHA", script.sha, rest),))
            try:
                return connection.read_response(disable_decoding=True)
            except NoScriptError:
                connection.send_packed_command((pack(b"EVAL", script.text, rest),))
                return connection.read_response(disable_decoding=True)
        except ResponseError as error:
            told = unwrapped(error)
            if isinstance(told, ReadOnlyError):
                connection.disconnect()
            raise told from error
        except BaseException:
            # A signal may have come between the command and its reply, which the next command would be given.
            connection.disconnect()
            raise
        finally:
            connections.give(connection)

    return send


def _through_sync(client: Any) -> SendSync:
    def send(command: Command) -> Any:
        try:
            return once(command)
        except (redis.ConnectionError, ResponseError) as error:
            pool = _to_reconnect(error, client)
            if pool is None:
                raise
            pool.disconnect(inuse_connections=False)
            return once(command)

    def once(command: Command) -> Any:
        script, rest = command
        try:
            return client.execute_command(EVALSHA, script.sha, *rest, **RAW)
        except NoScriptError:
            return client.execute_command(EVAL, script.text, *rest, **RAW)

    return send


async def send_and_wait(client: Any, command: Command, wait: Wait) -> list[Any]:
    """Send a command and a WAIT behind it on the same connection; return both replies."""
    if isinstance(client, aiocluster.RedisCluster):
        return await _wait_in_cluster(client, command, wait)
    replies: list[Any] = []
    for pair in _attempts(command):
        pipe = client.pipeline(transaction=False)
        pipe.execute_command(*pair, **RAW)
        pipe.execute_command(*wait)
        replies = await pipe.execute(raise_on_error=False)
        if not isinstance(replies[0], NoScriptError):
            break
    return _sound(replies)


async def _wait_in_cluster(client: Any, command: Command, wait: Wait) -> list[Any]:
    # The plain command first: it follows the slot wherever it went, and the repeated one then finds it there.
    await _through(client)(command)
    script, rest = command
    node = client.get_node_from_key(rest[1])
    connection = node.acquire_connection()
    try:
        await connection.send_packed_command(
            connection.pack_commands([(EVALSHA, script.sha, *rest), wait]),
        )
        replies = []
        for _ in range(2):
            try:
                replies.append(await connection.read_response(disable_decoding=True))
            except ResponseError as error:
                replies.append(error)
    finally:
        getattr(node, "release", node._free.append)(connection)
    return _sound(replies)


def send_and_wait_sync(client: Any, command: Command, wait: Wait) -> list[Any]:
    """See :func:`send_and_wait`."""
    target = client
    if isinstance(client, redis.RedisCluster):
        sender_sync(client)(command)
        node: Any = client.get_node_from_key(command[1][1])
        target = client.get_redis_connection(node)
    replies: list[Any] = []
    for pair in _attempts(command):
        pipe = target.pipeline(transaction=False)
        pipe.execute_command(*pair, **RAW)
        pipe.execute_command(*wait)
        replies = pipe.execute(raise_on_error=False)
        if not isinstance(replies[0], NoScriptError):
            break
    return _sound(replies)


def _attempts(command: Command) -> list[tuple[Any, ...]]:
    script, rest = command
    return [(EVALSHA, script.sha, *rest), (EVAL, script.text, *rest)]


def _sound(replies: list[Any]) -> list[Any]:
    """Raise what became of the command itself; a failed wait is the store's to judge."""
    if isinstance(replies[0], AskError):
        raise redis.ConnectionError("the cluster is moving the slot of this key") from replies[0]
    if isinstance(replies[0], Exception):
        raise replies[0]
    return replies

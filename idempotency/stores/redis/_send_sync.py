"""How a command of a thread is sent; see :mod:`idempotency.stores.redis._send`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import redis
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from idempotency.stores.redis._failures import unwrapped
from idempotency.stores.redis._send import (
    COMMAND_NAME,
    RAW,
    REPEATED,
    Wait,
    attempts_of,
    checked,
    pool_to_reconnect,
)
from idempotency.stores.redis._wire import EVAL, EVALSHA, Command, pack

SendSync = Callable[[Command], Any]


def sender_sync(client: Any, own: bool = False) -> SendSync:
    """Choose how a blocking client's commands are sent; see :func:`~idempotency.stores.redis._send.sender`."""
    if _is_plain_sync(client):
        return _direct_sync(SyncOwnPool(client.connection_pool) if own else SyncSharedPool(client.connection_pool))
    return _through_sync(client)


def _is_plain_sync(client: Any) -> bool:
    """Return whether only redis-py itself handles this client's commands."""
    return (
        type(client) is redis.Redis
        and inspect.isfunction(redis.Redis.execute_command)
        and not hasattr(redis.Redis.execute_command, "__wrapped__")
        and client.connection is None
        and type(client.connection_pool).__module__.startswith("redis.connection")
        and client.connection_pool.connection_class.__module__.startswith("redis.connection")
    )


class SyncSharedPool:
    """See :class:`~idempotency.stores.redis._send.SharedPool`."""

    __slots__ = ("drop", "give", "take")

    def __init__(self, pool: Any) -> None:
        self.take: Callable[[], Any] = functools.partial(pool.get_connection, *COMMAND_NAME)
        self.give: Callable[[Any], None] = pool.release
        self.drop: Callable[[], None] = functools.partial(pool.disconnect, inuse_connections=False)


class SyncOwnPool:
    """See :class:`~idempotency.stores.redis._send.OwnPool`: to take and give back is a third of a blocking round trip.

    An idle connection that was dropped connects again when a command is sent over it.
    """

    __slots__ = ("_generation", "_idle", "_pool")

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: list[tuple[Any, int]] = []
        self._generation = 0

    def take(self) -> Any:
        try:
            connection, generation = self._idle.pop()
        except IndexError:  # not asked before: another thread may take the last one in between
            return self._pool.get_connection(*COMMAND_NAME)
        if generation != self._generation:
            connection.disconnect()
        return connection

    def give(self, connection: Any) -> None:
        self._idle.append((connection, self._generation))

    def drop(self) -> None:
        self._generation += 1


def _direct_sync(connections: SyncSharedPool | SyncOwnPool) -> SendSync:
    """Send over a connection of the pool; see :func:`~idempotency.stores.redis._send._direct`."""

    def send(command: Command) -> Any:
        try:
            return once(command)
        except REPEATED:
            # Where one connection was idle for too long, the others were as well.
            connections.drop()
            return once(command)

    def once(command: Command) -> Any:
        script, rest = command
        connection = connections.take()
        try:
            # sync only: a sequence of packed parts.
            connection.send_packed_command((pack(script.by_digest, rest),))
            try:
                return connection.read_response(disable_decoding=True)
            except NoScriptError:
                # sync only: a sequence of packed parts.
                connection.send_packed_command((pack(script.by_text, rest),))
                return connection.read_response(disable_decoding=True)
        except ResponseError as error:
            cause = unwrapped(error)
            if isinstance(cause, ReadOnlyError):
                connection.disconnect()
            raise cause from error
        # sync only: what interrupts an asyncio client disconnects it.
        except BaseException:
            # A signal may have come between the command and its reply, which the next command would read.
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
            pool = pool_to_reconnect(error, client)
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


def send_and_wait_sync(client: Any, command: Command, wait: Wait) -> list[Any]:
    """Send a command and a WAIT behind it on the same connection; return both replies."""
    target = client
    if isinstance(client, redis.RedisCluster):
        sender_sync(client)(command)
        node: Any = client.get_node_from_key(command[1][1])
        target = client.get_redis_connection(node)
    replies: list[Any] = []
    for attempt in attempts_of(command):
        pipe = target.pipeline(transaction=False)
        pipe.execute_command(*attempt, **RAW)
        pipe.execute_command(*wait)
        replies = pipe.execute(raise_on_error=False)
        if not isinstance(replies[0], NoScriptError):
            break
    return checked(replies)

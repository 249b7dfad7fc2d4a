"""The store on Redis: its verbs, for asyncio and for threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Self

import redis
import redis.asyncio as aioredis
from redis.asyncio import cluster as aiocluster
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MaxConnectionsError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)

from idempotency._durations import DAY, positive
from idempotency._rules import Claim, Record, State
from idempotency._synchronization import Deadline
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.base import Changed, Entry
from idempotency.stores.redis import _wire as wire
from idempotency.stores.redis._open import (
    Address,
    AsyncClient,
    SyncClient,
    abandon,
    clients_of,
    max_connections_of,
    place_of,
    read_url,
)
from idempotency.stores.redis._send import (
    RAW,
    Send,
    SendSync,
    send_and_wait,
    send_and_wait_sync,
    sender,
    sender_sync,
    unwrapped,
)
from idempotency.stores.redis._watch import Watchers
from idempotency.stores.redis._wire import Command, Durability

_AT_ONCE = 32
"""Commands in flight per event loop: more only queue in the server, and could exhaust the client's connections."""

_FAILED = (RedisError, RedisClusterException, OSError, RuntimeError)
"""What redis-py raises; RuntimeError is a client of another event loop."""


_BLOCKING = "this RedisStore has only a blocking client, and its verbs are awaited: give it a redis.asyncio client"
_AWAITED = "this RedisStore has only an asyncio client, and its verbs are not awaited: give it a sync_client"


class _Loop:
    """What belongs to one event loop: a client, how many commands may use it at once, and what is watched."""

    __slots__ = ("client", "loop", "send", "slots", "watching")

    def __init__(self, loop: AbstractEventLoop, client: AsyncClient, own: bool) -> None:
        room = max_connections_of(client)
        self.loop = loop
        self.client = client
        self.send: Send = sender(client, own)
        self.slots = asyncio.Semaphore(max(1, min(_AT_ONCE, room - 1)))
        self.watching = Watchers(client, room)


class _Threads:
    """What all threads share: the blocking client, and how many commands may use it at once.

    A forked child makes its own: turns may have been taken, and connections are the parent's.
    """

    __slots__ = ("client", "pid", "send", "slots")

    def __init__(self, client: SyncClient, own: bool) -> None:
        self.pid = os.getpid()
        self.client = client
        self.send: SendSync = sender_sync(client, own)
        # A queue of so many turns: a threading.Semaphore costs ten times as much.
        self.slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(max(1, min(_AT_ONCE, max_connections_of(client)))):
            self.slots.put(None)


class RedisStore:
    """Keep records in Redis.

    ``client``: a ``redis.asyncio.Redis`` or ``RedisCluster`` for the asyncio verbs. It is never closed by the store. A
    blocking client given here is taken for ``sync_client``.
    ``sync_client``: a ``redis.Redis`` or ``RedisCluster`` for the ``*_sync`` verbs. It is bounded by its own
    ``socket_timeout``.
    ``prefix``: how the names of keys and channels begin. Default ``"idempotency"``.
    ``timeout``: seconds within which an asyncio verb ends, also when the server is frozen. Default 5.
    ``durability``: a :class:`Durability`; default None, see there what a failover can lose.

    Run the server with ``maxmemory-policy noeviction`` (or ``volatile-ttl`` and enough memory): an evicted record is a
    forgotten key, and its operation can run again. A user with restricted rights needs ``+eval +evalsha`` and the
    commands of the scripts on ``~{prefix}:*``, and ``&{prefix}:*`` for waiting duplicates.

    Raises :class:`~idempotency.errors.ConfigurationError` for a client or value that cannot be used. Every verb raises
    :class:`~idempotency.errors.StoreError` when Redis cannot be reached, refuses, or gives no answer in time.
    """

    def __init__(
        self,
        client: AsyncClient | SyncClient | None = None,
        *,
        sync_client: SyncClient | None = None,
        prefix: str = "idempotency",
        timeout: float = 5.0,
        durability: Durability | None = None,
    ) -> None:
        if isinstance(client, (redis.Redis, redis.RedisCluster)):
            if sync_client is not None:
                raise ConfigurationError("both clients are blocking: give the first one a redis.asyncio client")
            client, sync_client = None, client
        if client is None and sync_client is None:
            raise ConfigurationError("RedisStore needs a client, or a URL: RedisStore.from_url('redis://localhost')")
        if client is not None and not isinstance(client, (aioredis.Redis, aiocluster.RedisCluster)):
            raise ConfigurationError(f"RedisStore takes a redis-py client, not {type(client).__name__}")
        self._setup(prefix, timeout, durability)
        self._client = client
        self._sync = sync_client
        self._place = place_of(client or sync_client)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        prefix: str = "idempotency",
        timeout: float = 5.0,
        durability: Durability | None = None,
    ) -> Self:
        """Open a store by URL, for the asyncio and the blocking verbs; it connects at its first use.

        ``redis://``, ``rediss://``, ``unix://`` (one server), ``redis+cluster://host:port,host:port``,
        ``redis+sentinel://host:port,host:port/service/db``; with TLS ``rediss+cluster://`` and ``rediss+sentinel://``.
        The query takes the options of a redis-py connection, and ``sentinel_username`` and ``sentinel_password``.
        The options are those of the class. :meth:`aclose` and :meth:`close` close what was opened.
        """
        store = cls.__new__(cls)
        store._address = read_url(url)
        store._setup(prefix, timeout, durability)
        store._place = store._address.place
        return store

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError where this store was given a client of the other side."""
        if self._address is None and asynchronous and self._client is None:
            raise ConfigurationError(_BLOCKING)
        if self._address is None and not asynchronous and self._sync is None:
            raise ConfigurationError(_AWAITED)

    _address: Address | None = None
    _client: AsyncClient | None = None
    _sync: SyncClient | None = None
    _here: _Loop | None = None
    _bulk: int | None = None
    _place: str

    def _setup(self, prefix: str, timeout: float, durability: Durability | None) -> None:
        timeout = positive("timeout", timeout, DAY)
        if not isinstance(prefix, str) or not prefix:
            raise ConfigurationError(f"prefix must be text, and not empty, not {prefix!r}")
        if durability is not None and durability.timeout >= timeout:
            raise ConfigurationError(
                f"the store's timeout ({timeout!r}) must be longer than the durability's ({durability.timeout!r})"
            )
        self._prefix = f"{prefix}:1:".encode()
        self._timeout = timeout
        self._durability = durability
        # Connections of our own are kept for single commands. Those that wait for copies take theirs from the pool.
        self._keeps = self._address is not None and durability is None
        self._loops: dict[AbstractEventLoop, _Loop] = {}
        self._opening = threading.Lock()
        self._threads: _Threads | None = None

    # The asyncio verbs.

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`idempotency.stores.base.Store.claim`."""
        command = wire.claim(self._key(claim), claim)
        if self._durability is None:
            return wire.record(claim, await self._run(command))
        reply, copies = await self._run_durably(command, self._durability)
        record = wire.record(claim, reply)
        if record.token == claim.token and not self._durability.met(copies):
            with contextlib.suppress(StoreError):
                await self.release(claim)
            raise self._too_few(copies)
        return record

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.renew`."""
        return bool(await self._run(wire.renew(self._key(claim), claim)))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`idempotency.stores.base.Store.complete`."""
        if result is not None and len(result) > wire.SMALL:
            wire.check_size(result, await self._largest())
        command = wire.complete(self._key(claim), claim, result, state)
        if self._durability is None:
            return bool(await self._run(command))
        reply, copies = await self._run_durably(command, self._durability)
        if reply and not self._durability.met(copies):
            raise self._too_few(copies)
        return bool(reply)

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.release`."""
        return bool(await self._run(wire.release(self._key(claim), claim)))

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """See :meth:`idempotency.stores.base.Store.watch`; one connection serves all watchers of an event loop."""
        return self._enter().watching.watch(self._key(claim))

    async def check(self) -> None:
        """Raise :class:`~idempotency.errors.StoreError` unless Redis answers and runs the store's scripts."""
        await self._bounded(self._enter(), lambda here: here.client.ping())
        await self.inspect(bytes(32))

    async def aclose(self) -> None:
        """Close what the store itself opened, never a client that was passed in."""
        running = asyncio.get_running_loop()
        loops, self._loops, self._here = self._loops, {}, None
        for here in loops.values():
            if here.loop is not running:
                self._abandon(here)
                continue
            await here.watching.aclose()
            if self._address is not None:
                for client in clients_of(here.client):
                    with contextlib.suppress(*_FAILED):
                        await client.aclose()
        self.close()

    # The blocking verbs.

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`idempotency.stores.base.Store.claim`."""
        command = wire.claim(self._key(claim), claim)
        if self._durability is None:
            return wire.record(claim, self._run_sync(command))
        reply, copies = self._run_durably_sync(command, self._durability)
        record = wire.record(claim, reply)
        if record.token == claim.token and not self._durability.met(copies):
            with contextlib.suppress(StoreError):
                self.release_sync(claim)
            raise self._too_few(copies)
        return record

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.renew`."""
        return bool(self._run_sync(wire.renew(self._key(claim), claim)))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`idempotency.stores.base.Store.complete`."""
        if result is not None and len(result) > wire.SMALL:
            wire.check_size(result, self._largest_sync())
        command = wire.complete(self._key(claim), claim, result, state)
        if self._durability is None:
            return bool(self._run_sync(command))
        reply, copies = self._run_durably_sync(command, self._durability)
        if reply and not self._durability.met(copies):
            raise self._too_few(copies)
        return bool(reply)

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.release`."""
        return bool(self._run_sync(wire.release(self._key(claim), claim)))

    def close(self) -> None:
        """Close the blocking client, if the store itself opened it."""
        if self._address is not None:
            with self._opening:
                client, self._sync, self._threads = self._sync, None, None
            for each in clients_of(client) if client is not None else ():
                with contextlib.suppress(*_FAILED):
                    each.close()

    # Housekeeping.

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`idempotency.stores.base.Housekeeping.inspect`; None also for a record that makes no sense."""
        return wire.entry(record, await self._look(record))

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        return wire.entry(record, self._run_sync(wire.inspect(self._prefix + record.hex().encode())))

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """See :meth:`idempotency.stores.base.Housekeeping.unresolved`; it scans all keys of the database."""
        client: Any = self._enter().client
        if isinstance(client, aiocluster.RedisCluster):
            await self._bounded(self._enter(), lambda _: client.initialize())
        found: list[tuple[int, Entry]] = []
        for server in client.get_primaries() if isinstance(client, aiocluster.RedisCluster) else [client]:
            cursor = None
            while cursor != 0:
                cursor, ids = await self._scan(server, cursor or 0)
                replies = await asyncio.gather(*map(self._look, ids))
                for record, reply in zip(ids, replies, strict=True):
                    entry = wire.entry(record, reply)
                    if entry is not None and entry.unresolved:
                        found.append((wire.first_claimed(reply), entry))
        return [entry for _, entry in sorted(found, key=lambda one: one[0])[:limit]]

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`idempotency.stores.base.Housekeeping.resolve`."""
        if outcome not in ("done", "release"):
            raise ConfigurationError(f"an outcome is 'done' or 'release', not {outcome!r}")
        key = self._prefix + record.hex().encode()
        return bool(await self._run(wire.resolve(key, outcome, result, ttl)))

    async def create_schema(self) -> None:
        """Do nothing: there is no schema."""

    async def forget(self, record: bytes, /) -> bool:
        """Forget a record, so that its operation runs again; False when there is none, or it is being run."""
        return bool(await self._run(wire.forget(self._prefix + record.hex().encode())))

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        return bool(self._run_sync(wire.forget(self._prefix + record.hex().encode())))

    async def purge(self, batch: int = 1000) -> int:
        """Return 0: the server expires records itself."""
        return 0

    # How they get there.

    def _key(self, claim: Claim) -> bytes:
        return self._prefix + claim.id.hex().encode()

    async def _run(self, command: Command) -> Any:
        here = self._here
        if here is None or here.loop is not asyncio.get_running_loop():
            here = self._enter()
        try:
            with Deadline(here.loop, self._timeout):
                async with here.slots:
                    return await here.send(command)
        except _FAILED as error:
            raise self._failed(error) from error

    async def _run_durably(self, command: Command, durability: Durability) -> list[Any]:
        replies: list[Any] = await self._bounded(
            self._enter(), lambda here: send_and_wait(here.client, command, durability.command)
        )
        return replies

    async def _largest(self) -> int:
        if self._bulk is None:
            reply = None
            with contextlib.suppress(StoreError):  # a user may not ask
                reply = await self._bounded(self._enter(), lambda here: here.client.execute_command(*wire.ASK_BULK))
            self._bulk = wire.bulk(reply)
        return self._bulk

    def _largest_sync(self) -> int:
        if self._bulk is None:
            reply = None
            with contextlib.suppress(StoreError):
                reply = self._bounded_sync(_ask_bulk)
            self._bulk = wire.bulk(reply)
        return self._bulk

    async def _look(self, record: bytes) -> Any:
        return await self._run(wire.inspect(self._prefix + record.hex().encode()))

    async def _scan(self, server: Any, cursor: int) -> tuple[int, list[bytes]]:
        command = wire.scan(self._prefix, cursor)
        after, keys = await self._bounded(self._enter(), lambda _: server.execute_command(*command, **RAW))
        return after, wire.ids(self._prefix, keys)

    async def _bounded(self, here: _Loop, action: Callable[[_Loop], Awaitable[Any]]) -> Any:
        try:
            with Deadline(here.loop, self._timeout):
                async with here.slots:
                    return await action(here)
        except _FAILED as error:
            raise self._failed(error) from error

    def _run_sync(self, command: Command) -> Any:
        return self._bounded_sync(lambda threads: threads.send(command))

    def _run_durably_sync(self, command: Command, durability: Durability) -> list[Any]:
        replies: list[Any] = self._bounded_sync(
            lambda threads: send_and_wait_sync(threads.client, command, durability.command)
        )
        return replies

    def _bounded_sync(self, action: Callable[[_Threads], Any]) -> Any:
        try:
            threads = self._threads
            if threads is None or threads.pid != os.getpid():
                threads = self._enter_sync()
            try:
                threads.slots.get(timeout=self._timeout)
            except queue.Empty:
                raise TimeoutError from None
            try:
                return action(threads)
            finally:
                threads.slots.put(None)
        except _FAILED as error:
            raise self._failed(error) from error

    def _enter(self) -> _Loop:
        """Find what belongs to the running event loop: a connection works only in the loop it was made in."""
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            client = self._client
            if client is None and self._address is not None:
                client = self._address.open(self._timeout)
            if client is None:
                raise ConfigurationError(_BLOCKING)
            for closed in [other for other in self._loops if other.is_closed()]:
                self._abandon(self._loops.pop(closed))
            here = self._loops[loop] = _Loop(loop, client, self._keeps)
        self._here = here
        return here

    def _enter_sync(self) -> _Threads:
        with self._opening:
            if self._sync is None:
                if self._address is None:
                    raise ConfigurationError(_AWAITED)
                self._sync = self._address.open_sync(self._timeout)
            if self._threads is None or self._threads.pid != os.getpid():
                self._threads = _Threads(self._sync, self._keeps)
            return self._threads

    def _abandon(self, here: _Loop) -> None:
        if self._address is None:
            return
        if here.loop.is_closed():
            abandon(here.client)
        else:
            with contextlib.suppress(RuntimeError):
                here.loop.call_soon_threadsafe(abandon, here.client)

    def __del__(self) -> None:
        for here in getattr(self, "_loops", {}).values():
            if here.loop.is_closed():
                self._abandon(here)

    def _failed(self, error: BaseException) -> StoreError:
        return StoreError(f"Redis at {self._place}: {_told(error, self._timeout)}")

    def _too_few(self, copies: Any) -> StoreError:
        return StoreError(
            f"Redis at {self._place}: the write has reached too few copies ({copies}); check the replicas"
        )


def _ask_bulk(threads: _Threads) -> Any:
    client: Any = threads.client
    return client.execute_command(*wire.ASK_BULK)


def _told(error: BaseException, timeout: float) -> str:
    """Say what went wrong and what to do about it."""
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
            return "the client has no connection left; raise its max_connections"
        case TimeoutError() | redis.TimeoutError():
            return f"no answer within {timeout:g} s; check that the server is up and reachable"
        case redis.ConnectionError() | OSError():
            return f"{error}; start the server, or correct the URL"
        case RuntimeError():
            return f"{error}; an asyncio client works in one event loop: open the store with RedisStore.from_url"
        case _:
            return str(error)

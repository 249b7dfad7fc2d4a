"""The store on Redis: its verbs, for asyncio and for threads."""

from __future__ import annotations

import contextlib
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Self, TypeVar

import redis
import redis.asyncio as aioredis
from redis.asyncio import cluster as aiocluster

from idempotency._durations import DAY, positive
from idempotency._rules import Claim, Record, State
from idempotency._sagas.journal import Request
from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores._clock_guard import Asked, ClockGuard
from idempotency.stores._operating import check_and_examine
from idempotency.stores._sealing import findings_in, sealed_result, sealing_of
from idempotency.stores._versions import OLDEST, WITH_NAMES, check_write_version
from idempotency.stores.base import Changed, Entry, Finding
from idempotency.stores.encryption import Encryption
from idempotency.stores.redis import _examine, _sagas
from idempotency.stores.redis import _wire as wire
from idempotency.stores.redis._audit import AuditInRedis
from idempotency.stores.redis._clients import Clients
from idempotency.stores.redis._find import ListingInRedis
from idempotency.stores.redis._open import AsyncClient, SyncClient, read_url
from idempotency.stores.redis._per_loop import Threads
from idempotency.stores.redis._send import send_and_wait
from idempotency.stores.redis._send_sync import send_and_wait_sync
from idempotency.stores.redis._wire import Command, Durability

R = TypeVar("R")


class RedisStore(ListingInRedis, AuditInRedis):
    """Store records in Redis.

    ``client``: a ``redis.asyncio.Redis`` or ``RedisCluster`` for the asyncio verbs. It is never closed by the store,
    which holds one connection of its pool for all verbs of an event loop, until :meth:`aclose`. A blocking client given
    here is used as ``sync_client``.
    ``sync_client``: a ``redis.Redis`` or ``RedisCluster`` for the ``*_sync`` verbs. It is bounded by its own
    ``socket_timeout``.
    ``prefix``: how the names of keys and channels begin. Default ``"idempotency"``.
    ``timeout``: seconds within which an asyncio verb ends, also when the server does not respond. Default 5.
    ``durability``: a :class:`Durability`; default None, see there what a failover can lose.
    ``encryption``: an :class:`~idempotency.stores.encryption.Encryption` of results, scopes and keys; default None.
    ``digest_names``: whether scopes and keys are stored as digests only. Default False.
    ``write_version``: 2 to write the names of operations, 1 not to, the default; see :doc:`contracts <contracts>`.

    In a cluster the sagas of one name, and their indexes, are on one server; those of another name may be on another.

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
        encryption: Encryption | None = None,
        digest_names: bool = False,
        write_version: int = OLDEST,
    ) -> None:
        if isinstance(client, (redis.Redis, redis.RedisCluster)):
            if sync_client is not None:
                raise ConfigurationError("both clients are blocking: give the first one a redis.asyncio client")
            client, sync_client = None, client
        if client is None and sync_client is None:
            raise ConfigurationError("RedisStore needs a client, or a URL: RedisStore.from_url('redis://localhost')")
        if client is not None and not isinstance(client, (aioredis.Redis, aiocluster.RedisCluster)):
            raise ConfigurationError(f"RedisStore takes a redis-py client, not {type(client).__name__}")
        self._sealing = sealing_of(encryption, digest_names)
        timeout = self._set_up(prefix, timeout, durability, write_version)
        self._clients = Clients(client, sync_client, timeout=timeout, share=durability is None)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        prefix: str = "idempotency",
        timeout: float = 5.0,
        durability: Durability | None = None,
        encryption: Encryption | None = None,
        digest_names: bool = False,
        write_version: int = OLDEST,
    ) -> Self:
        """Open a store by URL, for the asyncio and the blocking verbs; it connects at its first use.

        ``redis://``, ``rediss://``, ``unix://`` (one server), ``redis+cluster://host:port,host:port``,
        ``redis+sentinel://host:port,host:port/service/db``; with TLS ``rediss+cluster://`` and ``rediss+sentinel://``.
        The query takes the options of a redis-py connection, and ``sentinel_username`` and ``sentinel_password``.
        The options are those of the class. :meth:`aclose` and :meth:`close` close what was opened.
        """
        store = cls.__new__(cls)
        address = read_url(url)
        store._sealing = sealing_of(encryption, digest_names)
        timeout = store._set_up(prefix, timeout, durability, write_version)
        # Commands that wait for copies use the client's pool, and so do the others then.
        alone = durability is None
        store._clients = Clients(None, None, address=address, timeout=timeout, own=alone, share=alone)
        return store

    def _set_up(self, prefix: str, timeout: float, durability: Durability | None, write_version: int) -> float:
        timeout = positive("timeout", timeout, DAY)
        if not isinstance(prefix, str) or not prefix:
            raise ConfigurationError(f"prefix must be text, and not empty, not {prefix!r}")
        if durability is not None and durability.timeout >= timeout:
            raise ConfigurationError(
                f"the store's timeout ({timeout!r}) must be longer than the durability's ({durability.timeout!r})"
            )
        self._prefix = f"{prefix}:1:".encode()
        self._writes_names = check_write_version(write_version) >= WITH_NAMES
        self._durability = durability
        self._sagas = _sagas.Sagas(self._prefix, self._sealing)
        self._largest_result: int | None = None
        self._clock_guard = ClockGuard()
        return timeout

    @property
    def writes_names(self) -> bool:
        """Return whether the names of operations are written."""
        return self._writes_names

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError if this store was given only clients for the other kind of verbs."""
        self._clients.check_side(asynchronous)

    # The asyncio verbs.

    async def claim(self, claim: Claim, /) -> Record:
        """See :meth:`idempotency.stores.base.Store.claim`."""
        asked = self._clock_guard.ask(claim)
        command = wire.claim(self._key_of(claim.id), claim, asked.latest, self._sealing, named=self._writes_names)
        if self._durability is None:
            return self._read(asked, claim, await self._clients.run(command))
        reply, copies = await self._run_durably(command, self._durability)
        record = self._read(asked, claim, reply)
        if record.token == claim.token and not self._durability.met(copies):
            with contextlib.suppress(StoreError):
                await self.release(claim)
            raise self._too_few(copies)
        return record

    async def renew(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.renew`."""
        return bool(await self._clients.run(wire.renew(self._key_of(claim.id), claim)))

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`idempotency.stores.base.Store.complete`."""
        result = sealed_result(self._sealing, claim.id, result)
        if result is not None and len(result) > wire.SMALL:
            wire.check_size("result", len(result), await self._largest())
        command = wire.complete(self._key_of(claim.id), claim, result, state)
        if self._durability is None:
            return bool(await self._clients.run(command))
        reply, copies = await self._run_durably(command, self._durability)
        if reply and not self._durability.met(copies):
            raise self._too_few(copies)
        return bool(reply)

    async def release(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.release`."""
        return bool(await self._clients.run(wire.release(self._key_of(claim.id), claim)))

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """See :meth:`idempotency.stores.base.Store.watch`; one connection serves all watchers of an event loop."""
        return self._clients.here().watchers.watch(self._key_of(claim.id))

    async def check(self) -> None:
        """Raise :class:`~idempotency.errors.StoreError` unless Redis answers and runs the store's scripts."""
        await self._clients.bounded(lambda here: here.client.ping())
        await self.inspect(bytes(32))

    async def aclose(self) -> None:
        """Close what the store itself opened, never a client that was passed in."""
        await self._clients.aclose()

    # The blocking verbs.

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`idempotency.stores.base.Store.claim`."""
        asked = self._clock_guard.ask(claim)
        command = wire.claim(self._key_of(claim.id), claim, asked.latest, self._sealing, named=self._writes_names)
        if self._durability is None:
            return self._read(asked, claim, self._clients.run_sync(command))
        reply, copies = self._run_durably_sync(command, self._durability)
        record = self._read(asked, claim, reply)
        if record.token == claim.token and not self._durability.met(copies):
            with contextlib.suppress(StoreError):
                self.release_sync(claim)
            raise self._too_few(copies)
        return record

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.renew`."""
        return bool(self._clients.run_sync(wire.renew(self._key_of(claim.id), claim)))

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`idempotency.stores.base.Store.complete`."""
        result = sealed_result(self._sealing, claim.id, result)
        if result is not None and len(result) > wire.SMALL:
            wire.check_size("result", len(result), self._largest_sync())
        command = wire.complete(self._key_of(claim.id), claim, result, state)
        if self._durability is None:
            return bool(self._clients.run_sync(command))
        reply, copies = self._run_durably_sync(command, self._durability)
        if reply and not self._durability.met(copies):
            raise self._too_few(copies)
        return bool(reply)

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`idempotency.stores.base.Store.release`."""
        return bool(self._clients.run_sync(wire.release(self._key_of(claim.id), claim)))

    def close(self) -> None:
        """Close the blocking client, if the store itself opened it."""
        self._clients.close()

    # Housekeeping.

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`idempotency.stores.base.Inspecting.inspect`; None also for a record that makes no sense."""
        return wire.entry(record, await self._clients.run(wire.inspect(self._key_of(record))), self._sealing)

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`inspect`."""
        return wire.entry(record, self._clients.run_sync(wire.inspect(self._key_of(record))), self._sealing)

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`idempotency.stores.base.Resolving.resolve`."""
        return bool(await self._clients.run(self._resolution(record, outcome, result, ttl)))

    def resolve_sync(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`resolve`."""
        return bool(self._clients.run_sync(self._resolution(record, outcome, result, ttl)))

    def _resolution(self, record: bytes, outcome: str, result: bytes | None, ttl: float) -> wire.Command:
        if outcome not in ("done", "release"):
            raise ConfigurationError(f"an outcome is 'done' or 'release', not {outcome!r}")
        return wire.resolve(self._key_of(record), outcome, sealed_result(self._sealing, record, result), ttl)

    async def examine(self) -> list[Finding]:
        """See :meth:`idempotency.stores.base.Examining.examine`."""
        healthy = "reachable, and it runs the store's scripts"
        return await check_and_examine(self.check, healthy, self._examine)

    async def _examine(self) -> list[Finding]:
        return [*await _examine.examine(self._clients), *await findings_in(self._sealing, self.find)]

    @property
    def schema(self) -> str:
        """Return nothing: Redis needs no schema."""
        return ""

    async def create_schema(self) -> None:
        """Do nothing: there is no schema."""

    async def forget(self, record: bytes, /) -> bool:
        """See :meth:`idempotency.stores.base.Forgetting.forget`."""
        return bool(await self._clients.run(wire.forget(self._key_of(record))))

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`forget`."""
        return bool(self._clients.run_sync(wire.forget(self._key_of(record))))

    async def purge(self, batch: int = 1000) -> int:
        """Return 0: the server expires records itself."""
        return 0

    # Sagas.

    async def journal(self, request: Request[R], /) -> R:
        """See :meth:`idempotency._sagas.journal.Journaling.journal`."""
        steps = self._sagas.steps(request)
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._answer(step)
                except StoreError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            found: R = end.value
            return found

    def journal_sync(self, request: Request[R], /) -> R:
        """See :meth:`journal`."""
        steps = self._sagas.steps(request)
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._answer_sync(step)
                except StoreError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            found: R = end.value
            return found

    async def _answer(self, step: _sagas.Step) -> _sagas.Answer:
        if step.largest > wire.SMALL:
            wire.check_size("largest value", step.largest, await self._largest())
        if self._durability is None or not step.durable:
            return await self._clients.run(step.command), None
        reply, copies = await self._run_durably(step.command, self._durability)
        return reply, None if self._durability.met(copies) else self._too_few(copies)

    def _answer_sync(self, step: _sagas.Step) -> _sagas.Answer:
        if step.largest > wire.SMALL:
            wire.check_size("largest value", step.largest, self._largest_sync())
        if self._durability is None or not step.durable:
            return self._clients.run_sync(step.command), None
        reply, copies = self._run_durably_sync(step.command, self._durability)
        return reply, None if self._durability.met(copies) else self._too_few(copies)

    # How commands are sent.

    def _key_of(self, record: bytes) -> bytes:
        return self._prefix + record.hex().encode()

    def _read(self, asked: Asked, claim: Claim, reply: Any) -> Record:
        return self._clock_guard.read(asked, claim, wire.record(claim, reply, self._sealing), wire.clock(reply))

    async def _run_durably(self, command: Command, durability: Durability) -> list[Any]:
        replies: list[Any] = await self._clients.bounded(
            lambda here: send_and_wait(here.client, command, durability.command)
        )
        return replies

    def _run_durably_sync(self, command: Command, durability: Durability) -> list[Any]:
        replies: list[Any] = self._clients.bounded_sync(
            lambda threads: send_and_wait_sync(threads.client, command, durability.command)
        )
        return replies

    async def _largest(self) -> int:
        if self._largest_result is None:
            reply = None
            with contextlib.suppress(StoreError):  # the user may not be allowed to ask
                reply = await self._clients.bounded(lambda here: here.client.execute_command(*wire.ASK_BULK))
            self._largest_result = wire.bulk(reply)
        return self._largest_result

    def _largest_sync(self) -> int:
        if self._largest_result is None:
            reply = None
            with contextlib.suppress(StoreError):
                reply = self._clients.bounded_sync(_ask_bulk)
            self._largest_result = wire.bulk(reply)
        return self._largest_result

    def _too_few(self, copies: Any) -> StoreError:
        return StoreError(
            f"Redis at {self._clients.server}: the write has reached too few copies ({copies}); check the replicas"
        )


def _ask_bulk(threads: Threads) -> Any:
    client: Any = threads.client
    return client.execute_command(*wire.ASK_BULK)

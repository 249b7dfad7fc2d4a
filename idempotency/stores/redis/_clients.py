"""The clients of one store: opened where they are first used, used in bounded time, and closed at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import cluster as aiocluster

from idempotency.errors import ConfigurationError, StoreError
from idempotency.stores.redis._failures import CLIENT_ERRORS, describe_failure
from idempotency.stores.redis._open import Address, AsyncClient, SyncClient, abandon, clients_of, server_of
from idempotency.stores.redis._per_loop import PerLoop, Threads
from idempotency.stores.redis._send import RAW
from idempotency.stores.redis._wire import Command

_BLOCKING = "this RedisStore has only a blocking client, and its verbs are awaited: give it a redis.asyncio client"
_AWAITED = "this RedisStore has only an asyncio client, and its verbs are not awaited: give it a sync_client"


class Clients:
    """The clients of one store: those it was given, or those it opens at an address.

    ``timeout``: seconds within which an awaited action ends. ``own``: only this store sends over the connections.
    ``share``: whether the awaited single commands of an event loop may share one connection.
    """

    def __init__(
        self,
        client: AsyncClient | None,
        sync_client: SyncClient | None,
        *,
        address: Address | None = None,
        timeout: float,
        own: bool = False,
        share: bool = True,
    ) -> None:
        self.sync_client = sync_client
        self._client = client
        self._address = address
        self._timeout = timeout
        self._own = own
        self._share = share
        self._loops: dict[AbstractEventLoop, PerLoop] = {}
        self.server = server_of(client or sync_client) if address is None else address.servers
        self._last: PerLoop | None = None
        self._opening = threading.Lock()
        self._threads: Threads | None = None

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError where there are only clients for the other kind of verbs."""
        if self._address is None and asynchronous and self._client is None:
            raise ConfigurationError(_BLOCKING)
        if self._address is None and not asynchronous and self.sync_client is None:
            raise ConfigurationError(_AWAITED)

    async def run(self, command: Command) -> Any:
        """Send a command, and return its reply; every failure is a StoreError."""
        here = self._last
        if here is None or here.loop is not asyncio.get_running_loop():
            here = self.here()
        try:
            return await here.run(command)
        except CLIENT_ERRORS as error:
            raise self._failure(error) from error

    async def bounded(self, action: Callable[[PerLoop], Awaitable[Any]]) -> Any:
        """Do something with the client of the running event loop; every failure is a StoreError."""
        here = self.here()
        try:
            return await here.bounded(lambda: action(here))
        except CLIENT_ERRORS as error:
            raise self._failure(error) from error

    async def primaries(self) -> list[Any]:
        """Return, for each server that holds records, what its commands are sent through."""
        client: Any = self.here().client
        if not isinstance(client, aiocluster.RedisCluster):
            return [client]
        await self.bounded(lambda _: client.initialize())
        return list(client.get_primaries())

    async def ask(self, server: Any, *command: Any, raw: bool = False) -> Any:
        """Send a command to one of :meth:`primaries`; with ``raw``, the reply is not decoded."""
        options = RAW if raw else {}
        return await self.bounded(lambda _: server.execute_command(*command, **options))

    def run_sync(self, command: Command) -> Any:
        """Send a command of a thread, and return its reply; every failure is a StoreError."""
        return self.bounded_sync(lambda threads: threads.send(command))

    def bounded_sync(self, action: Callable[[Threads], Any]) -> Any:
        """Do something with the blocking client; every failure is a StoreError."""
        try:
            threads = self._threads
            if threads is None or threads.pid != os.getpid():
                threads = self._open_threads()
            try:
                threads.slots.get(timeout=self._timeout)
            except queue.Empty:
                raise TimeoutError from None
            try:
                return action(threads)
            finally:
                threads.slots.put(None)
        except CLIENT_ERRORS as error:
            raise self._failure(error) from error

    def here(self) -> PerLoop:
        """Return what belongs to the running event loop: a connection works only in the loop it was made in."""
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            client = self._client
            if client is None and self._address is not None:
                client = self._address.open(self._timeout)
            if client is None:
                raise ConfigurationError(_BLOCKING)
            for other in [*self._loops]:  # other threads do the same
                if other.is_closed() and (ended := self._loops.pop(other, None)) is not None:
                    self._abandon(ended)
            here = self._loops[loop] = PerLoop(loop, client, timeout=self._timeout, own=self._own, share=self._share)
        self._last = here
        return here

    def _open_threads(self) -> Threads:
        with self._opening:
            if self.sync_client is None:
                if self._address is None:
                    raise ConfigurationError(_AWAITED)
                self.sync_client = self._address.open_sync(self._timeout)
            if self._threads is None or self._threads.pid != os.getpid():
                self._threads = Threads(self.sync_client, self._own)
            return self._threads

    async def aclose(self) -> None:
        """Stop watching, and close the clients that were opened here, those of threads too."""
        running = asyncio.get_running_loop()
        loops, self._loops, self._last = self._loops, {}, None
        for here in loops.values():
            if here.loop is not running:
                self._abandon(here)
                continue
            await here.aclose()
            if self._address is not None:
                for client in clients_of(here.client):
                    with contextlib.suppress(*CLIENT_ERRORS):
                        await client.aclose()
        self.close()

    def close(self) -> None:
        """Close the blocking client, if it was opened here."""
        if self._address is not None:
            with self._opening:
                client, self.sync_client, self._threads = self.sync_client, None, None
            for each in clients_of(client) if client is not None else ():
                with contextlib.suppress(*CLIENT_ERRORS):
                    each.close()

    def _abandon(self, here: PerLoop) -> None:
        here.end()
        if self._address is None:
            return
        if here.loop.is_closed():
            abandon(here.client)
        else:
            with contextlib.suppress(RuntimeError):
                here.loop.call_soon_threadsafe(abandon, here.client)

    def __del__(self) -> None:
        # For a store that was never closed, as in a script with asyncio.run: the loop is closed, so aclose() cannot be
        # awaited any more. Without this, its sockets stay open until the garbage collector runs, with a warning.
        for here in self._loops.values():
            if here.loop.is_closed():
                self._abandon(here)
            else:
                here.end()

    def _failure(self, error: BaseException) -> StoreError:
        return StoreError(f"Redis at {self.server}: {describe_failure(error, self._timeout)}")

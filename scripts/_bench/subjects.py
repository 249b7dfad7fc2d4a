"""The subjects of the measuring: a store, and raw round trips of its client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

from exchange import ANSWER, HEADERS

from idempotency import open_store
from idempotency._http.codec import encode_response
from idempotency._rules import Claim
from idempotency.errors import ConfigurationError
from idempotency.stores.memory import MemoryStore

Verb = Literal["claim", "complete", "replay"]

RESULT = encode_response(201, HEADERS, ANSWER)
FINGERPRINT = bytes(range(32))


def claim_of(key: object) -> Claim:
    """Make a claim like those of the middleware."""
    return Claim(scope="http:1:" + "5a" * 32, key=f"order-{key}", fingerprint=FINGERPRINT, lease=30.0, ttl=86400.0)


class Subject(ABC):
    """A store to be measured, with a prefix or table of its own."""

    name: str
    store: Any
    has_trips = True
    """Whether the store is reached over a client whose raw round trips can be measured."""
    purges = True
    """Whether the store deletes expired records itself, rather than its server."""
    most = 1_000_000
    """The largest table that is filled within minutes."""

    @abstractmethod
    async def open(self) -> None:
        """Make its table, if it needs one, and open the store."""

    @abstractmethod
    async def close(self) -> None:
        """Close the store and remove everything that was put there."""

    @abstractmethod
    async def fill(self, keys: Sequence[str]) -> None:
        """Write finished records, in the quickest way."""

    async def settle(self) -> None:
        """Make the server do now what it would do in the background after so many writes."""
        return

    async def fill_expired(self, keys: Sequence[str]) -> None:
        """Write expired records, for the store to purge."""
        raise NotImplementedError

    def purge_command(self) -> list[str] | None:
        """Return the command that purges from another process, or None where there is no server to share."""
        return None

    async def oldest(self) -> int | None:
        """Return when the oldest record expires, by which a purge that has begun is noticed."""
        raise NotImplementedError

    async def stored(self) -> dict[str, int]:
        """Return how many bytes the server uses for the records, by what it uses them for; empty if it cannot say."""
        return {}

    async def logged(self) -> int | None:
        """Return how many bytes the server has written to its log so far; None if it cannot say."""
        return None

    def command(self, verb: Verb, claim: Claim) -> Any:
        """Return what the store sends for a verb; a replay is the claim of a finished key."""
        raise NotImplementedError

    async def send(self, command: Any) -> None:
        """Send a command of :meth:`command` through the store's client, and nothing else."""
        raise NotImplementedError

    async def cheapest(self, _: object) -> None:
        """Make the cheapest round trip the client can make."""
        raise NotImplementedError

    async def count(self, work: Callable[[], Awaitable[object]]) -> int:
        """Count the commands that travel while ``work`` runs."""
        raise NotImplementedError


class Memory(Subject):
    """The store in this process: no client, no round trips."""

    name = "memory"
    has_trips = False

    async def open(self) -> None:
        """Make a store with room for the largest table."""
        self.store = MemoryStore(max_records=4_000_000, max_bytes=4 << 30)

    async def close(self) -> None:
        """Drop the records."""
        del self.store

    async def fill(self, keys: Sequence[str]) -> None:
        """Claim and complete, as there is no quicker way."""
        for key in keys:
            claim = claim_of(key)
            self.store.claim_sync(claim)
            self.store.complete_sync(claim, RESULT)

    async def fill_expired(self, keys: Sequence[str]) -> None:
        """Complete with a ttl that expires at once; after all claims, since a claim also drops expired records."""
        claims = [claim_of(key) for key in keys]
        for claim in claims:
            self.store.claim_sync(claim)
        for claim in claims:
            self.store.complete_sync(replace(claim, ttl=1e-6), RESULT)


@asynccontextmanager
async def opened(subject: Subject) -> AsyncIterator[Subject]:
    """Open a subject for a block, and remove what it has written."""
    await subject.open()
    try:
        yield subject
    finally:
        await subject.close()


def reference_url(url: str) -> str:
    """Return a URL whose records do not lengthen the tables of ``url``: the next database of Redis, else the same."""
    parts = urlsplit(url)
    if parts.scheme != "redis":
        return url
    database = int(parts.path.strip("/") or 0)
    return parts._replace(path=f"/{(database + 1) % 16}").geturl()


def subject_of(url: str, place: str) -> Subject:
    """Make the subject for a store URL; ``place`` names its own prefix or table.

    Raises :class:`~idempotency.errors.ConfigurationError` for a URL that no store can be opened for.
    """
    if url == "memory://":
        return Memory()
    open_store(url)  # it does not connect, but raises for a wrong URL and a missing package
    if url.startswith(("unix:", "rediss:", "redis+", "rediss+")):
        raise ConfigurationError("of the Redis URLs only redis:// is measured")
    if url.startswith("redis:"):
        from redis_subject import Redis

        return Redis(url, place)
    from sql_subject import SQL

    return SQL(url, place)

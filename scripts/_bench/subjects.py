"""What is measured: a store, and raw round trips of the client it uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
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
    """A store to be measured, alone in its place."""

    name: str
    store: Any
    has_trips = True
    """Whether the store is reached over a client whose raw round trips can be measured."""
    purges = True
    """Whether the store deletes expired records itself, rather than its server."""

    @abstractmethod
    async def open(self) -> None:
        """Make the place and open the store."""

    @abstractmethod
    async def close(self) -> None:
        """Close the store and remove everything that was put there."""

    @abstractmethod
    async def fill(self, keys: Sequence[str]) -> None:
        """Put finished records there, by the quickest way."""

    async def settle(self) -> None:
        """Have the server do now what it would do in the background after so many writes."""
        return

    async def fill_expired(self, keys: Sequence[str]) -> None:
        """Put expired records there, for the store to purge."""
        raise NotImplementedError

    def command(self, verb: Verb, claim: Claim) -> Any:
        """Make what the store sends for a verb; a replay is the claim of a finished key."""
        raise NotImplementedError

    async def send(self, command: Any) -> None:
        """Send what :meth:`command` made through the store's client, and nothing else."""
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
        """Complete with a ttl that is over at once; only then, as claims drop expired records in passing."""
        claims = [claim_of(key) for key in keys]
        for claim in claims:
            self.store.claim_sync(claim)
        for claim in claims:
            self.store.complete_sync(replace(claim, ttl=1e-6), RESULT)


def reference_url(url: str) -> str:
    """Return where records do not lengthen the tables of ``url``: of Redis the next database, else the same place."""
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
    open_store(url)  # nothing connects, but what is wrong or not installed shows
    if url.startswith(("unix:", "rediss:", "redis+", "rediss+")):
        raise ConfigurationError("of the Redis URLs only redis:// is measured")
    if url.startswith("redis:"):
        from redis_subject import Redis

        return Redis(url, place)
    from sql_subject import SQL

    return SQL(url, place)

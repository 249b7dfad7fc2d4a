"""What a store must do: four atomic verbs, each one round trip, and a way to be told of a change.

A store decides ownership and nothing else; what a duplicate is told is decided by ``_core.judge``.

- Only durations cross this boundary. Every lease and expiry is judged by the store's own clock.
- Every write after the claim is fenced by the claim's token.
- A record past its expiry is absent, also while it is physically there: it neither replays nor blocks.
- A lease of 0 is over at once, whatever the clock: claims that are told apart by nothing else count by their attempt.
- A record expires ``lease + ttl`` seconds after its claim or last renewal, and ``ttl`` seconds after its completion.
  A held record (``claim.hold`` while running, or completed as ``State.UNKNOWN``) does not expire.
- Any verb may be repeated with the same claim, as a client does whose answer was lost, with the same effect. The answer
  is the same too, but for a release: repeated, it finds no record and answers False.
- A store that cannot be reached, or gives no answer in time, raises :class:`~idempotency.errors.StoreError`.
  A record that makes no sense is no error: it is ``Record.unreadable()``.

``idempotency.testing.StoreContract`` pins each of these sentences.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from idempotency._rules import Claim, Record, State
from idempotency._synchronization import Changed as Changed
from idempotency.errors import ConfigurationError


class Store(Protocol):
    """A store for asyncio."""

    async def claim(self, claim: Claim, /) -> Record:
        """Own the record if it is absent, expired or taken over; return what is there now, the result included."""
        ...

    async def renew(self, claim: Claim, /) -> bool:
        """Start the lease anew; False when ``claim`` is no longer the owner, or no longer running."""
        ...

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """Record the end; False, and nothing written, when ``claim`` is no longer the owner.

        ``result`` None means "done, result not kept". ``State.UNKNOWN`` records that nobody knows how it ended.
        A lease that is over does not matter as long as nobody took over.
        """
        ...

    async def release(self, claim: Claim, /) -> bool:
        """Forget a running record; False when ``claim`` is no longer the owner, or no longer running."""
        ...

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """Watch the record of ``claim`` for its end (completed, held or released).

        A change after the context is entered is not missed, provided that a claim with ``watched`` set follows the
        entry. Notification is a wake-up and no promise: a store without one returns after a polling interval.
        """
        ...

    async def aclose(self) -> None:
        """Close what the store itself opened, never a client or engine that was passed in."""
        ...


class SyncStore(Protocol):
    """The same verbs for threads: a native blocking client, never a bridge to an event loop."""

    def claim_sync(self, claim: Claim, /) -> Record:
        """See :meth:`Store.claim`."""
        ...

    def renew_sync(self, claim: Claim, /) -> bool:
        """See :meth:`Store.renew`."""
        ...

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """See :meth:`Store.complete`."""
        ...

    def release_sync(self, claim: Claim, /) -> bool:
        """See :meth:`Store.release`."""
        ...

    def close(self) -> None:
        """See :meth:`Store.aclose`."""
        ...


class OneSided(Protocol):
    """A store that may have been given a client, or an engine, for one kind of verbs only."""

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError, with the remedy, where the verbs that are awaited, or the others, cannot work."""
        ...


class Counting(Protocol):
    """What ``max_attempts`` needs besides the verbs."""

    async def inspect(self, record: bytes, /) -> Entry | None:
        """See :meth:`Housekeeping.inspect`."""
        ...

    async def forget(self, record: bytes, /) -> bool:
        """See :meth:`Housekeeping.forget`."""
        ...


class SyncCounting(Protocol):
    """See :class:`Counting`."""

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`Housekeeping.inspect`."""
        ...

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`Housekeeping.forget`."""
        ...


def check_store(store: object, asynchronous: bool, *more: type) -> None:
    """Refuse, with the remedy, what is no store for functions that are awaited, or for those that are not.

    ``more``: protocols of what it must be able to do besides the verbs.
    """
    what = type(store).__name__
    if isinstance(store, type):
        raise ConfigurationError(f"store must be a Store, not the class {store.__name__}: call it, or open_store(url)")
    mine, other = (Store, SyncStore) if asynchronous else (SyncStore, Store)
    lacking = _lacking(store, mine)
    if set(_verbs(mine)) == set(lacking) and set(_verbs(other)) == set(_lacking(store, other)):
        raise ConfigurationError(f"store must be a Store, as open_store(url) makes it, not {what}")
    lacking += [verb for each in more for verb in _lacking(store, each)]
    if lacking:
        how = "is awaited" if asynchronous else "is not awaited"
        raise ConfigurationError(
            f"{what} cannot be used where the store {how}: it lacks {', '.join(lacking)}; use a store that has them, "
            "as open_store(url) makes it"
        )
    if not _lacking(store, OneSided):
        cast(OneSided, store).check_side(asynchronous)


def _verbs(protocol: type) -> list[str]:
    return [name for name, member in vars(protocol).items() if not name.startswith("_") and callable(member)]


def _lacking(store: object, protocol: type) -> list[str]:
    # Not by isinstance, which does not see what a wrapper hands on.
    return [verb for verb in _verbs(protocol) if not callable(getattr(store, verb, None))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What an operator sees of a record. Durations are seconds; ``expires_in`` None means never.

    ``unresolved`` is True for a record that nobody will finish: completed as unknown, or held and its lease over.
    ``result_size`` is None where there is no result. Of a ``scope`` or ``key`` longer than 1000 characters, the
    beginning and a digest are shown.
    """

    id: bytes
    scope: str
    key: str
    state: State
    attempt: int
    hold: bool
    age: float
    lease_left: float
    expires_in: float | None
    result_size: int | None
    version: int

    @property
    def unresolved(self) -> bool:
        """Say whether the outcome is unknown and waits for :meth:`Housekeeping.resolve`."""
        return self.state is State.UNKNOWN or (self.state is State.RUNNING and self.hold and self.lease_left <= 0)


class Housekeeping(Protocol):
    """What an operator does with records; no request needs it."""

    async def inspect(self, record: bytes, /) -> Entry | None:
        """Show the record of this id (:func:`idempotency._rules.record_id`); None when there is none, or it expired."""
        ...

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """List records whose outcome is unknown, oldest first as far as the store can tell."""
        ...

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """Settle an unresolved record by what was found out; False, and nothing changed, when it is not unresolved.

        ``"done"``: the effect happened; duplicates get ``result``, or are told it was not kept. ``"release"``: it did
        not, and the next request runs. The vanished owner's token is replaced: should it return, it cannot write.
        """
        ...

    async def forget(self, record: bytes, /) -> bool:
        """Forget a record, so that its operation runs again; False when there is none, or it is being run."""
        ...

    async def check(self) -> None:
        """Ask whether the store can be used; :class:`~idempotency.errors.StoreError` says what to do if not."""
        ...

    async def create_schema(self) -> None:
        """Create what the records need, where it is missing: a table in SQL, elsewhere nothing.

        Safe in any number of processes at once.
        """
        ...

    async def purge(self, batch: int = 1000) -> int:
        """Delete up to ``batch`` expired records and return how many; 0 where the server expires them itself."""
        ...

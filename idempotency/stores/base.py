"""What a store must do, and what else a store may do: each a capability, which is a protocol in this file.

Every store has the verbs: of :class:`Store` where it is awaited, of :class:`SyncStore` where it is not. Each verb is
atomic and one round trip. A caller that needs more asks for it by type: :func:`supports`, :func:`require` and
:func:`check_store` are the only places in the library that look at the attributes of a store.

A store decides who owns a key, and nothing else. What a duplicate gets is decided by ``_rules.judge``.

- Only durations cross this boundary. Every lease and expiry is judged by the store's own clock.
- Every write after the claim is fenced by the claim's token.
- A server's clock may step forward. A store that notices it takes nothing over for the lease of the claim, so that live
  owners renew theirs first, and answers with a ``lease_left`` of what remains of that time.
- A record past its expiry is absent, also while it is physically there: it neither replays nor blocks.
- A lease of 0 is over at once, whatever the clock. Several claims may then be made at one reading of the clock: each
  takes over from the one before, and has the next attempt.
- A record expires ``lease + ttl`` seconds after its claim or last renewal, and ``ttl`` seconds after its completion.
  A held record (``claim.hold`` while running, or completed as ``State.UNKNOWN``) does not expire.
- ``Record.age`` counts from the first claim of the operation, also after another claim took it over.
- Any verb may be repeated with the same claim, as a client does when the answer was lost, with the same effect. The
  answer is the same too, except for a release: repeated, it finds no record and answers False.
- A store that cannot be reached, or gives no answer in time, raises :class:`~idempotency.errors.StoreError`.
  A record that makes no sense is no error: it is ``Record.unreadable()``.

``idempotency.testing.StoreContract`` tests each of these sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard, TypeVar

from idempotency._rules import Claim, Record, State
from idempotency._sagas.journal import CreatingSagaSchema as CreatingSagaSchema
from idempotency._synchronization import Changed as Changed
from idempotency.errors import ConfigurationError
from idempotency.stores._auditing import Action as Action
from idempotency.stores._auditing import Auditing as Auditing
from idempotency.stores._counts import Count as Count
from idempotency.stores._entry import Entry as Entry
from idempotency.stores._entry import ListedState as ListedState
from idempotency.stores._joining import Joining as Joining

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of an examination: ``ok``, ``note`` for what is worth knowing, or ``fix`` for what must be put right."""

    level: Literal["ok", "note", "fix"]
    what: str


# The verbs.


class Store(Protocol):
    """A store for asyncio."""

    async def claim(self, claim: Claim, /) -> Record:
        """Own the record if it is absent or expired, or can be taken over; return the record as it is now."""
        ...

    async def renew(self, claim: Claim, /) -> bool:
        """Start the lease anew; False when ``claim`` is no longer the owner, or no longer running."""
        ...

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        """Record the end; False, and nothing written, when ``claim`` is no longer the owner.

        ``result`` None means "done, but the result is not recorded". ``State.UNKNOWN`` records that the outcome is not
        known. A lease that is over does not matter as long as no other claim took over.
        """
        ...

    async def release(self, claim: Claim, /) -> bool:
        """Delete a running record; False when ``claim`` is no longer the owner, or no longer running."""
        ...

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        """Watch the record of ``claim`` for its end (completed, held or released).

        A change after the context is entered is not missed, provided that a claim with ``watched`` set follows the
        entry. A notification is only a reason to look again: a store that has none returns after a polling interval.
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


# What an operator does with records. No request needs these, but ``max_attempts`` of a consumer uses some of them.


class Inspecting(Protocol):
    """Look at one record."""

    async def inspect(self, record: bytes, /) -> Entry | None:
        """Show the record of this id (:func:`idempotency._rules.record_id`); None when there is none, or it expired."""
        ...


class Searching(Protocol):
    """Look for records without their whole id."""

    async def find(self, start: str = "", *, key: str | None = None, limit: int = 100) -> list[Entry]:
        """List records whose id begins with the hex digits ``start``, at most ``limit``, in no particular order.

        With ``key``, only its records, in every scope; the store may have to read all records for that. Raises
        :class:`~idempotency.errors.ConfigurationError` when ``start`` is not made of hex digits.
        """
        ...


class Listing(Protocol):
    """List records by their state, and by the name of their operation."""

    async def list_records(
        self, state: ListedState | None = None, *, name: str | None = None, limit: int = 100
    ) -> list[Entry]:
        """List records, oldest first; None stands for any state, or name. The store may have to read all records.

        Records that count the deliveries of a message, and damaged ones, are not listed. ``name=""``: those that have
        no name.
        """
        ...


class Naming(Protocol):
    """Say whether the names of operations are stored."""

    @property
    def writes_names(self) -> bool:
        """Return whether the store records :attr:`Claim.name`; where it does not, nobody needs to find it out."""
        ...


class Resolving(Protocol):
    """List the records whose outcome is unknown, and resolve them."""

    async def unresolved(self, limit: int = 100) -> list[Entry]:
        """List records whose outcome is unknown, oldest first as far as the store knows their age."""
        ...

    async def resolve(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """Resolve a record by what was found out; False, and nothing changed, when its outcome is not unknown.

        ``"done"``: the effect happened; duplicates get ``result``, or the answer that it was not recorded.
        ``"release"``: it did not, and the next request runs. The token of the owner that vanished is replaced: should
        it return, it cannot write.
        """
        ...


class ResolvingByParts(Protocol):
    """List the records whose outcome is unknown where that takes long: a part of them in a given time."""

    async def unresolved_part(self, limit: int, after: str, seconds: float) -> tuple[list[Entry], str]:
        """Look for ``seconds``; return the oldest found, and the ``after`` to look on from: empty at both ends."""
        ...


class Forgetting(Protocol):
    """Delete a record on purpose."""

    async def forget(self, record: bytes, /) -> bool:
        """Delete a record, so that its operation can run again; False when there is none, or its owner is running."""
        ...


class Checking(Protocol):
    """Try whether the store can be used."""

    async def check(self) -> None:
        """Do nothing if the store can be used; else raise :class:`~idempotency.errors.StoreError` with the remedy."""
        ...


class Examining(Protocol):
    """Examine the store and its server, for ``idempotency doctor``."""

    async def examine(self) -> list[Finding]:
        """Return what an operator should know: whether the store can be used, and which records a crash would lose.

        A store that cannot be used is a finding too, and not an error.
        """
        ...


class CreatingSchema(Protocol):
    """Create what the records need."""

    async def create_schema(self) -> None:
        """Create what the records need, where it is missing: in SQL its table and that of the audit, elsewhere nothing.

        Safe in any number of processes at once.
        """
        ...


class NamingSchema(Protocol):
    """Name what :meth:`CreatingSchema.create_schema` creates."""

    @property
    def schema(self) -> str:
        """Return what is created, ``tables NAME and NAME_audit`` in SQL; empty where the records need nothing."""
        ...


class Purging(Protocol):
    """Delete what is expired."""

    async def purge(self, batch: int = 1000) -> int:
        """Delete up to ``batch`` expired records and return how many; 0 where the server expires them itself."""
        ...


class Housekeeping(Inspecting, Resolving, Forgetting, Checking, CreatingSchema, Purging, Protocol):
    """What ``StoreContract`` requires of a store besides the verbs."""


class Counting(Inspecting, Forgetting, Protocol):
    """What ``max_attempts`` of a consumer needs besides the verbs."""


class SyncInspecting(Protocol):
    """See :class:`Inspecting`."""

    def inspect_sync(self, record: bytes, /) -> Entry | None:
        """See :meth:`Inspecting.inspect`."""
        ...


class SyncResolving(Protocol):
    """See :class:`Resolving`."""

    def resolve_sync(
        self, record: bytes, /, outcome: Literal["done", "release"], result: bytes | None = None, *, ttl: float = 86400
    ) -> bool:
        """See :meth:`Resolving.resolve`."""
        ...


class SyncForgetting(Protocol):
    """See :class:`Forgetting`."""

    def forget_sync(self, record: bytes, /) -> bool:
        """See :meth:`Forgetting.forget`."""
        ...


class SyncCounting(SyncInspecting, SyncForgetting, Protocol):
    """See :class:`Counting`."""


class CountingStore(Store, Counting, Protocol):
    """A store for asyncio that ``max_attempts`` can count in."""


class CountingSyncStore(SyncStore, SyncCounting, Protocol):
    """A store for threads that ``max_attempts`` can count in."""


# What only some stores need or can do.


class OneSided(Protocol):
    """A store that may have been given a client, or an engine, for one kind of verbs only."""

    def check_side(self, asynchronous: bool) -> None:
        """Raise ConfigurationError, with the remedy, if the verbs that are awaited (or else the others) cannot work."""
        ...


class Forkable(Protocol):
    """A store whose connections must not be used in a process that was forked."""

    def forked(self) -> None:
        """Drop the connections that belong to the parent process, without closing them there."""
        ...


# How a caller asks what a store can do.


def supports(store: object, capability: type[C]) -> TypeGuard[C]:
    """Return whether a store has a capability: a protocol of this module, or several combined in one."""
    return not _missing(store, capability)


def writes_names(store: object) -> bool:
    """Return whether a store records the names of operations; one that does not say so does not."""
    return supports(store, Naming) and store.writes_names


def require(store: object, capability: type[C], for_what: str) -> C:
    """Return the store with the type of a capability.

    If the store does not have it, raises :class:`~idempotency.errors.ConfigurationError` in one line, with what the
    store lacks. ``for_what`` is the subject of that line, such as ``idempotency doctor``.
    """
    if supports(store, capability):
        return store
    lacks = ", ".join(_missing(store, capability))
    raise ConfigurationError(
        f"{for_what} needs the capability {capability.__name__}, which {type(store).__name__} does not have: it lacks"
        f" {lacks}"
    )


def check_store(store: object, capability: type[C], /) -> C:
    """Return a store that has the verbs of ``capability``: of ``Store`` or ``SyncStore``, and what it needs besides.

    Raises :class:`~idempotency.errors.ConfigurationError`, with the remedy, for anything else.
    """
    what = type(store).__name__
    if isinstance(store, type):
        raise ConfigurationError(f"store must be a Store, not the class {store.__name__}: call it, or open_store(url)")
    asynchronous = Store in capability.__mro__
    if not any(set(_members(verbs)) - set(_missing(store, verbs)) for verbs in (Store, SyncStore)):
        raise ConfigurationError(f"store must be a Store, as open_store(url) makes it, not {what}")
    if supports(store, capability):
        _check_side(store, asynchronous)
        return store
    how = "is awaited" if asynchronous else "is not awaited"
    raise ConfigurationError(
        f"{what} cannot be used where the store {how}: it lacks {', '.join(_missing(store, capability))}; use a "
        "store that has them, as open_store(url) makes it"
    )


def _check_side(store: object, asynchronous: bool) -> None:
    if supports(store, OneSided):
        store.check_side(asynchronous)


def _missing(store: object, capability: type) -> list[str]:
    # Not by isinstance, which does not see the verbs that a wrapper passes on by __getattr__.
    return [name for name, member in _members(capability).items() if not _has(store, name, member)]


def _has(store: object, name: str, member: object) -> bool:
    if isinstance(member, property):
        return hasattr(store, name)
    return callable(getattr(store, name, None))


def _members(capability: type) -> dict[str, object]:
    return dict(_declared(capability))


def _declared(capability: type) -> Iterator[tuple[str, object]]:
    for protocol in capability.__mro__:
        for name, member in vars(protocol).items():
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                yield name, member

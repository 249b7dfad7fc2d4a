"""The journal of sagas: what a store keeps of each, and the requests by which it is read and written.

A saga is a row and its entries. The row says who runs the saga, from when on anyone may, and what it waits for. Each
entry is a step, an undo, a timer, a signal or another fact, under a name that is unique in its saga. What a body or a
reason means is decided by :mod:`idempotency.saga`: to a store they are bytes.

A request is one round trip and atomic; those for many sagas may be several, and then each row is as it was at some time
meanwhile. Every write of an owner is fenced by its token. Any request may be repeated, as a client does when the answer
was lost, with the same effect. All times are judged by the clock of the store.

``Row.due_in`` is the one clock of a saga: while it is owned, the rest of its lease; while it waits, the rest of its
wait. Once it is over, anyone may open the saga. None is never: it has ended, or it is stuck until an operator acts.

A saga that cannot be read is of a newer format, is damaged, or is encrypted with a key that the store does not have. A
request that needs what cannot be read raises :class:`~idempotency.errors.UnreadableError`, and a saga of a newer format
is not written. :class:`Due` passes over what cannot be read, and :class:`Browse` shows what can be read of it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from idempotency._rules import record_id

R = TypeVar("R")

FORMAT = 1
"""The format of rows and entries that this library writes, and the newest that it reads."""

MOST_CHARACTERS = 255
"""Of the name of a saga, and of the name of an entry."""


class Phase(enum.IntEnum):
    """Where a saga is on its way. The numbers are stored: never reuse one."""

    FORWARD = 1
    UNDOING = 2
    DONE = 3
    UNDONE = 4

    @property
    def ended(self) -> bool:
        """Return whether nothing happens any more."""
        return self in (Phase.DONE, Phase.UNDONE)


class Progress(enum.IntEnum):
    """How far an entry is. The numbers are stored: never reuse one."""

    BEGUN = 1
    DONE = 2
    FAILED = 3
    SKIPPED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One fact of a saga, as it is written; the store adds the times.

    ``order`` counts the entries that have ended, from 1, in the order in which they ended; 0 for one that has not.
    ``attempt`` counts the tries, from 1. ``began`` and ``changed`` are seconds since the first and the last write of
    the entry, when it is read; a writer leaves them 0.
    """

    name: str
    progress: Progress
    order: int = 0
    attempt: int = 1
    body: bytes = b""
    began: float = 0.0
    changed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A saga as it is in the store.

    ``token`` is the owner's, empty while nobody runs it. ``attempt`` counts the runs, from 1 (0: only recorded).
    ``crashes`` counts the runs that ended without a word, since one last wrote with ``progress`` or ended by
    :class:`Leave`. ``wakes`` counts what came from outside: signals, and requests of operators. ``reason`` says what it
    waits for, or why it is stuck. ``result`` is the outcome of one that has ended, or the failure of one that is being
    undone. ``deadline_in`` is the rest of the time it was given; None for ever. ``age`` counts from its first record.
    Seconds.
    """

    id: bytes
    name: str
    key: str
    phase: Phase
    token: str
    fingerprint: bytes
    input: bytes
    attempt: int
    crashes: int
    wakes: int
    reason: bytes
    result: bytes | None
    due_in: float | None
    deadline_in: float | None
    age: float
    version: int = FORMAT


@dataclass(frozen=True, slots=True)
class Saga:
    """A row and its entries, in any order."""

    row: Row
    entries: tuple[Entry, ...] = ()


class Request(Generic[R]):
    """A request to the journal, which is answered by ``R``."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Request[Saga | None]):
    """Own a saga, and return it as it is now; ``row.token`` is ``token`` if that succeeded.

    A saga that is absent, or has expired, is recorded, if there is an ``input``; without, the answer is None. One that
    is there is owned if it has not ended, and is due or has this token already; with an ``input``, only if its
    ``fingerprint`` is the same. Its phase, fingerprint, input, deadline and entries stay as they are.
    One that is owned and cannot be read stays owned, also where :class:`~idempotency.errors.UnreadableError` is raised.
    ``id``: that of :func:`saga_id`.
    ``attempt`` counts each new owner, ``crashes`` each one that took over from a token. Entries are returned if the
    saga was there, and is owned now.
    ``lease``: seconds, which begin anew where the saga has this token already; 0 only records a saga that is absent: it
    has no token and is due at once.
    ``deadline``: seconds from its first record, None for ever. A saga that has not ended does not expire.
    """

    id: bytes
    name: str
    key: str
    token: str
    lease: float
    fingerprint: bytes = b""
    input: bytes | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Request[int | None]):
    """Write entries, new or in the place of those of the same name, and start the lease anew.

    The answer is ``Row.wakes``; None, and nothing is written, if ``token`` is not the owner's any more. A lease that is
    over does not matter as long as nobody took over. Without entries it only renews.
    ``progress``: something is done that no later run repeats, so that ``crashes`` begins anew. ``phase`` and
    ``result``, if given, are those of the row from now on; a phase that has ended is written by :class:`Leave` only.
    """

    id: bytes
    token: str
    lease: float
    entries: Sequence[Entry] = ()
    progress: bool = False
    phase: Phase | None = None
    result: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Request[bool]):
    """Stop owning a saga; False, and nothing is written, if ``token`` is not the owner's any more.

    Repeated after it succeeded, it answers True until the saga is owned again, is amended, or expires. ``due``: seconds
    until anyone may open it, None for never. If ``Row.wakes`` is not ``wakes`` any more, and ``phase`` has not ended,
    it is due at once. ``reason``: what it waits for. An ended saga expires after ``ttl`` seconds. ``phase`` and
    ``result`` None leave them as they are.
    """

    id: bytes
    token: str
    phase: Phase | None
    due: float | None
    wakes: int
    reason: bytes = b""
    result: bytes | None = None
    entries: Sequence[Entry] = ()
    ttl: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Put(Request[Entry | None]):
    """Write an entry from outside, unless there is one of its name: return the one that is there now.

    The first one counts ``wakes``, and makes a saga due at once that nobody owns; one that is due already stays due
    since the same time. None if there is no such saga, or it has ended.
    """

    id: bytes
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake(Request[bool]):
    """Make a saga due at once that nobody owns, forget its crashes, and count ``wakes``.

    One whose owner runs counts ``wakes`` only, and one that is due already stays due since the same time. False if
    there is no such saga, or it has ended.
    """

    id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Amend(Request[bool]):
    """Change a saga by hand, and make it due at once, as :class:`Wake` does.

    An owner whose lease is over does not own it any more.
    ``entries`` are written as by :class:`Write`; those with a name in ``without`` are deleted first. ``phase``, which
    cannot be one that has ended, and ``result``, if given, are those of the row from now on. False, and nothing is
    written, if there is no such saga, it has ended, or an owner runs; with ``attempt`` also if the saga was run since
    it was looked at, so that ``Row.attempt`` and ``Row.token`` are not ``attempt`` and ``token`` any more.
    """

    id: bytes
    attempt: int | None = None
    token: str = ""
    entries: Sequence[Entry] = ()
    without: Sequence[str] = ()
    phase: Phase | None = None
    result: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look(Request[Saga | None]):
    """Return a saga with all its entries; None where there is none, or it has expired."""

    id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Due(Request[list[Row]]):
    """Return up to ``limit`` sagas of these names that are due, those first that have been due for longest.

    ``names`` empty: of every name.
    """

    names: Sequence[str] = ()
    limit: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Browse(Request[list[Row]]):
    """Return up to ``limit`` sagas for an operator, the oldest first, of ``name``, or of every name.

    ``ended``: also those that have ended. ``stuck``: only those that have not, and are never due.
    """

    name: str | None = None
    ended: bool = False
    stuck: bool = False
    limit: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Purge(Request[int]):
    """Delete up to ``batch`` sagas that have expired, with their entries, and return how many.

    That is 0 where the server itself deletes what has expired.
    """

    batch: int = 1000


class Journaling(Protocol):
    """A store that keeps sagas, for asyncio."""

    async def journal(self, request: Request[R], /) -> R:
        """Answer a request. Raises :class:`~idempotency.errors.StoreError`, as every verb does."""
        ...


class SyncJournaling(Protocol):
    """A store that keeps sagas, for threads."""

    def journal_sync(self, request: Request[R], /) -> R:
        """See :meth:`Journaling.journal`."""
        ...


class JoinedJournaling(Protocol):
    """A store whose sagas can be recorded, and their entries written, in the transaction of an effect."""

    async def journal_in(self, session: Any, request: Write | Open, /) -> Any:
        """Answer a request in the transaction of an ``AsyncSession``: it commits or vanishes with the effect.

        ``Open`` only records a saga here: its ``lease`` is 0.
        """
        ...

    def journal_in_sync(self, session: Any, request: Write | Open, /) -> Any:
        """See :meth:`journal_in`; of a ``Session``."""
        ...

    def check_shared(self, engine: object) -> None:
        """Raise ConfigurationError unless sessions on ``engine`` reach the database of the sagas."""
        ...


class CreatingSagaSchema(Protocol):
    """Create what sagas need besides, where that is a schema of their own."""

    async def create_saga_schema(self) -> None:
        """Create what sagas need, where it is missing. Safe in any number of processes at once."""
        ...

    async def has_saga_schema(self) -> bool:
        """Return whether there is something of what sagas need."""
        ...

    @property
    def saga_schema(self) -> str:
        """Return what is created, as ``tables idempotency_record_saga and idempotency_record_saga_entry``."""
        ...


def name_id(name: str) -> bytes:
    """Return the 8 bytes with which the ids of all sagas of a name end: a store can put them in one place."""
    return record_id("saga:1", name)[:8]


def saga_id(name: str, key: str) -> bytes:
    """Return the 32 bytes under which the saga of this name and key is stored; the first ones tell it from others."""
    return record_id(f"saga:1:{name}", key)[:24] + name_id(name)

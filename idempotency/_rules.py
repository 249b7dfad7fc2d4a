"""The rules of an idempotency key: who may run, and which verdict a duplicate gets.

All rules of a key are in this file, and nothing else is: no I/O, no clock, no HTTP.
A store records who owns a key, an adapter translates verdicts, and only the functions of this file make verdicts.

    state found                              same fingerprint            other fingerprint
    absent, or expired                       Execute                     Execute
    running, lease live                      InProgress (remaining lease) Mismatch
    running, lease over, neither side holds  Execute (attempt + 1)       Mismatch
    running, lease over, held                Unknown                     Mismatch
    running, over since the store looked     InProgress (0 seconds)       Mismatch
    unknown (held by the owner)              Unknown                     Mismatch
    done                                     Replay                      Mismatch
    done, without a result                   Completed                   Mismatch
    of a newer format, or damaged            Unreadable                  Unreadable
    running, of the claim itself (its token) Execute                     Execute

The two rows in which the owner changes are :func:`takes_over`; a store applies them atomically, by its own clock.
:func:`judge` is the whole table. The functions after it decide the cases in which the record alone does not say enough.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:

    def value(*, frozen: bool, **options: Any) -> Any:
        """Make a dataclass that is frozen for the type checkers only.

        At run time, setting the fields of a frozen one costs more than all rules of a request.
        """
        return dataclass(unsafe_hash=frozen, **options)


FORMAT = 1
"""The format that is stored with a record, and the newest that this library reads: what a reader must know.

A field that a reader may ignore, such as the name of an operation, does not raise it; see ``stores/_versions.py``.
"""

_WIDTH = 64
"""The most characters of a token and bytes of a fingerprint that are stored."""


RETRY_WHILE_RELEASED = 1.0
"""Seconds after which a duplicate of a claim that is being released retries."""

RETRY_WHILE_LOCKED = 1.0
"""Seconds after which a duplicate retries whose row is locked: the row does not say how long its owner will take."""

FIRST_PAUSE = 1.0
"""Seconds that a caller waits at least before it asks again for a running operation."""

LONGEST_PAUSE = 5.0
"""Seconds that a caller waits at most before it asks again for a running operation."""


class State(enum.IntEnum):
    """The state of an operation in its record. The numbers are stored: never reuse one."""

    RUNNING = 1
    DONE = 2
    UNKNOWN = 3


@value(frozen=True, slots=True, kw_only=True)
class Claim:
    """One attempt to own a key.

    ``scope`` is the space in which ``key`` is unique (surface and caller), ``fingerprint`` the digest of the request.
    ``lease`` is how long the key is owned without a renewal, ``ttl`` how long a completed record lives, both in
    seconds. ``hold`` asks that the key becomes unknown, instead of free for a re-run, if the owner vanishes.
    ``watched`` asks the store to announce the record's next change to its watchers.
    ``transactional`` says that the effect is committed together with the completion, or not at all. The store may then
    confirm the claim before it is safe from a crash of the server: a claim that the crash loses is not completed.
    ``token`` is the owner's: every later write is fenced by it. ``id`` is the record's (:func:`record_id`).
    ``began`` is when the caller began, by the monotonic clock of its process, 0 if it does not say. No store
    reads it.
    ``name`` says to an operator what is done, and is in clear: it must contain nothing that a caller has sent.
    A token that is not printable ASCII of at most 64 characters is replaced by its digest, and so is a fingerprint of
    more than 64 bytes.
    """

    scope: str
    key: str
    fingerprint: bytes
    lease: float
    ttl: float
    hold: bool = False
    watched: bool = False
    transactional: bool = False
    token: str = field(default_factory=lambda: os.urandom(16).hex())
    began: float = field(default=0.0, compare=False)
    name: str = field(default="", compare=False)
    id: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", record_id(self.scope, self.key))
        # Shortened so that every store can store them; those of this library are 32 hex digits and 32 bytes.
        token = self.token
        if not (0 < len(token) <= _WIDTH and token.isascii() and token.isprintable()):
            digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
            object.__setattr__(self, "token", digest)
        if len(self.fingerprint) > _WIDTH:
            object.__setattr__(self, "fingerprint", hashlib.sha256(self.fingerprint).digest())


@value(frozen=True, slots=True, kw_only=True)
class Record:
    """What a store has under a key right now. Times are durations by the store's own clock.

    ``lease_left`` is the remaining lease in seconds, not positive once the lease is over. ``result`` is None while
    there is none, and when it was not recorded. ``readable`` is False when the store has something there that it cannot
    read. ``age`` is how long ago the operation was first claimed, in seconds; 0 where the store does not say.
    """

    token: str
    fingerprint: bytes
    state: State = State.RUNNING
    attempt: int = 1
    lease_left: float = 0.0
    hold: bool = False
    result: bytes | None = None
    version: int = FORMAT
    readable: bool = True
    age: float = field(default=0.0, compare=False)

    @classmethod
    def unreadable(cls, version: int = FORMAT) -> Record:
        """Make the record that stands for one that cannot be read."""
        return cls(token="", fingerprint=b"", version=version, readable=False)


@dataclass(frozen=True, slots=True)
class Execute:
    """The claim owns the key: run the operation, for the ``attempt``-th time."""

    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Replay:
    """The operation is done: give its recorded result. It was first claimed ``age`` seconds ago."""

    result: bytes
    age: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Completed:
    """The operation is done, but its result was not recorded: it was too large, or streamed."""


@dataclass(frozen=True, slots=True)
class InProgress:
    """Another owner is running the operation, for ``age`` seconds; its lease ends in ``retry_after`` seconds.

    A message is delivered again after the rest of the lease, since brokers count deliveries. A caller that waits for
    the result asks sooner: see :func:`pause`.
    """

    retry_after: float
    age: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The key was used for another request, whose fingerprint is ``recorded``."""

    recorded: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class Unknown:
    """The operation began and its outcome is unknown: never re-run, until resolved."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The record is of a newer format, or damaged: never re-run."""

    version: int


Known = Replay | Completed | InProgress | Mismatch | Unknown | Unreadable
"""The verdicts for everyone but the owner."""

Verdict = Execute | Known


def judge(claim: Claim, record: Record) -> Verdict:
    """Return the verdict for ``claim``, given the record as it is in the store after the claim."""
    if not record.readable or record.version > FORMAT:
        return Unreadable(record.version)
    if record.token == claim.token and record.state is State.RUNNING:
        return Execute(record.attempt)
    if not hmac.compare_digest(record.fingerprint, claim.fingerprint):
        return Mismatch(record.fingerprint)
    match record.state:
        case State.DONE:
            return Completed() if record.result is None else Replay(record.result, record.age)
        case State.UNKNOWN:
            return Unknown()
        case State.RUNNING:
            # Not held: the lease ended after the store read the record, and the next claim takes it over.
            held = record.hold or claim.hold
            if record.lease_left <= 0 and held:
                return Unknown()
            # No owner renews for longer than a lease. More is seen after the clock of the store was set back.
            return InProgress(max(min(record.lease_left, claim.lease), 0.0), record.age)


def pause(running: InProgress) -> float:
    """Return the seconds after which a caller asks again for a running operation, from 1 to 5.

    It is as long as the operation has taken so far. So a result that takes a second is not late by the rest of a lease,
    and one that takes a minute is not asked for each second. It is not longer than the rest of the lease: then a retry
    takes over from an owner that vanished.
    """
    return max(FIRST_PAUSE, min(running.age, running.retry_after, LONGEST_PAUSE))


def judge_with_releases(claim: Claim, record: Record, releasing: Collection[str]) -> Verdict:
    """Return the verdict for ``claim`` while this process releases the claims whose tokens are ``releasing``.

    No operation ran under these claims. So the outcome of one with ``hold`` whose lease is over is not unknown: its
    key is free soon.
    """
    verdict = judge(claim, record)
    being_released = isinstance(verdict, Unknown) and record.token in releasing
    return InProgress(RETRY_WHILE_RELEASED) if being_released else verdict


def judge_row(claim: Claim, record: Record | None) -> Verdict:
    """Return the verdict for a claim in a transaction; ``record`` None: another transaction has locked the row."""
    return InProgress(RETRY_WHILE_LOCKED) if record is None else judge(claim, record)


def judge_superseded(claim: Claim, record: Record) -> Known | None:
    """Return the verdict for a superseded owner, given the record after it claimed the key again.

    None: the other owner ended without a result, and ``claim`` owns the key again. Its result can still be recorded.
    """
    verdict = judge(claim, record)
    return None if isinstance(verdict, Execute) else verdict


def superseded_again(claim: Claim) -> Known:
    """Return the verdict for an owner that owned the key again, and was superseded before it recorded its result."""
    return InProgress(claim.lease)


def after_roll_back(held: bool) -> Known:
    """Return the verdict for a superseded owner that owns the key again, and whose effect was rolled back.

    A retry must run: the key is released, and a duplicate can come at once. ``held``: the operation forbids that.
    """
    return Unknown() if held else InProgress(0.0)


def takes_over(claim: Claim, record: Record) -> bool:
    """Return whether ``claim`` becomes the owner of a record that is present and not expired.

    Either side may forbid it by ``hold``: the owner that vanished, or the new claim.
    """
    if not record.readable or record.version > FORMAT or record.state is not State.RUNNING:
        return False
    if record.token == claim.token:
        return True
    return (
        record.lease_left <= 0
        and not record.hold
        and not claim.hold
        and hmac.compare_digest(record.fingerprint, claim.fingerprint)
    )


def record_id(scope: str, key: str) -> bytes:
    """Digest ``scope`` and ``key`` to the 32 bytes a record is stored under.

    The scope's length comes first, so that no two pairs of scope and key have one digest. The digested text has a
    version: the digest is stored, so that a change of it makes every key new.
    """
    part = scope.encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"1:%d:%b:%b" % (len(part), part, key.encode("utf-8", "surrogatepass"))).digest()

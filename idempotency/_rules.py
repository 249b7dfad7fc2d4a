"""The rules of an idempotency key: who may run, and what a duplicate is told.

Everything the library believes about a key is in this file, and nothing else is: no I/O, no clock, no HTTP.
A store owns keys, an adapter translates, only :func:`judge` decides.

    state found                              same fingerprint            other fingerprint
    absent, or expired                       Execute                     Execute
    running, lease live                      InProgress (time left)      Mismatch
    running, lease over, neither side holds  Execute (attempt + 1)       Mismatch
    running, lease over, held                Unknown                     Mismatch
    running, over since the store looked     InProgress (no time left)   Mismatch
    unknown (held by the owner)              Unknown                     Mismatch
    done                                     Replay                      Mismatch
    done, result not kept                    Completed                   Mismatch
    of a newer format, or damaged            Unreadable                  Unreadable
    mine (same token), not finished          Execute                     Execute

The two rows in which the owner changes are :func:`takes_over`; a store applies them atomically, by its own clock.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
from dataclasses import dataclass, field

FORMAT = 1
"""The record format this reader writes, and the newest it understands."""

_WIDTH = 64
"""The most characters of a token and bytes of a fingerprint that are stored."""


class State(enum.IntEnum):
    """What a record says of its operation. The numbers are stored: never reuse one."""

    RUNNING = 1
    DONE = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One attempt to own a key.

    ``scope`` is the space in which ``key`` is unique (surface and caller), ``fingerprint`` the digest of what is asked.
    ``lease`` is how long the owner may stay silent, ``ttl`` how long a finished record is kept, both in seconds.
    ``hold`` asks that an owner which vanished leaves the key unknown instead of free for a re-run.
    ``watched`` asks the store to announce the record's next change to whoever watches it.
    ``token`` is the owner's: every later write is fenced by it. ``id`` is the record's (:func:`record_id`).
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
    token: str = field(default_factory=lambda: os.urandom(16).hex())
    id: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", record_id(self.scope, self.key))
        # So that every store can hold them; those of this library are 32 hex digits and 32 bytes.
        token = self.token
        if not (0 < len(token) <= _WIDTH and token.isascii() and token.isprintable()):
            digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
            object.__setattr__(self, "token", digest)
        if len(self.fingerprint) > _WIDTH:
            object.__setattr__(self, "fingerprint", hashlib.sha256(self.fingerprint).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a store holds under a key right now, as durations by the store's own clock.

    ``lease_left`` is in seconds and not positive once the lease is over; ``result`` is None while there is none, or
    when it was not kept. ``readable`` is False when the store holds something it cannot make sense of.
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

    @classmethod
    def unreadable(cls, version: int = FORMAT) -> Record:
        """Make the record that stands for one this reader cannot read."""
        return cls(token="", fingerprint=b"", version=version, readable=False)


@dataclass(frozen=True, slots=True)
class Execute:
    """The key is ours: run the operation, for the ``attempt``-th time."""

    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Replay:
    """The operation is done: give its recorded result."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Completed:
    """The operation is done, but its result was too large, or streamed, and was not kept."""


@dataclass(frozen=True, slots=True)
class InProgress:
    """Another owner is running the operation; its lease ends in ``retry_after`` seconds."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The key was used for something else: for what has the fingerprint ``recorded``."""

    recorded: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class Unknown:
    """The operation began and nobody knows how it ended: never re-run, until resolved."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The record is of a newer format, or damaged: never re-run."""

    version: int


Known = Replay | Completed | InProgress | Mismatch | Unknown | Unreadable
"""What anyone but the owner is told."""

Verdict = Execute | Known


def judge(claim: Claim, record: Record) -> Verdict:
    """Say what ``claim`` may do, given the record as the store left it after the claim."""
    if not record.readable or record.version > FORMAT:
        return Unreadable(record.version)
    if record.token == claim.token and record.state is State.RUNNING:
        return Execute(record.attempt)
    if not hmac.compare_digest(record.fingerprint, claim.fingerprint):
        return Mismatch(record.fingerprint)
    match record.state:
        case State.DONE:
            return Completed() if record.result is None else Replay(record.result)
        case State.UNKNOWN:
            return Unknown()
        case State.RUNNING:
            # Not held: the lease ended since the store looked, and the next claim takes it over.
            held = record.hold or claim.hold
            return Unknown() if record.lease_left <= 0 and held else InProgress(max(record.lease_left, 0.0))


def takes_over(claim: Claim, record: Record) -> bool:
    """Say whether a store hands a record that is present and not expired to ``claim``.

    Either side may forbid it: the owner that vanished (it asked for ``hold``), or the newcomer.
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

    The parts are length-prefixed, so that a delimiter inside one cannot imitate another, and the text is versioned:
    this format is stored, and a change of it makes every key new.
    """
    part = scope.encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"1:%d:%b:%b" % (len(part), part, key.encode("utf-8", "surrogatepass"))).digest()

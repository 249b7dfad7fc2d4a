"""What a verb sends to Redis and how its reply is read: written once, for every client.

A record is one hash under ``{prefix}:1:{64 hex digits of its id}``. Its fields: ``v`` format, ``s`` state, ``t``
token, ``f`` fingerprint, ``a`` attempt, ``l`` end of the lease, ``h`` hold, ``r`` result, ``c`` scope, ``k`` key, ``n``
time of the first claim, ``w`` set while a duplicate waits, and with ``write_version=2`` ``o`` name of the operation.
Times are milliseconds by the clock of the Redis server.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from idempotency._durations import DAY, milliseconds, positive, seconds
from idempotency._rules import FORMAT, Claim, Record, State
from idempotency.errors import ConfigurationError, StoreRefusedError, UnreadableError
from idempotency.stores._sealing import Sealing, opened_result, readable_text, shown, shown_size
from idempotency.stores._shown import shortened
from idempotency.stores._versions import short_name
from idempotency.stores.base import Entry

EVAL, EVALSHA = "EVAL", "EVALSHA"

SMALL = 1024**2
"""Bytes of a value that every server takes."""

_BULK = 512 * 1024**2
ASK_BULK = ("CONFIG GET", "proto-max-bulk-len")
"""The command that asks how large a value may be; :func:`bulk` reads its reply."""


class Script:
    """A Lua script and the digest a server remembers it by; and how a packed command of each begins.

    ``names``: the files of which it is made, in their order.
    """

    __slots__ = ("by_digest", "by_text", "sha", "text")

    def __init__(self, *names: str) -> None:
        folder = files("idempotency.stores.redis").joinpath("scripts")
        self.text = b"".join(folder.joinpath(f"{name}.lua").read_bytes() for name in names)
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()
        self.by_digest = b"\r\n$7\r\nEVALSHA\r\n$40\r\n%b" % self.sha
        self.by_text = b"\r\n$4\r\nEVAL\r\n$%d\r\n%b" % (len(self.text), self.text)


_CLAIM, _RENEW, _COMPLETE, _RELEASE, _INSPECT, _RESOLVE, _FORGET, _UNRESOLVED = map(
    Script, ("claim", "renew", "complete", "release", "inspect", "resolve", "forget", "unresolved")
)

_SCANNED = 1000
"""Keys of a server that one command looks at."""

_ID = re.compile(rb"[0-9a-f]{64}")

Command = tuple[Script, tuple[bytes, ...]]
"""A script, and what follows it in the command: the number of keys, the key, the arguments."""

_FORMAT = b"%d" % FORMAT
_FLAG = (b"0", b"1")
_STATES = {int(state): state for state in State}


def claim(key: bytes, claim: Claim, latest: int, sealing: Sealing | None = None, *, named: bool = False) -> Command:
    """Make the command of ``Store.claim``; :func:`record` and :func:`clock` read its reply.

    ``latest``: the last end of a lease that it takes over, in milliseconds by the server's clock. ``named``: the name
    of the operation is written.
    """
    scope, name = _names(claim) if sealing is None else sealing.names(claim)
    values = (
        b"1",
        key,
        _FORMAT,
        claim.token.encode(),
        claim.fingerprint,
        _milliseconds(claim.lease),
        _milliseconds(claim.lease + claim.ttl),
        _FLAG[claim.hold],
        _FLAG[claim.watched],
        scope,
        name,
        b"%d" % latest,
    )
    if not named:
        return _CLAIM, values
    return _CLAIM, (*values, short_name(claim.name).encode("utf-8", "surrogatepass"))


def _names(claim: Claim) -> tuple[bytes, bytes]:
    scope, key = shortened(claim.scope), shortened(claim.key)
    return scope.encode("utf-8", "surrogatepass"), key.encode("utf-8", "surrogatepass")


def renew(key: bytes, claim: Claim) -> Command:
    """Make the command of ``Store.renew``; it replies 1 or 0."""
    life = _milliseconds(claim.lease + claim.ttl)
    return _RENEW, (b"1", key, _FORMAT, claim.token.encode(), _milliseconds(claim.lease), life)


def complete(key: bytes, claim: Claim, result: bytes | None, state: State) -> Command:
    """Make the command of ``Store.complete``; it replies 1 or 0."""
    head = (b"1", key, _FORMAT, claim.token.encode(), b"%d" % state, _milliseconds(claim.ttl))
    return _COMPLETE, head if result is None else (*head, result)


def release(key: bytes, claim: Claim) -> Command:
    """Make the command of ``Store.release``; it replies 1 or 0."""
    return _RELEASE, (b"1", key, _FORMAT, claim.token.encode())


def inspect(key: bytes) -> Command:
    """Make the command of ``Inspecting.inspect``; :func:`entry` reads its reply."""
    return _INSPECT, (b"1", key)


def resolve(key: bytes, outcome: str, result: bytes | None, ttl: float) -> Command:
    """Make the command of ``Resolving.resolve``; it replies 1 or 0."""
    state = b"%d" % State.DONE if outcome == "done" else b"0"
    head = (b"1", key, _FORMAT, os.urandom(16).hex().encode(), state, _milliseconds(seconds("ttl", ttl)))
    return _RESOLVE, head if result is None else (*head, result)


def forget(key: bytes) -> Command:
    """Make the command of ``Forgetting.forget``; it replies 1 or 0."""
    return _FORGET, (b"1", key)


def record(claim: Claim, reply: Any, sealing: Sealing | None) -> Record:
    """Read the reply to a claim."""
    if len(reply) == 2:
        return Record.unreadable(reply[1] or FORMAT)
    if len(reply) == 3:
        _, attempt, age = reply
        return Record(
            token=claim.token,
            fingerprint=claim.fingerprint,
            attempt=attempt,
            lease_left=claim.lease,
            hold=claim.hold,
            age=age / 1000,
        )
    _, version, state, attempt, lease, hold, age, token, fingerprint, *stored = reply
    try:
        result = opened_result(sealing, claim.id, stored[0]) if stored else None
    except UnreadableError:
        return Record.unreadable(version)
    return Record(
        token=token.decode("utf-8", "replace"),
        fingerprint=fingerprint,
        state=_STATES[state],
        attempt=attempt,
        lease_left=lease / 1000,
        hold=hold == 1,
        result=result,
        version=version,
        age=age / 1000,
    )


def clock(reply: Any) -> float:
    """Read from the reply to a claim what the server's clock shows, in milliseconds."""
    now: float = reply[0]
    return now


def entry(record: bytes, reply: Sequence[Any] | None, sealing: Sealing | None) -> Entry | None:
    """Read the reply to an inspection of the record of this id."""
    if not reply or not State.RUNNING <= reply[1] <= State.UNKNOWN:
        return None
    version, state, attempt, hold, age, lease, expires, size, stored_scope, stored_key, _, name = reply
    scope, key = shown(sealing, record, stored_scope, stored_key)
    return Entry(
        id=record,
        scope=scope,
        key=key,
        state=State(state),
        attempt=attempt,
        hold=hold == 1,
        age=age / 1000,
        lease_left=max(lease, -age) / 1000,
        expires_in=None if expires < 0 else expires / 1000,
        result_size=shown_size(stored_scope, None if size < 0 else size),
        version=version,
        name=readable_text(name),
    )


def bulk(reply: Any) -> int:
    """Read how many bytes a value may have; the server's default where the reply does not contain it."""
    values = reply.values() if isinstance(reply, dict) else reply[1::2] if isinstance(reply, list | tuple) else ()
    return next((int(size) for size in values if isinstance(size, bytes | str)), _BULK)


def check_size(what: str, size: int, largest: int) -> None:
    """Raise StoreRefusedError for a value of so many bytes that the server would close the connection."""
    if size > largest:
        raise StoreRefusedError(f"the {what} of {size} bytes is larger than Redis takes ({largest})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """How many copies of a record there must be before a claim or a completion counts.

    ``replicas``: how many replicas must have received the write (``WAIT``). Default 1.
    ``timeout``: seconds to wait for them. Default 1.
    ``aof``: whether it must be on disk, at the primary and at those replicas (``WAITAOF``, Redis 7.2; the servers need
    ``appendonly yes``). Default False. With ``aof``, ``replicas`` may be 0.

    What a failover can lose:

    - no ``Durability``: replication is asynchronous, so the promoted replica may lack the last claims and
      completions. A retry of such a key runs again.
    - ``replicas=n``: every acknowledged write is with n replicas. It can still be lost when another replica is
      promoted; with n the number of all replicas, only by a server that restarts without its data.
    - ``aof=True``: the writes also survive a restart of all servers.
    """

    replicas: int = 1
    timeout: float = 1.0
    aof: bool = False

    def __post_init__(self) -> None:
        if self.replicas < (0 if self.aof else 1):
            raise ConfigurationError(f"durability needs at least one replica, or aof: {self.replicas!r}")
        positive("the durability's timeout", self.timeout, DAY)

    @property
    def command(self) -> tuple[Any, ...]:
        """The command that follows a write."""
        wait = milliseconds(self.timeout)
        return ("WAITAOF", 1, self.replicas, wait) if self.aof else ("WAIT", self.replicas, wait)

    def met(self, reply: Any) -> bool:
        """Read the reply to :attr:`command`, which may be an error."""
        if isinstance(reply, Exception):
            return False
        if self.aof:
            return bool(reply[0] >= 1 and reply[1] >= self.replicas)
        return bool(reply >= self.replicas)


def scan(prefix: bytes, cursor: int) -> tuple[Any, ...]:
    """Make the command that lists a part of the records of one server, after ``cursor``."""
    return "SCAN", cursor, "MATCH", _pattern(prefix), "COUNT", _SCANNED


def scan_unresolved(prefix: bytes, cursor: int) -> tuple[Any, ...]:
    """Make the command that lists records of unknown outcome in a part of one server; see :func:`unresolved`."""
    return EVAL, _UNRESOLVED.text, 0, cursor, _pattern(prefix), _SCANNED


def unresolved(prefix: bytes, reply: Sequence[Any]) -> tuple[int, list[tuple[int, bytes]]]:
    """Read the next cursor, and the time of the first claim and the id of each record, from such a list."""
    cursor, found = reply
    digits = ((key[len(prefix) :], int(first)) for key, first in zip(found[::2], found[1::2], strict=True))
    return int(cursor), [(first, bytes.fromhex(id.decode())) for id, first in digits if _ID.fullmatch(id)]


def _pattern(prefix: bytes) -> bytes:
    return re.sub(rb"([*?\[\]\\^])", rb"\\\1", prefix) + b"*"


def ids(prefix: bytes, keys: Sequence[bytes]) -> list[bytes]:
    """Read the ids of records from the names of keys; other keys are ignored."""
    digits = (key[len(prefix) :] for key in keys)
    return [bytes.fromhex(found.decode()) for found in digits if _ID.fullmatch(found)]


class _Heads(dict[int, bytes]):
    """What stands before a part of a command that has so many bytes."""

    def __missing__(self, size: int) -> bytes:
        return b"\r\n$%d\r\n" % size


_HEADS = _Heads((size, b"\r\n$%d\r\n" % size) for size in range(256))


def pack(start: bytes, rest: tuple[bytes, ...]) -> bytes:
    """Write a command as a Redis client sends it (RESP: an array of bulk strings).

    ``start``: :attr:`Script.by_digest` or :attr:`Script.by_text`.
    """
    written = [b"*%d" % (len(rest) + 2), start]
    for part in rest:
        written += _HEADS[len(part)], part
    written.append(b"\r\n")
    return b"".join(written)


# A policy's few durations are written for every claim.
@lru_cache(maxsize=256)
def _milliseconds(duration: float) -> bytes:
    return b"%d" % milliseconds(duration)

"""The running operation, as its own code sees it."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Generator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from idempotency._core import Claim
from idempotency._transaction import Transaction
from idempotency.errors import TransactionError
from idempotency.policy import Outcome

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

RUNNING: ContextVar[Operation | None] = ContextVar("idempotency_operation", default=None)


def current() -> Operation | None:
    """Return the operation this code runs under, in any task or thread started below it; None outside of one."""
    return RUNNING.get()


class Lost:
    """The signal that the lease is lost: another owner may be running the same operation.

    A flag (``if operation.lost: ...``), also from a thread, and awaitable in the operation's event loop
    (``await operation.lost``). Once set it stays set. Nothing is cancelled: what to do is the operation's to decide.
    """

    __slots__ = ("_event", "_set")

    def __init__(self) -> None:
        self._set = False
        self._event: asyncio.Event | None = None

    def __bool__(self) -> bool:
        return self._set

    def __await__(self) -> Generator[object, None, None]:
        if self._event is None:
            self._event = asyncio.Event()
            if self._set:
                self._event.set()
        yield from self._event.wait().__await__()

    def set(self) -> None:
        """Give the signal, in the operation's event loop."""
        self._set = True
        if self._event is not None:
            self._event.set()


class Operation:
    """One run of an operation under its idempotency key.

    ``scope`` and ``key`` name its record, ``attempt`` counts its runs from 1 (more than 1: an earlier owner vanished,
    and its effect may exist), ``lost`` tells that its lease is gone.
    """

    __slots__ = ("_claim", "_transaction", "_word", "attempt", "lost")

    def __init__(self, claim: Claim, attempt: int, transaction: Transaction | None = None) -> None:
        self._claim = claim
        self._transaction = transaction
        self._word: Outcome | None = None
        self.attempt = attempt
        self.lost = Lost()

    @property
    def scope(self) -> str:
        """Return the space in which the key is unique."""
        return self._claim.scope

    @property
    def key(self) -> str:
        """Return the idempotency key as the caller sent it, without quotes."""
        return self._claim.key

    @property
    def session(self) -> AsyncSession:
        """Return the session that is committed together with the record; never commit it yourself.

        Raises :class:`~idempotency.errors.TransactionError` where the adapter was given no ``session=``.
        """
        if self._transaction is None:
            raise TransactionError("There is no session: give session=async_sessionmaker(engine) to the middleware.")
        return self._transaction.session

    def derive(self, name: str) -> str:
        """Derive the idempotency key for a downstream call: the same for every attempt, other for another ``name``.

        The key is 36 characters long (the form of a UUID), which every provider known to us accepts.
        """
        digest = hashlib.sha256(b"derive:1:%b:%b" % (self._claim.id, name.encode()))
        return str(uuid.UUID(bytes=digest.digest()[:16], version=5))

    def hold(self) -> None:
        """Say that the effect has happened: the key is not released from here on.

        An end that would have released it (an exception, a 5xx) leaves it unknown, until somebody resolves it. What
        is stored is stored as before. Kept in memory: for a crash, ``Policy.on_crash`` decides.
        """
        self._word = "hold"

    def release(self) -> None:
        """Say that the effect has not happened: the key is released at the end, whatever that end is."""
        self._word = "release"

    def settle(self, outcome: Outcome) -> Outcome:
        """Return what becomes of the key, given what the policy says and what the operation has said."""
        if self._word == "release":
            return "release"
        if self._word == "hold" and outcome == "release":
            return "hold"
        return outcome

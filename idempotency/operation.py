"""The running operation, as its own code sees it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime
from heapq import heappop, heappush
from typing import Any, NamedTuple, Protocol

from idempotency._rules import Claim
from idempotency.errors import TransactionError
from idempotency.policy import Outcome


class NewMessage(NamedTuple):
    """A message as :meth:`Operation.emit` is given it."""

    aggregate_type: str
    aggregate_id: object
    type: str
    payload: object
    headers: Mapping[str, str] | None
    available_at: datetime | float | None


class HasSession(Protocol):
    """What has a session for an operation: its transaction."""

    @property
    def session(self) -> Any:
        """Return the session; the first call makes it."""
        ...

    def emit(self, operation: Operation, message: NewMessage, outbox: Any, /) -> str:
        """Write a message of the operation with the record, and return its id."""
        ...


RUNNING: ContextVar[Operation | None] = ContextVar("idempotency_operation", default=None)


def current() -> Operation | None:
    """Return the operation that calls this, also in a task or thread that it has started; None outside of one."""
    return RUNNING.get()


class Lost:
    """The signal that the lease is lost: another owner may be running the same operation.

    A flag (``if operation.lost: ...``), also from a thread, and awaitable in any event loop (``await operation.lost``).
    Once set it stays set. Nothing is cancelled: the operation decides what to do. The flag is judged by the clock when
    it is read, so that it is right also at once after the process was paused, or its event loop blocked.
    """

    __slots__ = ("_check", "_set", "_waiting")

    def __init__(self) -> None:
        self._check: Callable[[], object] | None = None
        self._set = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def __bool__(self) -> bool:
        check = self._check  # the operation may end meanwhile, in another thread
        if not self._set and check is not None:
            check()
        return self._set

    def check_by(self, check: Callable[[], object] | None) -> None:
        """Call ``check`` whenever the flag is read: it gives the signal if the lease is over by now. None: do not."""
        self._check = check

    def __await__(self) -> Generator[object, None, None]:
        event = asyncio.Event()
        waiting = asyncio.get_running_loop(), event
        # Before the flag is read, so that a signal from another thread is not missed.
        self._waiting.append(waiting)
        try:
            if not self:
                yield from event.wait().__await__()
        finally:
            self._waiting.remove(waiting)

    def set(self) -> bool:
        """Give the signal, from any thread; False if it was given before."""
        if self._set:
            return False
        self._set = True
        for loop, event in list(self._waiting):
            # A closed loop has no tasks that wait.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)
        return True


class Operation:
    """One run of an operation under its idempotency key.

    ``name`` says what is done (``"POST /orders/7"``), ``scope`` and ``key`` name its record, ``attempt`` counts its
    runs from 1 (more than 1: an earlier owner vanished, and its effect may exist), ``lost`` is the signal
    that its lease is lost.
    """

    __slots__ = (
        *("_claim", "_derived", "_messages", "_numbers", "_override", "_returned", "_transaction"),
        *("attempt", "lost", "name"),
    )

    def __init__(self, claim: Claim, attempt: int, transaction: HasSession | None = None, name: str = "") -> None:
        self._claim = claim
        self._transaction = transaction
        self.name = name
        self._override: Outcome | None = None
        self._derived = False
        self._messages: dict[tuple[str, ...], itertools.count[int]] = {}
        self._numbers: dict[str, int] = {}
        self._returned: dict[tuple[str, ...], list[int]] = {}
        self.attempt = attempt
        self.lost = Lost()

    def __repr__(self) -> str:
        return f"<Operation {self.name} record={self._claim.id.hex()[:12]} attempt={self.attempt}>"

    @property
    def scope(self) -> str:
        """Return the space in which the key is unique."""
        return self._claim.scope

    @property
    def key(self) -> str:
        """Return the idempotency key as the caller sent it, without quotes."""
        return self._claim.key

    @property
    def session(self) -> Any:
        """Return the session that is committed together with the record; never commit it yourself.

        An ``AsyncSession``, or in a synchronous function or consumer a ``Session``.
        Raises :class:`~idempotency.errors.TransactionError` where the adapter was given no ``session=``, and in HTTP
        once the response is recorded: later changes would not be committed.
        """
        if self._transaction is None:
            raise TransactionError("There is no session: give the middleware or decorator session=, a sessionmaker.")
        return self._transaction.session

    def derive(self, name: str) -> str:
        """Derive the idempotency key for a downstream call: the same for every attempt.

        Another ``name`` gives another key. It is 36 characters long (the form of a UUID), which every provider known
        to us accepts.
        """
        self._derived = True
        return self._derive(b"derive:1", name)

    @property
    def has_effect_elsewhere(self) -> bool:
        """Return whether its code has derived a key for a downstream call, or declared what became of its effect."""
        return self._derived or self._override is not None

    def _derive(self, purpose: bytes, name: str) -> str:
        digest = hashlib.sha256(b"%b:%b:%b" % (purpose, self._claim.id, name.encode("utf-8", "surrogatepass")))
        return str(uuid.UUID(bytes=digest.digest()[:16], version=5))

    def emit(
        self,
        *,
        aggregate_type: str,
        aggregate_id: object,
        type: str,
        payload: object,
        headers: Mapping[str, str] | None = None,
        available_at: datetime | float | None = None,
        outbox: Any = None,
    ) -> str:
        """Emit a message, which commits with the effect and the record, and return its id.

        It is written just before the commit, together with the operation's other messages, unless the session or a
        savepoint that is open now is rolled back. The arguments are those of
        :meth:`idempotency.outbox.Outbox.emit`; ``outbox`` is the :class:`~idempotency.outbox.Outbox` that has the
        table, default ``Outbox()``.
        Raises :class:`~idempotency.errors.TransactionError` where the adapter was given no ``session=``, and once the
        operation has ended; :class:`~idempotency.errors.EmitRefusedError` for a message that cannot be written or
        carried.
        """
        if self._transaction is None:
            raise TransactionError(
                "There is no transaction to emit in: give the middleware or decorator session=, a sessionmaker, so that"
                " the message commits with the record; or call Outbox.emit(session, ...) in a transaction of your own."
            )
        message = NewMessage(aggregate_type, aggregate_id, type, payload, headers, available_at)
        return self._transaction.emit(self, message, outbox)

    def next_message_id(self, *names: str) -> str:
        """Return the id of the next message that the operation emits under ``names``, none of which has a NUL in it.

        It is the same at each run of the operation, also if a run emits its other messages in another order, or not
        all of them. Else one message could have the id of another one, and a consumer would drop it.
        """
        # Not to look whether there is one: another thread might take it first.
        try:
            number = heappop(self._returned[names])
        except (KeyError, IndexError):
            number = next(self._messages.setdefault(names, itertools.count(1)))
        id_ = self._derive(b"message:1", "\0".join((*names, str(number))))
        self._numbers[id_] = number
        return id_

    def return_message_id(self, id: str, *names: str) -> None:
        """Let :meth:`next_message_id` give an id again, since what had it was not written: the first ones first.

        Otherwise a run that tries again after a conflict would use other ids than the next run, which meets none.
        """
        heappush(self._returned.setdefault(names, []), self._numbers[id])

    def hold(self) -> None:
        """Declare that the effect has happened: the key is not released from here on.

        An end that would have released it (an exception, a 5xx) makes it unknown, until it is resolved. A result that
        would have been stored is stored. This is noted in memory only: for a crash, ``Policy.on_crash`` decides.
        """
        self._override = "hold"

    def release(self) -> None:
        """Declare that the effect has not happened: the key is released at the end, however the operation ends."""
        self._override = "release"

    def outcome_after(self, outcome: Outcome) -> Outcome:
        """Return the outcome, given the one that the policy chose: what the operation has declared replaces it."""
        if self._override == "release":
            return "release"
        if self._override == "hold" and outcome == "release":
            return "hold"
        return outcome

"""Idempotency keys for message handlers: a redelivered message takes effect once, and is settled once.

``handler(message)`` returns the result or raises, as a framework without an adapter needs it.
``handler.deliver(message)`` says instead how the broker is to be answered, as an adapter needs it:

    the message                              outcome                    the broker
    was handled, and committed               Done(result)               ack
    had been handled                         Replayed(result)           ack; replies and publishes go out again
    is being handled by another, or the      Retry(after)               redeliver later, never ack
    store did not answer, or a conflict
    was handled and failed                   Failed(error)              its own retry: nothing is committed
    failed for good, or too often, or its    DeadLetter(reason, error)  dead-letter
    key was used for something else, or
    its outcome is unknown
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from idempotency._calls import KIND, Calls, Ended, Raised, Ran, is_async, refusal
from idempotency._core import Claim, Completed, InProgress, Replay, record_id
from idempotency._result import Codec, results_of
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
    UnreadableError,
)
from idempotency.events import EventHook, log_event
from idempotency.function import dress, runner_of, work_of
from idempotency.operation import current
from idempotency.policy import Outcome, Policy
from idempotency.stores.base import Store, SyncStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

_WEEK = Policy(ttl=timedelta(days=7))
_SOON = 1.0


@dataclass(frozen=True, slots=True)
class Done:
    """The message was handled, and what it did is committed: ack."""

    result: Any


@dataclass(frozen=True, slots=True)
class Replayed:
    """The message had been handled before: ack. ``result`` is the recorded one, None where it was not kept."""

    result: Any


@dataclass(frozen=True, slots=True)
class Retry:
    """The message cannot be handled now: redeliver in about ``after`` seconds, and never ack."""

    after: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed and what it did in the session is rolled back: the broker's own retry."""

    error: Exception


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """The message is not to be delivered again: ``reason`` is stable, such as ``"exhausted"`` or ``"key-reused"``."""

    reason: str
    error: Exception


Delivered = Done | Replayed | Retry | Failed | DeadLetter
"""How a delivery is to be settled; each means one settlement."""

Final = Literal["dead-letter", "stop"]
"""What becomes of a message that no redelivery helps: a dead letter, or ``deliver`` raises and the consumer stops."""


class ExhaustedError(IdempotencyError):
    """The message was delivered more often than ``max_attempts`` and is not handled again."""

    code = "exhausted"
    title = "The message was delivered too often"


class AsyncHandler(Protocol[P, R]):
    """A decorated asynchronous handler."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Handle a message and return the result, recorded or new; raise where the message must be redelivered."""
        ...

    async def deliver(self, message: Any, /, *, attempt: int | None = None) -> Delivered:
        """Handle a message, and say how it is to be settled; ``attempt`` is the broker's count of its deliveries."""
        ...

    async def forget(self, key: str, /) -> bool:
        """Forget that a message was handled, so that it can be sent again; False when it was not, or is just now."""
        ...


class SyncHandler(Protocol[P, R]):
    """A decorated synchronous handler."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """See :meth:`AsyncHandler.__call__`."""
        ...

    def deliver(self, message: Any, /, *, attempt: int | None = None) -> Delivered:
        """See :meth:`AsyncHandler.deliver`."""
        ...

    def forget(self, key: str, /) -> bool:
        """See :meth:`AsyncHandler.forget`."""
        ...


class Decorate(Protocol):
    """What :func:`idempotent_consumer` returns."""

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncHandler[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncHandler[P, R]: ...


def idempotent_consumer(
    store: Store | SyncStore,
    *,
    consumer: str,
    key: Callable[[Any], str],
    session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None = None,
    policy: Policy = _WEEK,
    codec: Codec | None = None,
    fingerprint: Callable[[Any], bytes | str] | None = None,
    lock_timeout: float = 5.0,
    max_attempts: int | None = None,
    attempt: Callable[[Any], int] | None = None,
    on_exhausted: Final = "dead-letter",
    on_refused: Final = "dead-letter",
    on_event: EventHook = log_event,
) -> Decorate:
    """Make a message handler, of one argument or more, take effect once for each message.

    ``consumer`` names who consumes: two consumers of one message both run. ``key`` is given the message and returns
    what identifies it, the same at every redelivery; without one the handler raises
    :class:`~idempotency.errors.KeyMissingError`.
    ``session``, ``lock_timeout``, ``policy``, ``codec``, ``fingerprint``: as for :func:`~idempotency.idempotent`. With
    ``session`` the handler's effect and its record are one transaction, and what it raises rolls back both. Records
    live for 7 days by default: longer than the broker can redeliver.
    ``max_attempts``: how often a message may fail, by the broker's count of deliveries, counted from 1, which
    ``attempt`` reads from the message if the adapter does not give it; default None, as often as the broker tries.
    ``on_exhausted``: what then becomes of it. ``on_refused``: what becomes of a message whose key was used for another
    message, whose outcome is unknown, or whose record cannot be read. Both ``"dead-letter"`` (the default) or
    ``"stop"``: ``deliver`` raises, and the consumer stops.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    if not isinstance(consumer, str) or not consumer:
        raise ConfigurationError(f"consumer must be a name, not {consumer!r}")
    if max_attempts is not None and max_attempts < 1:
        raise ConfigurationError(f"max_attempts must be at least 1: {max_attempts!r}")
    for option, value in (("on_exhausted", on_exhausted), ("on_refused", on_refused)):
        if value not in ("dead-letter", "stop"):
            raise ConfigurationError(f'{option} must be "dead-letter" or "stop", not {value!r}')

    def decorate(function: Callable[..., Any]) -> Any:
        calls = Calls(
            name=consumer,
            scope=f"consumer:1:{consumer}",
            policy=policy,
            results=results_of(function, codec),
            on_event=on_event,
        )
        rules = _Rules(calls, key, fingerprint, max_attempts, attempt, on_exhausted, on_refused)
        run, bind = runner_of(function, store, calls, session, lock_timeout), work_of(function, session)
        equip = _equip_async if is_async(function) else _equip_sync
        return dress(equip(rules, store, run, bind, _first_parameter(function)), function, session)

    return cast(Decorate, decorate)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What does not depend on whether the handler is awaited."""

    calls: Calls
    key: Callable[[Any], str]
    fingerprint: Callable[[Any], bytes | str] | None
    max_attempts: int | None
    attempt: Callable[[Any], int] | None
    on_exhausted: Final
    on_refused: Final

    def claim(self, message: Any) -> Claim:
        compared = None if self.fingerprint is None else self.fingerprint(message)
        return self.calls.claim(self.key(message), compared)

    def count(self, message: Any, attempt: int | None) -> int:
        """Return which delivery this is; 0 where nobody counts."""
        if self.max_attempts is None:
            return 0
        if attempt is None and self.attempt is not None:
            attempt = self.attempt(message)
        if attempt is None:
            raise ConfigurationError("max_attempts needs the broker's count of deliveries: give attempt=")
        return attempt

    def admitted(self, count: int, work: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse a message that was delivered too often: its handler may have taken the process down each time."""
        if self.max_attempts is not None and count > self.max_attempts:
            operation = current()
            if operation is not None:
                operation.release()
            raise ExhaustedError(f"the message was delivered {count} times")
        return work

    def outcome(self, claim: Claim, ended: Ended, count: int) -> Delivered:
        match ended:
            case Ran(value):
                return Done(value)
            case Raised(error, outcome):
                return self._failed(error, outcome, count)
            case Completed() | Replay():
                try:
                    return Replayed(self.replay(claim, ended))
                except (RecordedFailureError, UnreadableError) as error:
                    return self._final(error, self.on_refused)
            case InProgress(retry_after):
                self.calls.emit("in-progress", claim)
                return Retry(max(retry_after, 0.0))
            case told:
                self.calls.emit(KIND[type(told)], claim)
                return self._final(refusal(told), self.on_refused)

    def _failed(self, error: Exception, outcome: Outcome, count: int) -> Delivered:
        # A redelivery would only be told what is recorded now.
        if outcome != "release":
            kept: type[IdempotencyError] = RecordedFailureError if outcome == "store" else OutcomeUnknownError
            return self._final(error, self.on_refused, kept.code)
        if self.max_attempts is not None and count >= self.max_attempts:
            return self._final(error, self.on_exhausted, ExhaustedError.code)
        return Failed(error)

    def _final(self, error: Exception, rule: Final, reason: str = "") -> DeadLetter:
        if rule == "stop":
            raise error
        return DeadLetter(reason or getattr(error, "code", "error"), error)

    def replay(self, claim: Claim, told: Replay | Completed) -> Any:
        """Return the recorded result; None where it was not kept."""
        if isinstance(told, Completed):
            self.calls.emit("completed", claim)
            return None
        try:
            value = self.calls.results.decode(told.result)
        except UnreadableError as error:
            self.calls.emit("unreadable", claim, error=error)
            raise
        self.calls.emit("replayed", claim)
        return value

    def answer(self, claim: Claim, ended: Ended) -> Any:
        """Return the result, or raise: a framework that knows nothing else redelivers what raises."""
        match ended:
            case Ran(value):
                return value
            case Raised(error, _):
                raise error
            case Completed() | Replay():
                return self.replay(claim, ended)
            case told:
                self.calls.emit(KIND[type(told)], claim)
                raise refusal(told)


def _first_parameter(function: Callable[..., Any]) -> str:
    names = list(inspect.signature(function).parameters)
    if not names:
        raise ConfigurationError("a consumer takes the message as its first argument")
    return names[0]


def _equip_async(
    rules: _Rules, store: Any, run: Callable[..., Any], bind: Callable[..., Callable[..., Any]], first: str
) -> Any:
    async def handle(*args: Any, **kwargs: Any) -> Any:
        claim = rules.claim(args[0] if args else kwargs[first])
        return rules.answer(claim, await run(claim, bind(*args, **kwargs)))

    async def deliver(message: Any, /, *, attempt: int | None = None) -> Delivered:
        count, claim, work = rules.count(message, attempt), rules.claim(message), bind(message)
        try:
            ended = await run(claim, lambda *session: rules.admitted(count, work)(*session))
        except StoreError:
            return Retry(_SOON)
        return rules.outcome(claim, ended, count)

    async def forget(key: str, /) -> bool:
        forgotten: bool = await store.forget(record_id(rules.calls.scope, key))
        return forgotten

    handler: Any = handle
    handler.deliver, handler.forget = deliver, forget
    return handler


def _equip_sync(
    rules: _Rules, store: Any, run: Callable[..., Any], bind: Callable[..., Callable[..., Any]], first: str
) -> Any:
    def handle(*args: Any, **kwargs: Any) -> Any:
        claim = rules.claim(args[0] if args else kwargs[first])
        return rules.answer(claim, run(claim, bind(*args, **kwargs)))

    def deliver(message: Any, /, *, attempt: int | None = None) -> Delivered:
        count, claim, work = rules.count(message, attempt), rules.claim(message), bind(message)
        try:
            ended = run(claim, lambda *session: rules.admitted(count, work)(*session))
        except StoreError:
            return Retry(_SOON)
        return rules.outcome(claim, ended, count)

    def forget(key: str, /) -> bool:
        forgotten: bool = store.forget_sync(record_id(rules.calls.scope, key))
        return forgotten

    handler: Any = handle
    handler.deliver, handler.forget = deliver, forget
    return handler

"""Idempotency keys for message handlers: a redelivered message takes effect once, and is settled once.

``handler(message)`` returns the result or raises, as a framework without an adapter needs it.
``handler.deliver(message)`` returns instead how the delivery is to be settled, as an adapter needs it:

    the message                              settlement                 the broker
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
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

from idempotency._engine.names import DecoratedFunction, scope_is_taken
from idempotency._engine.readers import Fingerprint, check_readers, compared_by
from idempotency._hooks import check_callable, discard_coroutine
from idempotency._messages.consumers import Consumer
from idempotency._messages.consumers_sync import SyncConsumer
from idempotency._messages.options import ConsumerOptions
from idempotency._messages.rules import Rules
from idempotency._messages.settlement import DeadLetter, Delivered, Done, ExhaustedError, Failed, Final, Replayed, Retry
from idempotency._signature import bind_arguments, is_async, name_of, needs_session, wrap_like
from idempotency.errors import ConfigurationError, KeyMissingError
from idempotency.stores.base import Store, SyncStore

__all__ = [
    "AsyncHandler",
    "Consumer",
    "ConsumerOptions",
    "DeadLetter",
    "Delivered",
    "Done",
    "ExhaustedError",
    "Failed",
    "Final",
    "Fingerprint",
    "Replayed",
    "Retry",
    "SyncConsumer",
    "SyncHandler",
    "idempotent_consumer",
]

_logger = logging.getLogger("idempotency")

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class AsyncHandler(Protocol[P, R]):
    """A decorated asynchronous handler."""

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Handle a message and return the result, recorded or new; raise where the message must be redelivered."""
        ...

    async def deliver(
        self,
        message: Any,
        /,
        *,
        attempt: int | None = None,
        key: Callable[[Any], object] | None = None,
        body: bytes | None = None,
    ) -> Delivered:
        """Handle a message, and return how it is to be settled.

        ``attempt`` is the broker's count of its deliveries. ``key`` returns what identifies a message; it is used where
        the handler has no ``key`` of its own. ``body`` is the message as the broker delivered it, for
        ``fingerprint="body"``.
        """
        ...

    async def forget(self, key: str, /) -> bool:
        """Forget that a message was handled, so that it can be sent again.

        Return False where it was not handled, or is being handled.
        """
        ...

    def unsettled(self, error: BaseException, /) -> None:
        """Emit the event of a delivery that could not be settled: the broker delivers the message again."""
        ...

    @property
    def consumer(self) -> str:
        """Return the name of the consumer."""
        ...

    @property
    def max_attempts(self) -> int | None:
        """Return how often a message is handled before it is a dead letter; None: as often as it is delivered."""
        ...

    @property
    def ttl(self) -> float:
        """Return for how many seconds the record of a message is stored."""
        ...


class SyncHandler(Protocol[P, R]):
    """A decorated synchronous handler."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """See :meth:`AsyncHandler.__call__`."""
        ...

    def deliver(
        self,
        message: Any,
        /,
        *,
        attempt: int | None = None,
        key: Callable[[Any], object] | None = None,
        body: bytes | None = None,
    ) -> Delivered:
        """See :meth:`AsyncHandler.deliver`."""
        ...

    def forget(self, key: str, /) -> bool:
        """See :meth:`AsyncHandler.forget`."""
        ...

    def unsettled(self, error: BaseException, /) -> None:
        """See :meth:`AsyncHandler.unsettled`."""
        ...

    @property
    def consumer(self) -> str:
        """See :attr:`AsyncHandler.consumer`."""
        ...

    @property
    def max_attempts(self) -> int | None:
        """See :attr:`AsyncHandler.max_attempts`."""
        ...

    @property
    def ttl(self) -> float:
        """See :attr:`AsyncHandler.ttl`."""
        ...


class Decorate(Protocol):
    """The decorator that :func:`idempotent_consumer` returns."""

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
    key: Callable[[Any], object] | None = None,
    fingerprint: Fingerprint = "body",
    attempt: Callable[[Any], int | None] | None = None,
    context: Callable[[Any], AbstractContextManager[object]] | None = None,
    **options: Unpack[ConsumerOptions],
) -> Decorate:
    """Make a message handler, of one argument or more, take effect once for each message.

    ``consumer`` is the name of the consumer. Two consumers of one message both run. Two handlers with one name log a
    warning: a message that one has handled is not handled by the other. ``key`` is given the message and returns what
    identifies it, as text: the same at every redelivery, and unique among all messages of this consumer. Without it the
    handler raises :class:`~idempotency.errors.KeyMissingError`. An adapter of :mod:`idempotency.adapters` reads the
    identity that its broker gives a message, so that ``key`` is not needed there.
    ``fingerprint``: what repeated messages must have in common with the first. ``"body"``, the default: the raw body,
    as the broker delivered it, without headers. Only an adapter has the body: a direct call, and ``deliver()``
    without ``body=``, compares nothing. A function is given the message and returns text or bytes. None: nothing.
    Where the record or the message compares nothing, only the key counts.
    ``attempt`` is given the message and returns the broker's count of its deliveries, 1 for the first; an adapter
    reads it too. A message for which one of these functions raises, or returns a wrong value, is settled by
    ``on_refused``.
    ``context`` is given the message and returns a context manager in which it is handled, such as
    :meth:`OpenTelemetry.continuing` of its headers. What it raises stops the consumer. Default None.
    The other options are :class:`ConsumerOptions`. With ``session=`` the handler's effect and its record are one
    transaction; an error of the handler rolls back both.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    check_readers(key, fingerprint)
    if attempt is not None:
        check_callable("attempt=", attempt)
    if context is not None:
        check_callable("context=", context)

    def decorate(function: Callable[..., Any]) -> Any:
        session = options.get("session")
        if session is None and needs_session(function):
            raise ConfigurationError(
                f"{name_of(function)} has a parameter session, and session= was not given: pass a sessionmaker"
            )
        bind = bind_arguments(function, session)
        read = _Reader(_first_parameter(function), key, fingerprint, attempt, context or _no_context)
        if is_async(function):
            handler = _handler_async(Consumer(store, consumer, function, options), read, bind)
        else:
            handler = _handler_sync(SyncConsumer(store, consumer, function, options), read, bind)
        handler._made = DecoratedFunction(function, key, consumer, options.get("codec"))
        if scope_is_taken(store, f"consumer:{consumer}", handler._made):
            _logger.warning(
                "two different handlers of this process are the consumer %r: a message that one has handled is not "
                "handled by the other; give each a consumer= of its own",
                consumer,
            )
        return wrap_like(handler, function, session)

    return cast(Decorate, decorate)


def _no_context(_: Any) -> AbstractContextManager[object]:
    return nullcontext()


def _first_parameter(function: Callable[..., Any]) -> str:
    names = list(inspect.signature(function).parameters)
    if not names:
        raise ConfigurationError("a consumer takes the message as its first argument")
    return names[0]


@dataclass(frozen=True, slots=True)
class _Fields:
    """The values that were read from a message."""

    key: object
    attempt: int | None
    compared: bytes | str | None


@dataclass(frozen=True, slots=True)
class _Reader:
    """The functions that read a message. ``first``: the name of the handler's first parameter, which is the message."""

    first: str
    key: Callable[[Any], object] | None
    fingerprint: Fingerprint
    attempt: Callable[[Any], int | None] | None
    context: Callable[[Any], AbstractContextManager[object]]

    def message(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs[self.first]

    def read(
        self,
        rules: Rules,
        message: Any,
        attempt: int | None,
        key_of_adapter: Callable[[Any], object] | None,
        body: bytes | None,
    ) -> _Fields | DeadLetter:
        """Read a delivered message, or return the dead letter of a message that cannot be read.

        Raises :class:`~idempotency.errors.KeyMissingError` where neither the handler nor the adapter has a key
        function.
        """
        key_function = self._key_function(key_of_adapter)
        try:
            key = key_function(message)
        except Exception as error:
            return rules.refuse_unidentified(error, attempt) if self.key is None else rules.refuse_unreadable(error)
        try:
            if attempt is None and self.attempt is not None:
                attempt = self.attempt(message)
                if discard_coroutine("attempt=", self.attempt, attempt):
                    raise ConfigurationError("attempt= must return a number, not a coroutine")
            return _Fields(key, attempt, compared_by(self.fingerprint, lambda: body, message))
        except Exception as error:
            return rules.refuse_unreadable(error)

    def key_of(self, message: Any) -> object:
        return self._key_function()(message)

    def compared(self, message: Any) -> bytes | str | None:
        return compared_by(self.fingerprint, lambda: None, message)

    def _key_function(self, key_of_adapter: Callable[[Any], object] | None = None) -> Callable[[Any], object]:
        key_function = self.key or key_of_adapter
        if key_function is None:
            raise KeyMissingError(
                "a message came to a consumer without key=: give key=, or consume through an adapter, which reads "
                "the identity that its broker gives a message"
            )
        return key_function


def _handler_async(consumer: Consumer, read: _Reader, bind: Callable[..., Callable[..., Any]]) -> Any:
    async def handle(*args: Any, **kwargs: Any) -> Any:
        message = read.message(args, kwargs)
        with read.context(message):
            return await consumer.call(read.key_of(message), bind(*args, **kwargs), read.compared(message))

    async def deliver(
        message: Any,
        /,
        *,
        attempt: int | None = None,
        key: Callable[[Any], object] | None = None,
        body: bytes | None = None,
    ) -> Delivered:
        found = read.read(consumer.rules, message, attempt, key, body)
        if isinstance(found, DeadLetter):
            return found
        with read.context(message):
            return await consumer.deliver(found.key, bind(message), attempt=found.attempt, compared=found.compared)

    return _with_members(handle, deliver, consumer)


def _handler_sync(consumer: SyncConsumer, read: _Reader, bind: Callable[..., Callable[..., Any]]) -> Any:
    def handle(*args: Any, **kwargs: Any) -> Any:
        message = read.message(args, kwargs)
        with read.context(message):
            return consumer.call(read.key_of(message), bind(*args, **kwargs), read.compared(message))

    def deliver(
        message: Any,
        /,
        *,
        attempt: int | None = None,
        key: Callable[[Any], object] | None = None,
        body: bytes | None = None,
    ) -> Delivered:
        found = read.read(consumer.rules, message, attempt, key, body)
        if isinstance(found, DeadLetter):
            return found
        with read.context(message):
            return consumer.deliver(found.key, bind(message), attempt=found.attempt, compared=found.compared)

    return _with_members(handle, deliver, consumer)


def _with_members(handle: Any, deliver: Callable[..., Any], consumer: Consumer | SyncConsumer) -> Any:
    """Give a handler the members of :class:`AsyncHandler` or :class:`SyncHandler`."""
    rules = consumer.rules
    handle.deliver, handle.forget, handle.unsettled = deliver, consumer.forget, rules.unsettled
    handle.consumer, handle.max_attempts = rules.calls.name, rules.attempts.max_attempts
    handle.ttl = rules.calls.policy.ttl
    return handle

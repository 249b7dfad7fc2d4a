"""Idempotency keys for any function, synchronous or not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from idempotency._engine.calls import KIND, Calls, Ended, Raised, Ran, refusal
from idempotency._engine.modes import runner_of
from idempotency._engine.names import Made, full_name_of, takes_scope_of_another
from idempotency._engine.readers import check_readers, compared_by
from idempotency._results.codec import Codec, results_of
from idempotency._rules import Claim, Replay
from idempotency._signature import bind_arguments, is_async, name_of, wrap_like
from idempotency.errors import ConfigurationError, UnreadableError
from idempotency.events import EventHook, log_event
from idempotency.policy import Policy
from idempotency.stores.base import Store, SyncStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

__all__ = ["Codec", "idempotent"]

P = ParamSpec("P")
R = TypeVar("R")

_DAY = Policy()


def idempotent(
    store: Store | SyncStore,
    *,
    key: Callable[..., str],
    name: str | None = None,
    fingerprint: Callable[..., bytes | str] | None = None,
    policy: Policy = _DAY,
    codec: Codec | None = None,
    session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None = None,
    lock_timeout: float = 5.0,
    on_event: EventHook = log_event,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make calls of a function under one key take effect once; every later call gets the recorded result.

    ``key`` is given the arguments and returns the key, not empty: ``lambda order_id, amount: order_id``. A method's key
    is given its object, and says what tells that from other objects.
    ``name``: each name is a space of keys of its own in the store. Default: the function's module and qualified name,
    such as ``"shop.orders.charge"``, so that a function which is moved or renamed needs ``name=`` with the name it had:
    else its records are forgotten. Two different functions of one default name, such as closures that a loop makes, are
    refused where they are in one process; by one ``name`` functions share their keys and results on purpose.
    ``fingerprint`` is given the arguments and returns what a repeated call must have in common with the first; by
    default nothing is compared.
    ``policy``: its ``ttl``, ``lease``, ``wait``, ``on_crash``, ``on_store_error``, ``outcomes`` by exception class, and
    ``max_response`` apply.
    ``codec``: a :class:`Codec`, which turns the result into bytes and back. Default: by the annotation of what the
    function returns: JSON values, dataclasses, pydantic models, datetime, Decimal, UUID, Enum, bytes. A result that
    cannot be recorded is returned all the same; later calls get the answer that the operation is completed.
    ``session``: a sessionmaker on the database of ``store``, an SQLStore. The function's effect and its record are
    then one transaction, whose session it gets as keyword ``session`` if it has that parameter, and as
    ``current().session``. It does not commit it.
    ``lock_timeout``: seconds a duplicate waits for such a transaction, default 5.

    The decorated function raises, besides its own errors, :class:`~idempotency.errors.KeyMissingError`,
    :class:`~idempotency.errors.InProgressError` (with ``retry_after``), :class:`~idempotency.errors.KeyReusedError`,
    :class:`~idempotency.errors.OutcomeUnknownError`, :class:`~idempotency.errors.NotReplayableError`,
    :class:`~idempotency.errors.RecordedFailureError`, :class:`~idempotency.errors.UnreadableError` and
    :class:`~idempotency.errors.StoreError`. Raises :class:`~idempotency.errors.ConfigurationError` at the decoration
    for what cannot work.
    """
    if not callable(key):
        raise ConfigurationError(f"key must be a callable that is given the arguments, not {type(key).__name__}")
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigurationError(f"name must be text, not {name!r}")
    check_readers(key, fingerprint, body=False)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        scope = f"function:1:{full_name_of(function) if name is None else name}"
        calls = Calls(
            name=name or name_of(function),
            scope=scope,
            policy=policy,
            results=results_of(function, codec),
            on_event=on_event,
        )

        def claim(args: Any, kwargs: Any) -> Claim:
            compared = compared_by(fingerprint, _no_body, *args, **kwargs)
            return calls.claim(key(*args, **kwargs), compared)

        asynchronous = is_async(function)
        run = runner_of(asynchronous, store, calls, session, lock_timeout)
        wrap = _wrap_async if asynchronous else _wrap_sync
        made = Made(function, key)
        if name is None and takes_scope_of_another(store, scope, made):
            raise ConfigurationError(
                f"another function of this store has the name {full_name_of(function)} too, so that they would share "
                "their keys and results: give each a name= of its own"
            )
        wrapper: Any = wrap(function, run, calls, claim, session)
        wrapper._made = made
        return cast(Callable[P, R], wrapper)

    return decorate


def _no_body() -> None: ...


def _wrap_async(
    function: Callable[..., Any],
    run: Callable[..., Awaitable[Ended]],
    calls: Calls,
    claim_of: Callable[[Any, Any], Claim],
    session: Any,
) -> Any:
    bind = bind_arguments(function, session)

    async def call(*args: Any, **kwargs: Any) -> Any:
        claim = claim_of(args, kwargs)
        return _answer(calls, claim, await run(claim, bind(*args, **kwargs)))

    return wrap_like(call, function, session)


def _wrap_sync(
    function: Callable[..., Any],
    run: Callable[..., Ended],
    calls: Calls,
    claim_of: Callable[[Any, Any], Claim],
    session: Any,
) -> Any:
    bind = bind_arguments(function, session)

    def call(*args: Any, **kwargs: Any) -> Any:
        claim = claim_of(args, kwargs)
        return _answer(calls, claim, run(claim, bind(*args, **kwargs)))

    return wrap_like(call, function, session)


def _answer(calls: Calls, claim: Claim, ended: Ended) -> Any:
    match ended:
        case Ran(value):
            return value
        case Raised(error, _):
            raise error
        case Replay(result):
            try:
                value = calls.results.decode(result)
            except UnreadableError as error:
                calls.emit("unreadable", claim, error=error)
                raise
            calls.emit("replayed", claim)
            return value
        case told:
            calls.emit(KIND[type(told)], claim)
            raise refusal(told)

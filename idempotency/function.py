"""Idempotency keys for any function, synchronous or not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from idempotency._engine.calls import Calls, Ended
from idempotency._engine.prepare import check_name, prepare
from idempotency._engine.readers import check_readers, compared_by
from idempotency._hooks import check_callable
from idempotency._results.codec import Codec
from idempotency._rules import Claim
from idempotency._signature import bind_arguments, wrap_like
from idempotency.events import OnEvent
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
    on_event: OnEvent = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make calls of a function under one key take effect once; every later call gets the recorded result.

    ``key`` is given the arguments and returns the key, not empty: ``lambda order_id, amount: order_id``. The key of a
    method is given the object too, and must contain what identifies the object.
    ``name``: each name is a space of keys of its own in the store. Default: the function's module and qualified name,
    such as ``"shop.orders.charge"``. A function that is moved or renamed needs ``name=`` with its old default name:
    else its records are not found any more. Two different functions with one default name, such as closures that a loop
    makes, are refused where they are in one process. Functions that are given one ``name`` share keys and results.
    ``fingerprint`` is given the arguments and returns what a repeated call must have in common with the first. By
    default nothing is compared.
    ``policy``: its ``ttl``, ``lease``, ``wait``, ``on_crash``, ``on_store_error``, ``outcomes`` by exception class, and
    ``max_response`` apply.
    ``codec``: a :class:`Codec`, which turns the result into bytes and back. Default: by the annotation of what the
    function returns: JSON values, dataclasses, pydantic models, datetime, Decimal, UUID, Enum, bytes. Where no
    annotation names a type, as in ``Any``, only JSON values can be recorded: the first call that returns another type
    raises :class:`~idempotency.errors.ConfigurationError`. Without ``session`` the effect has happened then, and the
    key is completed. A result that is not what the annotation says, or cannot be recorded because of its data, is
    returned to the first call; later calls raise :class:`~idempotency.errors.NotReplayableError`.
    ``session``: a sessionmaker on the database of ``store``, an SQLStore. The function's effect and its record are
    then one transaction. The function gets its session as keyword ``session`` if it has that parameter, and as
    ``current().session``. It does not commit the session.
    ``lock_timeout``: seconds a duplicate waits for such a transaction, default 5.

    The decorated function raises, besides its own errors, :class:`~idempotency.errors.KeyMissingError`,
    :class:`~idempotency.errors.InProgressError` (with ``retry_after``), :class:`~idempotency.errors.KeyReusedError`,
    :class:`~idempotency.errors.OutcomeUnknownError`, :class:`~idempotency.errors.NotReplayableError`,
    :class:`~idempotency.errors.RecordedFailureError`, :class:`~idempotency.errors.UnreadableError` and
    :class:`~idempotency.errors.StoreError`. Raises :class:`~idempotency.errors.ConfigurationError` at the decoration
    for what cannot work.
    """
    _check_arguments(key, name, fingerprint)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        prepared = prepare(
            function,
            store,
            kind="function",
            name=name,
            key=key,
            policy=policy,
            codec=codec,
            session=session,
            lock_timeout=lock_timeout,
            on_event=on_event,
        )
        wrap = _wrap_async if prepared.asynchronous else _wrap_sync
        wrapper: Any = wrap(function, prepared.run, _Claims(prepared.calls, key, fingerprint), session)
        wrapper._made = prepared.made
        return cast(Callable[P, R], wrapper)

    return decorate


def _check_arguments(key: Any, name: Any, fingerprint: Any) -> None:
    check_callable("key=", key)
    check_name(name)
    check_readers(key, fingerprint, body=False)


@dataclass(frozen=True, slots=True)
class _Claims:
    """What makes the claim of one call from its arguments."""

    calls: Calls
    key: Callable[..., str]
    fingerprint: Callable[..., bytes | str] | None

    def make(self, args: Any, kwargs: Any) -> Claim:
        compared = compared_by(self.fingerprint, _no_body, *args, **kwargs)
        return self.calls.claim(self.key(*args, **kwargs), compared)


def _no_body() -> None: ...


def _wrap_async(
    function: Callable[..., Any],
    run: Callable[..., Awaitable[Ended]],
    claims: _Claims,
    session: Any,
) -> Any:
    bind = bind_arguments(function, session)

    async def call(*args: Any, **kwargs: Any) -> Any:
        claim = claims.make(args, kwargs)
        return claims.calls.answer(claim, await run(claim, bind(*args, **kwargs)))

    return wrap_like(call, function, session)


def _wrap_sync(
    function: Callable[..., Any],
    run: Callable[..., Ended],
    claims: _Claims,
    session: Any,
) -> Any:
    bind = bind_arguments(function, session)

    def call(*args: Any, **kwargs: Any) -> Any:
        claim = claims.make(args, kwargs)
        return claims.calls.answer(claim, run(claim, bind(*args, **kwargs)))

    return wrap_like(call, function, session)

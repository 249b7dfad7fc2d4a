"""What every decorated function needs: its name and space of keys, its codec, and how it holds its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from idempotency._engine.calls import Calls
from idempotency._engine.modes import runner_of
from idempotency._engine.names import DecoratedFunction, full_name_of, scope_is_taken
from idempotency._results.codec import Codec, results_of
from idempotency._signature import is_async, name_of
from idempotency.errors import ConfigurationError
from idempotency.events import EventHooks, OnEvent, Surface
from idempotency.policy import Policy
from idempotency.stores.base import Store, SyncStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all calls of a decorated function share. ``made`` must live as long as what the decorator returns."""

    calls: Calls
    run: Callable[..., Any]
    asynchronous: bool
    made: DecoratedFunction


def check_name(name: object) -> None:
    """Refuse a name that is no text."""
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigurationError(f"name must be text, not {name!r}")


def prepare(
    function: Callable[..., Any],
    store: Store | SyncStore,
    *,
    kind: Surface,
    name: str | None,
    key: Any,
    policy: Policy,
    codec: Codec | None,
    session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None,
    lock_timeout: float,
    on_event: OnEvent,
) -> Prepared:
    """Prepare a function for its calls.

    ``kind``: the kind of decorator; functions of each kind have their own keys. ``key`` is what the key is made from.
    The other arguments are those of :func:`idempotency.idempotent`.
    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work, and for a name that another function
    has.
    """
    recorded = full_name_of(function) if name is None else name
    scope = f"{kind}:1:{recorded}"
    calls = Calls(
        name=name or name_of(function),
        scope=scope,
        policy=policy,
        results=results_of(function, codec),
        hooks=EventHooks(on_event),
        surface=kind,
        result_is_needed=True,
    )
    asynchronous = is_async(function)
    run = runner_of(asynchronous, store, calls, session, lock_timeout)
    made = DecoratedFunction(function, key, recorded, codec)
    if name is None and scope_is_taken(store, scope, made):
        raise ConfigurationError(
            f"another function of this store has the name {full_name_of(function)} too, so that they would share "
            "their keys and results: give each a name= of its own"
        )
    return Prepared(calls, run, asynchronous, made)

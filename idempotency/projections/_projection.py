"""Declare a projection: a function, its name and version, what it reads, and the sessions in which it writes."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypedDict, Unpack, overload

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idempotency._hooks import Hooks
from idempotency._signature import is_async, name_of, takes_session
from idempotency._sql.names import stored_name
from idempotency._sql.sessions import check_sessionmaker
from idempotency.errors import ConfigurationError
from idempotency.projections._async import AsyncProjection
from idempotency.projections._definition import Definition
from idempotency.projections._rows import Name, rows_named
from idempotency.projections._table import DEFAULT_TABLE
from idempotency.projections._worker import SyncProjection
from idempotency.projections.events import ProjectionHook, log_projection_event
from idempotency.streams import Streams

Function = Callable[..., Awaitable[None]]
SyncFunction = Callable[..., None]


class Options(TypedDict, total=False):
    """The options of a projection; :func:`projection` says what they mean."""

    version: int
    source: Streams | None
    batch: int | None
    attempts: int
    table: str
    on_event: ProjectionHook


@overload
def projection(
    name: str, *, session: async_sessionmaker[AsyncSession], **options: Unpack[Options]
) -> Callable[[Function], AsyncProjection]: ...


@overload
def projection(
    name: str, *, session: sessionmaker[Session], **options: Unpack[Options]
) -> Callable[[SyncFunction], SyncProjection]: ...


def projection(
    name: str,
    *,
    session: Any,
    version: int = 1,
    source: Streams | None = None,
    batch: int | None = None,
    attempts: int = 3,
    table: str = DEFAULT_TABLE,
    on_event: ProjectionHook = log_projection_event,
) -> Callable[[Any], Any]:
    """Make a projection of a function ``(event, session)``, which writes what readers read.

    Events are applied in their order, each once: what the function writes by ``session`` commits together with the
    checkpoint. It never commits itself, and what it does elsewhere is repeated after a failure.

    ``session``: an async_sessionmaker for a coroutine function, a sessionmaker for another one; its database has the
    tables of checkpoints and of the source. ``version``: raise it for a function that writes other rows, see
    :meth:`AsyncProjection.rebuild`; a function with a parameter ``version`` is given it. ``source``: the
    :class:`~idempotency.streams.Streams` to read; None where :meth:`AsyncProjection.apply` feeds it. ``batch``: the
    function is given lists of up to so many events. ``attempts``: how often an event that fails alone is tried before
    the projection stops. ``table``: of the checkpoints. ``on_event`` is given a :class:`ProjectionEvent` for each
    outcome; by default it is logged.
    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    for option, value in (("version", version), ("attempts", attempts), ("batch", 1 if batch is None else batch)):
        if type(value) is not int or not 1 <= value <= 2**31 - 1:
            raise ConfigurationError(f"{option} must be a number from 1 on, not {value!r}")
    hooks = Hooks(on_event, None)
    asynchronous = isinstance(session, async_sessionmaker)
    check_sessionmaker(session, async_sessionmaker if asynchronous else sessionmaker)
    own = Name(stored_name("the name of a projection", name), version)

    def decorate(function: Any) -> Any:
        if is_async(function) is not asynchronous:
            kind = "a coroutine function" if asynchronous else "a plain function"
            raise ConfigurationError(f"{name_of(function)} must be {kind}, as session= is {type(session).__name__}")
        if not takes_session(function):
            raise ConfigurationError(f"{name_of(function)} needs a parameter session, with which it writes")
        versioned = "version" in inspect.signature(function).parameters
        definition = Definition(
            function=partial(function, version=version) if versioned else function,
            name=own,
            source=source,
            sessions=session,
            batch=batch,
            attempts=attempts,
            rows=rows_named(table),
            hooks=hooks,
        )
        return AsyncProjection(definition) if asynchronous else SyncProjection(definition)

    return decorate

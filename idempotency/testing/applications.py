"""Test an application that uses this library: another store, an empty one, or none that matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch
from uuid import uuid4

from idempotency._engine.calls import Calls
from idempotency._engine.modes import awaited_store, leases_of
from idempotency._http.applications import inside, owner_of
from idempotency._http.request import KeyedRequest
from idempotency._rules import Claim
from idempotency.asgi import IdempotencyMiddleware
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Forgetting, Searching, Store, SyncStore, require

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import async_sessionmaker
    from sqlalchemy.orm import sessionmaker

_BATCH = 1000


@contextmanager
def disabled() -> Iterator[None]:
    """Run every request, delivery and call as the first one of its key, whichever key it has, also without one.

    Nothing is replayed or refused. Handlers get what they get otherwise, such as ``current()`` and its session, and the
    store has to work: for a request without ``session=``, :func:`use_store` gives another one. It applies to the
    middleware, ``@idempotent``, ``@idempotent_consumer`` and ``@idempotent_tool``, in all threads of this process, and
    not to sagas.
    """
    claim_of = Calls.claim

    def claim(calls: Calls, key: object, compared: object) -> Claim:
        return claim_of(calls, _new_key(), compared)

    with patch.object(Calls, "claim", claim), patch.object(KeyedRequest, "key", lambda _: _new_key()):
        yield


def _new_key() -> str:
    return f"disabled-{uuid4().hex}"


@contextmanager
def use_store(
    app: object, store: Store | SyncStore, *, session: async_sessionmaker[Any] | sessionmaker[Any] | None = None
) -> Iterator[None]:
    """Let the middleware of ``app`` use ``store`` instead of its own, for the requests within the context.

    ``app``: the application to which the middleware was added (Starlette, FastAPI, Quart), or the middleware around it.
    ``session``: the sessionmaker that a middleware with ``session=`` has. ``store`` is then an ``SQLStore`` on an
    engine, such as that of :func:`rolled_back`, to which the sessionmaker is bound for the same time: what else makes
    sessions by it, as ``session_of`` does, uses that engine too.

    Raises :class:`~idempotency.errors.ConfigurationError` where there is no such middleware, where ``session`` is
    missing or the middleware has none, and where store and sessions do not fit each other.
    """
    found = list(_middleware(app))
    if not found:
        raise ConfigurationError("the application has no IdempotencyMiddleware: give the one to which it was added")
    if any(each._options.transactional is not (session is not None) for each in found):
        raise ConfigurationError(
            "the middleware has session=, so its records are where its sessions are: use_store(app, SQLStore(engine),"
            " session=its_sessionmaker), with the engine of idempotency.testing.rolled_back, or another one"
            if session is None
            else "the middleware has no session=: give use_store none either"
        )
    with _bound_to(store, session):
        awaited = awaited_store(store, session)
        own = [(each, each._runner.store, each._new_lease) for each in found]
        try:
            for each in found:
                each._runner.store = awaited
                each._new_lease = leases_of(each._runner, session)
            yield
        finally:
            for each, before, new_lease in own:
                each._runner.store, each._new_lease = before, new_lease


@contextmanager
def _bound_to(store: object, session: Any) -> Iterator[None]:
    """Bind a sessionmaker to the engine of a store for a while."""
    if session is None:
        yield
        return
    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import async_sessionmaker
    from sqlalchemy.orm import sessionmaker

    from idempotency.stores.sql import SQLStore

    engine = store._source if isinstance(store, SQLStore) else None
    if engine is None or isinstance(engine, URL):
        raise ConfigurationError("with session=, use_store takes an SQLStore on an engine: SQLStore(engine)")
    if not isinstance(session, async_sessionmaker | sessionmaker):
        raise ConfigurationError(
            f"session= takes the sessionmaker that the middleware has, not {type(session).__name__}"
        )
    own = session.kw.get("bind")
    session.configure(bind=engine)
    try:
        yield
    finally:
        session.configure(bind=own)


def _middleware(app: object) -> Iterator[IdempotencyMiddleware]:
    for each in inside(app):
        if isinstance(each, IdempotencyMiddleware):
            yield each
        # What Starlette makes at its first request, and what was put around the method of Quart.
        owner: Any = owner_of(each)
        if hasattr(owner, "build_middleware_stack"):
            owner.middleware_stack = owner.middleware_stack or owner.build_middleware_stack()
            yield from _middleware(owner.middleware_stack)
        elif isinstance(getattr(owner, "asgi_app", None), IdempotencyMiddleware):
            yield cast(IdempotencyMiddleware, owner.asgi_app)


async def clear(store: object) -> int:
    """Forget every record of ``store`` that nothing runs under, and return how many.

    Raises :class:`~idempotency.errors.ConfigurationError` for a store that cannot list or forget records.
    """
    searching, forgetting = require(store, Searching, "clear"), require(store, Forgetting, "clear")
    forgotten = 0
    while True:
        entries = await searching.find(limit=_BATCH)
        now = sum([await forgetting.forget(entry.id) for entry in entries])
        forgotten += now
        if not now or len(entries) < _BATCH:
            return forgotten

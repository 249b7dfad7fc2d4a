"""Sagas: functions whose steps are recorded, so that another process goes on where one was killed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from idempotency._durations import positive
from idempotency._results.codec import results_of
from idempotency._sagas.journal import (
    MOST_CHARACTERS,
    JoinedJournaling,
    Journaling,
    Look,
    Open,
    Put,
    Row,
    Saga,
    SyncJournaling,
    saga_id,
)
from idempotency._signature import is_async, name_of
from idempotency.errors import ConfigurationError, KeyInvalidError, KeyMissingError, KeyReusedError
from idempotency.operation import current
from idempotency.saga._definition import Defined, Definition
from idempotency.saga._drive import drive, renewed
from idempotency.saga._drive_sync import drive_sync, renewed_sync
from idempotency.saga._input import Input
from idempotency.saga._lifecycle import answer, begin, live, request_of
from idempotency.saga._run import cancelled_by, is_unicode
from idempotency.saga._view import SagaView, view_of
from idempotency.saga._wait import HELD, give_signal
from idempotency.saga.errors import SagaFailedError
from idempotency.saga.events import OnSagaEvent, SagaHooks
from idempotency.saga.options import duration
from idempotency.stores.base import Store, SyncStore, require

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

R = TypeVar("R")


class AsyncSaga(Defined, Generic[R]):
    """A saga whose function is awaited; :func:`saga` makes it."""

    async def __call__(self, *args: Any, key: str | None = None, **kwargs: Any) -> R:
        """Run the saga of ``key``, go on with it, or return its result. The arguments must be those of the first call.

        ``key`` None: derived from the running operation, of HTTP, a message or a function.
        Raises :class:`~idempotency.saga.SagaFailedError` for one that failed and is undone,
        :class:`~idempotency.saga.SagaPendingError` for one that waits or that another process runs,
        :class:`~idempotency.saga.SagaStuckError`, :class:`~idempotency.errors.KeyReusedError` for other arguments,
        :class:`~idempotency.errors.ConfigurationError`, and :class:`~idempotency.errors.StoreError` where the store
        failed: the saga goes on when it is called again, or by a :class:`~idempotency.saga.Sweeper`.
        """
        data = _encoded(self._definition, args, kwargs)
        key = _key(self._definition, key)
        return cast(R, await self._run(saga_id(self.name, key), key, data))

    async def start(
        self, *args: Any, key: str | None = None, session: AsyncSession | None = None, **kwargs: Any
    ) -> str:
        """Record the saga of ``key``, unless it is there, and return the key. A :class:`Sweeper` runs it.

        ``session``: on the database of the store, an SQLStore. The saga is recorded in its transaction, and vanishes
        with it.
        """
        data = _encoded(self._definition, args, kwargs)
        key = _key(self._definition, key)
        request = request_of(self._definition, saga_id(self.name, key), key, "", data, lease=0)
        store = self._definition.store
        if session is None:
            _check_same(await store.journal(request), request)
        else:
            _check_same(await _joined(store, session).journal_in(session, request), request)
        return key

    async def resume(self, key: str) -> R:
        """Go on with the saga of ``key`` by its recorded arguments; see :meth:`__call__`."""
        return cast(R, await self._run(saga_id(self.name, key), key, None))

    async def signal(self, key: str, name: str, value: object = None, *, by: str = "", about: object = None) -> bool:
        """Give the saga of ``key`` a signal, also before it waits for it; False if it had one of this name.

        ``name``: that of the wait; of the second wait for a name it is ``name#2``. ``value``: JSON.
        ``about``: what is approved, which must be equal to what the saga asks about. ``by``: who gave it, for the
        record. Raises :class:`~idempotency.saga.SagaEndedError` where the saga has ended, and otherwise
        :class:`~idempotency.saga.SagaError` where there is no such saga, or it waits for this about something else.
        """
        return await drive(self._definition, give_signal(self.name, key, name, value, by, about))

    async def look(self, key: str) -> SagaView | None:
        """Return where the saga of ``key`` is, and why; None where there is none.

        :meth:`SagaOperations.inspect` returns everything that is recorded of it.
        """
        found: Saga | None = await self._definition.store.journal(Look(id=saga_id(self.name, key)))
        return None if found is None else SagaView(**view_of(found.row, found.entries))

    async def _abandon(self, key: str, by: str) -> Saga | None:
        """Cancel the saga of ``key``, let it end, and return it; None where there is none. It raises as a call does.

        It is called where ``by`` is undone, the saga of which it is a step.
        """
        record = saga_id(self.name, key)
        if await self._definition.store.journal(Put(id=record, entry=cancelled_by(by))) is not None:
            with suppress(SagaFailedError):
                await self._run(record, key, None)
        found: Saga | None = await self._definition.store.journal(Look(id=record))
        return found

    async def _run(self, record: bytes, key: str, data: bytes | None) -> Any:
        definition = self._definition
        request = request_of(definition, record, key, _token(), data)
        run = await drive(definition, begin(definition, request))
        if isinstance(run, Row):
            return answer(definition, run)
        async with renewed(run):
            return await drive(definition, live(run))


class SyncSaga(Defined, Generic[R]):
    """A saga whose function is not awaited; :func:`saga` makes it. See :class:`AsyncSaga`."""

    def __call__(self, *args: Any, key: str | None = None, **kwargs: Any) -> R:
        """See :meth:`AsyncSaga.__call__`."""
        data = _encoded(self._definition, args, kwargs)
        key = _key(self._definition, key)
        return cast(R, self._run(saga_id(self.name, key), key, data))

    def start(self, *args: Any, key: str | None = None, session: Session | None = None, **kwargs: Any) -> str:
        """See :meth:`AsyncSaga.start`."""
        data = _encoded(self._definition, args, kwargs)
        key = _key(self._definition, key)
        request = request_of(self._definition, saga_id(self.name, key), key, "", data, lease=0)
        store = self._definition.store
        if session is None:
            _check_same(store.journal_sync(request), request)
        else:
            _check_same(_joined(store, session).journal_in_sync(session, request), request)
        return key

    def resume(self, key: str) -> R:
        """See :meth:`AsyncSaga.resume`."""
        return cast(R, self._run(saga_id(self.name, key), key, None))

    def signal(self, key: str, name: str, value: object = None, *, by: str = "", about: object = None) -> bool:
        """See :meth:`AsyncSaga.signal`."""
        return drive_sync(self._definition, give_signal(self.name, key, name, value, by, about))

    def look(self, key: str) -> SagaView | None:
        """See :meth:`AsyncSaga.look`."""
        found: Saga | None = self._definition.store.journal_sync(Look(id=saga_id(self.name, key)))
        return None if found is None else SagaView(**view_of(found.row, found.entries))

    def _abandon(self, key: str, by: str) -> Saga | None:
        """See :meth:`AsyncSaga._abandon`."""
        record = saga_id(self.name, key)
        if self._definition.store.journal_sync(Put(id=record, entry=cancelled_by(by))) is not None:
            with suppress(SagaFailedError):
                self._run(record, key, None)
        found: Saga | None = self._definition.store.journal_sync(Look(id=record))
        return found

    def _run(self, record: bytes, key: str, data: bytes | None) -> Any:
        definition = self._definition
        request = request_of(definition, record, key, _token(), data)
        run = drive_sync(definition, begin(definition, request))
        if isinstance(run, Row):
            return answer(definition, run)
        with renewed_sync(run):
            return drive_sync(definition, live(run))


def _encoded(definition: Definition, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    return definition.input.encode(args, kwargs)


def _key(definition: Definition, key: str | None) -> str:
    if key is None and (operation := current()) is not None:
        return operation.derive(f"saga:{definition.name}")
    if key is None:
        raise KeyMissingError(
            f"the saga {definition.name} was called without key=, outside of an operation: give key=, or call it in a "
            "request with an Idempotency-Key, a message or an idempotent function; a key is never invented"
        )
    if not isinstance(key, str) or not key or "\0" in key:
        raise KeyInvalidError(
            f"the key of a saga is text without NUL, of 1 character or more, not {type(key).__name__}"
        )
    return key


def _joined(store: object, session: Any) -> JoinedJournaling:
    """Return the store as one that records sagas in the transaction of ``session``."""
    joined = require(store, JoinedJournaling, "start(session=...)")
    joined.check_shared(session.bind)
    return joined


def _token() -> str:
    return os.urandom(16).hex()


def _check_same(saga: Saga | None, request: Open) -> None:
    if saga is not None and saga.row.fingerprint != request.fingerprint:
        raise KeyReusedError("The key was used for a saga with other arguments.")


class _Decorate:
    """What :func:`saga` returns: it is given the function."""

    def __init__(self, make: Callable[[Callable[..., Any]], Any]) -> None:
        self._make = make

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[..., Coroutine[Any, Any, R]], /
    ) -> AsyncSaga[R]: ...
    @overload
    def __call__(self, function: Callable[..., R], /) -> SyncSaga[R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Make a saga of ``function``."""
        return self._make(function)


def saga(
    store: Store | SyncStore,
    *,
    name: str,
    session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None = None,
    deadline: float | timedelta | None = None,
    lease: float | timedelta = 30.0,
    ttl: float | timedelta = 7 * 86400.0,
    attempts: int = 20,
    undos: Mapping[str, Callable[..., Any]] | None = None,
    on_event: OnSagaEvent = (),
) -> _Decorate:
    """Make a function a saga: its steps are recorded, and after a crash another process goes on where it was.

    The function must reach the same steps with the same arguments when it is run again; everything else that has an
    effect, or is read from outside, belongs in a step. It waits for nothing but its steps, :func:`sleep` and the like.
    Its arguments are recorded as JSON by their annotations.
    Where the function fails, what it has done is undone, unless its pivot is done. It cannot catch what ends its run in
    the middle: a wait, a failure of the store, a deadline, or a fault in its code.

    ``name``: under which its sagas are recorded. ``session``: a sessionmaker on the database of ``store``, an SQLStore:
    a step whose function takes the keyword ``session`` commits with its entry, in one transaction.
    ``deadline``: seconds from its first call, after which it fails and is undone; default None, never.
    ``lease``: seconds for which a process that vanished still owns it. ``ttl``: seconds that it stays after its end,
    default a week. ``attempts``: how many runs may end without a word, as by a crash, before it is stuck.
    ``undos``: undo functions by the names of steps, in the place of those that are recorded.
    ``on_event``: a hook, or several, given each :class:`~idempotency.saga.SagaEvent`. Each event is logged too.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    def make(function: Callable[..., Any]) -> Any:
        asynchronous = is_async(function)
        _check_function(function)
        _check_name(name)
        if type(attempts) is not int or attempts < 1:
            raise ConfigurationError(f"attempts must be a number of at least 1, not {attempts!r}")
        hooks = SagaHooks(on_event)
        definition = Definition(
            name=name,
            function=function,
            asynchronous=asynchronous,
            store=require(store, Journaling if asynchronous else SyncJournaling, f"the saga {name_of(function)}"),
            sessions=_checked_sessions(store, session, asynchronous),
            input=Input(function),
            results=results_of(function),
            lease=positive("lease", lease),
            ttl=positive("ttl", ttl),
            deadline=duration("deadline", deadline),
            attempts=attempts,
            undos=dict(undos or {}),
            hooks=hooks,
        )
        return AsyncSaga[Any](definition) if asynchronous else SyncSaga[Any](definition)

    return _Decorate(make)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MOST_CHARACTERS or "\0" in name or not is_unicode(name):
        raise ConfigurationError(f"name must be text of 1 to {MOST_CHARACTERS} characters, not {name!r}")
    if name == HELD:
        raise ConfigurationError(f"name must be another one than {HELD!r}, under which resources are held")


def _check_function(function: Callable[..., Any]) -> None:
    if not inspect.isfunction(inspect.unwrap(function)):
        raise ConfigurationError(f"@saga decorates a function, not {function!r}: its module has the undo functions")
    for reserved in ("key", "session"):
        if reserved in inspect.signature(function).parameters:
            raise ConfigurationError(
                f"{name_of(function)} has a parameter {reserved}, which the call of the saga itself takes: give it"
                " another name. A session is given to the functions of its steps"
            )


def _checked_sessions(store: object, session: Any, asynchronous: bool) -> Any:
    if session is None:
        return None
    from sqlalchemy.ext.asyncio import async_sessionmaker
    from sqlalchemy.orm import sessionmaker

    from idempotency._engine.transaction import check_completing_sessions

    check_completing_sessions(store, session, async_sessionmaker if asynchronous else sessionmaker)
    return session

"""Put crash points around every call of a store or a database, from outside: the library has no code for them."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from idempotency._sagas.journal import Due, Look, Request, Write
from idempotency.testing._points import crash_point, step
from idempotency.testing.faulty import FaultyStore

_SHIPPED = ("idempotency.stores.redis", "idempotency.stores.sql")
_VERBS = ("claim", "renew", "complete", "release")
_VERBS_SYNC = tuple(f"{verb}_sync" for verb in _VERBS)
_SETTING = re.compile(r"SET STATEMENT .*? FOR ")
_WRITE = re.compile(
    r"(?<!FOR )\b(INSERT|UPDATE|DELETE|REPLACE|MERGE|CREATE TABLE|CREATE INDEX)"
    r"\b(?:\s+(?:INTO|FROM|IF\s+NOT\s+EXISTS))*\s+[\"`]?(\w+)",
    re.IGNORECASE,
)
_READ = re.compile(r"\b(SELECT)\b.*?\bFROM\s+[\"`]?(\w+)", re.IGNORECASE | re.DOTALL)


def instrument() -> None:
    """Put points around every store verb, SQL statement, COMMIT and ROLLBACK of this process, and what relays publish.

    It cannot be undone.

    A store is any class with the verbs in a module that is imported by now. A renewal has no points: it depends on the
    clock, so it is not at the same place in every run.
    """
    for module in _SHIPPED:
        with suppress(ImportError):
            importlib.import_module(module)
    for store in _store_classes():
        for verb in (*_VERBS, *_VERBS_SYNC):
            if inspect.isfunction(found := vars(store).get(verb)):
                setattr(store, verb, _around(verb, found))
        for verb in ("journal", "journal_sync"):
            if inspect.isfunction(found := vars(store).get(verb)):
                setattr(store, verb, _around_requests(found))
    with suppress(ImportError):
        _instrument_sqlalchemy()
        _instrument_relays()


def _store_classes() -> set[type]:
    """Return the classes that are stores, and their bases, in which some of their verbs may be."""
    found: set[type] = set()
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            # Not by isinstance: it would ask a lazy proxy, such as those of Celery, for its object.
            if issubclass(type(value), type) and _is_store(value):
                found.update(base for base in value.__mro__ if not _is_protocol(base))
    return found


def _is_store(kind: type) -> bool:
    def has(verb: str) -> bool:
        return any(verb in vars(base) for base in kind.__mro__)

    if _is_protocol(kind) or kind.__module__ == FaultyStore.__module__:
        return False  # the points of a FaultyStore are those of its inner store
    return all(map(has, (*_VERBS, "aclose"))) or all(map(has, (*_VERBS_SYNC, "close")))


def _is_protocol(kind: type) -> bool:
    return "_is_protocol" in vars(kind) and bool(vars(kind)["_is_protocol"])


def _around(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
    name = verb.removesuffix("_sync")
    silent = name == "renew"

    @functools.wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        with step(name, silent=silent):
            return await function(*args, **kwargs)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with step(name, silent=silent):
            return function(*args, **kwargs)

    return awaited if inspect.iscoroutinefunction(function) else called


def _around_requests(function: Callable[..., Any]) -> Callable[..., Any]:
    """Put points around the requests to the journal of sagas that write something, and not only renew."""

    def point(request: Request[Any]) -> AbstractContextManager[None]:
        renews = isinstance(request, Write) and not request.entries and request.phase is None
        return step(type(request).__name__.lower(), silent=renews or isinstance(request, Look | Due))

    @functools.wraps(function)
    async def awaited(self: object, request: Request[Any], /) -> Any:
        with point(request):
            return await function(self, request)

    @functools.wraps(function)
    def called(self: object, request: Request[Any], /) -> Any:
        with point(request):
            return function(self, request)

    return awaited if inspect.iscoroutinefunction(function) else called


def _instrument_sqlalchemy() -> None:
    from sqlalchemy import Engine, event

    event.listen(Engine, "engine_connect", _instrument_dialect)
    event.listen(Engine, "before_cursor_execute", _before_execute)
    event.listen(Engine, "after_cursor_execute", _after_execute)


def _instrument_relays() -> None:
    from idempotency.outbox._deliver import Delivery

    Delivery.publish = _around("publish", Delivery.publish)  # type: ignore[method-assign]


def _instrument_dialect(connection: Any) -> None:
    # SQLAlchemy's events for these two come before they are sent; a point is needed also after the server applied them.
    dialect = connection.dialect
    for verb, name in (("do_commit", "COMMIT"), ("do_rollback", "ROLLBACK")):
        if verb not in vars(dialect):
            setattr(dialect, verb, _around(name, getattr(dialect, verb)))


def _before_execute(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    crash_point(f"before {name_of(statement)}")


def _after_execute(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    crash_point(f"after {name_of(statement)}")


def name_of(statement: str) -> str:
    """Name a statement by what it does and to which table: ``INSERT orders``."""
    statement = _SETTING.sub("", statement, count=1)
    found = _WRITE.search(statement) or _READ.search(statement)
    if found is not None:
        return f"{found[1].upper()} {found[2]}"
    return " ".join(statement.split()[:2])

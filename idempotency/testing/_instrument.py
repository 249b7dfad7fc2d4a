"""Put points around all that reaches a store or database, from outside: the library itself knows nothing of them."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from idempotency.testing._points import crash_point, step

_STORES = (("idempotency.stores.redis", "RedisStore"), ("idempotency.stores.sql", "SQLStore"))
_VERBS = ("claim", "renew", "complete", "release")
_SETTING = re.compile(r"SET STATEMENT .*? FOR ")
_WRITE = re.compile(
    r"(?<!FOR )\b(INSERT|UPDATE|DELETE|REPLACE|MERGE|CREATE TABLE|CREATE INDEX)"
    r"\b(?:\s+(?:INTO|FROM|IF\s+NOT\s+EXISTS))*\s+[\"`]?(\w+)",
    re.IGNORECASE,
)
_READ = re.compile(r"\b(SELECT)\b.*?\bFROM\s+[\"`]?(\w+)", re.IGNORECASE | re.DOTALL)


def instrument() -> None:
    """Make points of every store verb, SQL statement, COMMIT and ROLLBACK of this process, for good.

    A renewal is none: it comes by the clock, and so not at the same place in every run.
    """
    for module, name in _STORES:
        with suppress(ImportError):
            store = getattr(importlib.import_module(module), name)
            for verb in (*_VERBS, *(f"{each}_sync" for each in _VERBS)):
                if hasattr(store, verb):
                    setattr(store, verb, _around(verb, getattr(store, verb)))
    with suppress(ImportError):
        _instrument_sqlalchemy()


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


def _instrument_sqlalchemy() -> None:
    from sqlalchemy import Engine, event

    event.listen(Engine, "engine_connect", _instrument_dialect)
    event.listen(Engine, "before_cursor_execute", _before_execute)
    event.listen(Engine, "after_cursor_execute", _after_execute)


def _instrument_dialect(connection: Any) -> None:
    # The events of these two come before they are sent; a point is wanted also after the server has applied them.
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

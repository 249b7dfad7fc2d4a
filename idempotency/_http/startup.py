"""Tell mistakes in the configuration once, when the application starts or, without a lifespan, at its first request.

What cannot work stops the start. What may be meant, or may be put right while the application runs, is one warning on
the logger ``idempotency``. Nothing here changes the answer to a request.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, ParamSpec

from idempotency._http.app_routes import routes_of
from idempotency._http.authentication import uncounted
from idempotency._http.routes import Routes
from idempotency._http.unmatched_rules import unmatched
from idempotency._http.workers import has_siblings
from idempotency.errors import ConfigurationError, SchemaMissingError, StoreError

P = ParamSpec("P")

_logger = logging.getLogger("idempotency")

_said: set[str] = set()
"""What this process has said. Each text is made of the configuration alone, so their number is bounded."""

_saying = threading.Lock()


def say_once(level: int, text: str) -> None:
    """Log one line, at most once in a process."""
    with _saying:
        first = text not in _said
        _said.add(text)
    if first:
        _logger.log(level, "%s", text)


def logged(construct: Callable[P, None]) -> Callable[P, None]:
    """Make a constructor that logs its ConfigurationError too.

    Starlette calls it when the server starts the lifespan, and servers take an exception there for an application that
    has no lifespan.
    """

    @functools.wraps(construct)
    def constructed(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            construct(*args, **kwargs)
        except ConfigurationError as error:
            say_once(logging.ERROR, f"The middleware cannot be used: {error}")
            raise

    return constructed


class Startup:
    """What is looked at once for a middleware around ``app``.

    ``rules``: with the keys of ``policies``. ``by_headers``: whether callers are named by the default of ``scope=``.
    ``in_memory``: whether the records are in the memory of this process. ``check``: checks the store; None: it has no
    check.
    """

    __slots__ = ("_app", "_by_headers", "_check", "_in_memory", "_rules", "looked")

    def __init__(
        self,
        app: object,
        rules: Routes,
        *,
        by_headers: bool,
        in_memory: bool,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._app = app
        self._rules = rules.rules
        self._by_headers = by_headers
        self._in_memory = in_memory
        self._check = check
        self.looked = False

    def look(self, scope: Mapping[str, Any]) -> None:
        """Warn of what is probably a mistake; ``scope`` is that of an ASGI connection or of a WSGI request."""
        self.looked = True
        try:
            for text in self._mistakes(scope):
                say_once(logging.WARNING, text)
        except Exception as error:
            # A framework may keep its routes in another way some day. The requests do not depend on this.
            say_once(logging.WARNING, f"The application could not be looked at: {type(error).__name__}: {error}")

    async def failure(self) -> str | None:
        """Return why the application must not start, or None. A store that cannot be reached is no such reason."""
        if self._check is None:
            return None
        try:
            await self._check()
        except (SchemaMissingError, ConfigurationError) as error:
            return f"The store of the idempotency keys cannot be used: {error}"
        except StoreError as error:
            say_once(logging.WARNING, f"The store of the idempotency keys could not be checked: {error}")
        return None

    def _mistakes(self, scope: Mapping[str, Any]) -> Iterator[str]:
        if self._in_memory and has_siblings(scope):
            yield (
                "The store is in the memory of one process, and the server has several workers: a retry that reaches"
                " another worker runs again. Give the middleware the URL of a store that they share"
            )
        if self._rules:
            # Litestar gives its own middleware no object that leads to the application.
            routes = routes_of(self._app) or routes_of(scope.get("litestar_app"))
            if routes is not None:
                yield from unmatched(self._rules, routes)
        if self._by_headers:
            for how in uncounted(self._app, scope):
                yield (
                    f"Callers are authenticated by {how}, and named by their headers alone: those who differ in nothing"
                    ' else share their keys. Give the middleware a callable scope=, or scope="authorization" if that'
                    " header names every caller"
                )

"""Make the document that an application serves describe its idempotency: FastAPI and Litestar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from idempotency._http.applications import inside
from idempotency._http.options import Protection
from idempotency.asgi import IdempotencyMiddleware
from idempotency.errors import ConfigurationError
from idempotency.openapi._components import Json
from idempotency.openapi._describe import Protecting, describe
from idempotency.openapi._vendors import Vendor, check_vendors
from idempotency.stores.memory import MemoryStore

if TYPE_CHECKING:
    from litestar import Litestar

Found = list[tuple[str, Protecting]]
"""The middleware around a document, from the outside in, each with the prefix that it sees before the paths."""


def document(app: object, *, outer: object | None = None, vendors: Collection[Vendor] = ()) -> None:
    """Let the OpenAPI document that ``app`` serves say which operations are protected by a key, and how.

    ``app``: an application of FastAPI or Litestar, also one that is inside middleware. Its
    :class:`~idempotency.IdempotencyMiddleware` is found there, so call this when the middleware is added. On FastAPI
    ``app.openapi`` is replaced by a function that describes what the former one returns (see :func:`describe`), also
    with routes that are added later. On Litestar ``app.openapi_schema`` is described: call this when all routes are
    registered.
    ``outer``: the application in which ``app`` is mounted, whose middleware then counts too. Default: None, it is not
    mounted.
    ``vendors``: as for :func:`describe`.

    Raises :class:`~idempotency.errors.ConfigurationError` for another framework, if there is no such middleware, and if
    ``app`` is not mounted in ``outer``.
    """
    chosen = check_vendors(vendors)
    target = _target(app)
    find = _Finder(app, target, outer)
    if not find():
        raise ConfigurationError("there is no IdempotencyMiddleware in the application: add it before document()")
    fastapi = sys.modules.get("fastapi")
    if fastapi is not None and isinstance(target, fastapi.FastAPI):
        target.openapi = _Document(target.openapi, find, chosen)
    else:
        _document_litestar(target, find, chosen)


def _target(app: object) -> Any:
    fastapi, litestar = sys.modules.get("fastapi"), sys.modules.get("litestar")
    each: Any
    for each in inside(app):
        if fastapi is not None and isinstance(each, fastapi.FastAPI):
            return each
        if litestar is not None and isinstance(each, litestar.Litestar):
            if each.openapi_config is None:
                raise ConfigurationError("the application of Litestar has no openapi_config, and so no document")
            return each
    raise ConfigurationError(
        f"document() takes an application of FastAPI or Litestar, not {type(app).__name__}: give the OpenAPI document "
        "of another one to describe()"
    )


def _document_litestar(app: Litestar, find: _Finder, vendors: frozenset[Vendor]) -> None:
    schema = app.openapi_schema
    schema.to_schema = _Document(schema.to_schema, find, vendors)  # type: ignore[method-assign]


class _Document:
    """Describe what ``generate`` returns; again only where that, or the middleware, is another."""

    def __init__(self, generate: Callable[[], Json], find: _Finder, vendors: frozenset[Vendor]) -> None:
        self._generate = generate
        self._find = find
        self._vendors = vendors
        self._of: tuple[Json, Found] | None = None
        self._described: Json = {}

    def __call__(self) -> Json:
        """Return the described document."""
        generated, found = self._generate(), self._find()
        if self._of is None or self._of[0] is not generated or self._of[1] != found:
            described = generated
            # The outermost middleware that protects an operation answers for it.
            for prefix, middleware in found:
                described = describe(described, middleware, prefix=prefix, vendors=self._vendors)
            self._of, self._described = (generated, found), described
        return self._described


class _Finder:
    """Find the middleware around an application, from the outside in."""

    def __init__(self, app: object, target: object, outer: object | None) -> None:
        self._app = app
        self._target = target
        self._outer = outer
        # Middleware that is not built yet, by the identity of its entry, which is held so that it stays unique.
        self._planned: dict[int, tuple[object, _Planned]] = {}

    def __call__(self) -> Found:
        """Return what is there now: an application may get middleware until it starts."""
        found = self._below(self._app if self._outer is None else self._outer)
        if found is None:
            raise ConfigurationError("the application is not mounted in outer: mount it before document()")
        return found[1]

    def _below(self, app: object) -> tuple[str, Found] | None:
        """Return the path of the target in ``app``, and the middleware around it; None if it is not there."""
        around = list(self._around(app))
        if any(each is self._target for each in inside(app)):
            return "", [("", middleware) for middleware in around]
        for each in inside(app):
            for path, mounted in _mounts(each):
                found = self._below(mounted)
                if found is not None:
                    prefix = path + found[0]
                    return prefix, [*((prefix, middleware) for middleware in around), *found[1]]
        return None

    def _around(self, app: object) -> Iterator[Protecting]:
        for each in inside(app):
            if isinstance(each, IdempotencyMiddleware):
                yield each
            elif _is_starlette(each):
                yield from self._in_starlette(each)
            elif _is_litestar(each):
                yield from self._in_litestar(each)

    def _in_starlette(self, app: Any) -> Iterator[Protecting]:
        if app.middleware_stack is not None:
            yield from (each for each in inside(app.middleware_stack) if isinstance(each, IdempotencyMiddleware))
            return
        for entry in app.user_middleware:
            yield from self._of_entry(entry, entry.cls, entry.kwargs)

    def _in_litestar(self, app: Any) -> Iterator[Protecting]:
        from litestar.middleware import DefineMiddleware

        for entry in app.middleware:
            if isinstance(entry, DefineMiddleware):
                yield from self._of_entry(entry, entry.middleware, entry.kwargs)

    def _of_entry(self, entry: object, made_by: object, options: Mapping[str, Any]) -> Iterator[Protecting]:
        if not _is_made_as_usual(made_by):
            return
        if id(entry) not in self._planned:
            self._planned[id(entry)] = entry, _planned(made_by, options)
        yield self._planned[id(entry)][1]


@dataclass(frozen=True, slots=True)
class _Planned:
    """Middleware that the framework makes when it starts."""

    protection: Protection


def _is_made_as_usual(made_by: object) -> TypeGuard[type[IdempotencyMiddleware]]:
    """Return whether this is the class, or one below it that is made by the same options."""
    is_class = isinstance(made_by, type) and issubclass(made_by, IdempotencyMiddleware)
    return is_class and made_by.__init__ is IdempotencyMiddleware.__init__  # type: ignore[misc]


def _planned(made_by: type[IdempotencyMiddleware], options: Mapping[str, Any]) -> _Planned:
    # Made as the framework will make it, but for the store, which is not opened.
    without_store = {**options, "store": MemoryStore(), "session": None}
    protection = made_by(_no_app, **without_store).protection
    transactional = options.get("session") is not None
    return _Planned(replace(protection, options=replace(protection.options, transactional=transactional)))


async def _no_app(*_: object) -> None: ...


def _is_starlette(app: object) -> bool:
    starlette = sys.modules.get("starlette.applications")
    return starlette is not None and isinstance(app, starlette.Starlette)


def _is_router(app: object) -> bool:
    routing = sys.modules.get("starlette.routing")
    return routing is not None and isinstance(app, routing.Router)


def _is_litestar(app: object) -> bool:
    litestar = sys.modules.get("litestar")
    return litestar is not None and isinstance(app, litestar.Litestar)


def _mounts(app: Any) -> Iterator[tuple[str, object]]:
    """Return the applications that an application or a router of Starlette has mounted, with their paths."""
    if _is_starlette(app) or _is_router(app):
        from starlette.routing import Mount

        for route in app.routes:
            if isinstance(route, Mount):
                yield route.path, route.app

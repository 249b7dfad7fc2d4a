"""Find authentication that an application declares, and whose credentials are not in the digest of callers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from idempotency._http.applications import inside, router_of
from idempotency._http.credentials import KINDS

_IN_DIGEST = {"authorization", "key", "identity"}


def uncounted(app: object, scope: Mapping[str, Any]) -> Iterator[str]:
    """Name each kind of authentication in the application whose credentials the default of ``scope=`` does not see.

    They are the ``APIKeyCookie``, ``APIKeyQuery`` and ``APIKeyHeader`` of FastAPI's routes, and the middleware of
    Starlette for sessions and for authentication, also around this one. ``scope``: that of an ASGI connection.
    """
    if "starlette.applications" in sys.modules:
        yield from _middleware(app, scope)
    if "fastapi.security" in sys.modules and (router := router_of(app)) is not None:
        yield from dict.fromkeys(_schemes(router.routes))


def _middleware(app: object, scope: Mapping[str, Any]) -> Iterator[str]:
    from starlette.applications import Starlette

    outer = scope.get("app")
    added = [each.cls for each in outer.user_middleware] if isinstance(outer, Starlette) else []
    kinds = [*added, *(type(each) for each in inside(app))]
    sessions, authentication = (
        sys.modules.get(f"starlette.middleware.{name}") for name in ("sessions", "authentication")
    )
    if sessions is not None and sessions.SessionMiddleware in kinds:
        yield "SessionMiddleware, whose session is in a cookie"
    if authentication is not None and authentication.AuthenticationMiddleware in kinds:
        yield "AuthenticationMiddleware, whose backend may read any header"


def _schemes(routes: Iterable[Any]) -> Iterator[str]:
    from fastapi import routing
    from fastapi.security import APIKeyCookie, APIKeyHeader, APIKeyQuery

    contexts = getattr(routing, "iter_route_contexts", None)
    for route in routes if contexts is None else contexts(routes):
        for scheme in _calls(getattr(route, "dependant", None)):
            if isinstance(scheme, APIKeyCookie | APIKeyQuery | APIKeyHeader):
                name = scheme.model.name
                if isinstance(scheme, APIKeyHeader) and KINDS[name.encode()] in _IN_DIGEST:
                    continue
                yield f"{type(scheme).__name__}(name={name!r})"


def _calls(dependant: Any) -> Iterator[object]:
    """Return what a route of FastAPI depends on, in any depth."""
    if dependant is not None:
        yield dependant.call
        for each in dependant.dependencies:
            yield from _calls(each)

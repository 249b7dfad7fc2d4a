"""Find authentication that an application declares, and whose credentials are not in the digest of callers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from idempotency._http.applications import inside, owner_of, router_of
from idempotency._http.credentials import KINDS

_IN_DIGEST = {"authorization", "key", "identity"}


def uncounted(app: object, scope: Mapping[str, Any]) -> Iterator[str]:
    """Name each kind of authentication in the application whose credentials the default of ``scope=`` does not see.

    They are the ``APIKeyCookie``, ``APIKeyQuery`` and ``APIKeyHeader`` of FastAPI's routes; the middleware of
    Starlette for sessions and for authentication, also around this one; the middleware of Django for sessions; and
    Flask-Login and sessions that an extension of Flask keeps. ``scope``: that of an ASGI connection, or the environment
    of a WSGI request.
    """
    if "starlette.applications" in sys.modules:
        yield from _middleware(app, scope)
    if "django.contrib.sessions.middleware" in sys.modules:
        yield from _sessions_of_django(app)
    if "flask" in sys.modules:
        yield from _sessions_of_flask(app)
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


def _sessions_of_django(app: object) -> Iterator[str]:
    from django.conf import settings  # type: ignore[import-untyped]
    from django.contrib.sessions.middleware import SessionMiddleware  # type: ignore[import-untyped]
    from django.core.handlers.base import BaseHandler  # type: ignore[import-untyped]
    from django.utils.module_loading import import_string  # type: ignore[import-untyped]

    if any(isinstance(each, BaseHandler) for each in inside(app)):
        kinds = [import_string(name) for name in settings.MIDDLEWARE]
        if any(isinstance(kind, type) and issubclass(kind, SessionMiddleware) for kind in kinds):
            yield "Django's SessionMiddleware, whose session is in a cookie"


def _sessions_of_flask(app: object) -> Iterator[str]:
    from flask import Flask
    from flask.sessions import SecureCookieSessionInterface

    for each in inside(app):
        owner = owner_of(each)
        if isinstance(owner, Flask):
            # A SECRET_KEY says nothing: it is set for forms and messages too, and Flask always has its own sessions.
            if getattr(owner, "login_manager", None) is not None:
                yield "Flask-Login, whose session is in a cookie"
            elif not isinstance(owner.session_interface, SecureCookieSessionInterface):
                yield f"{type(owner.session_interface).__name__}, whose session is in a cookie"


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

"""What an ASGI or WSGI application wraps: middleware around a router, and the routers inside."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.routing import Router

_DEEP = 100
"""The most applications that are searched, one inside the other."""


def inside(app: object) -> Iterator[object]:
    """Return an application and those that it wraps, from the outside in. A function is not looked into."""
    for _ in range(_DEEP):
        if app is None:
            return
        yield app
        app = None if inspect.isroutine(app) else getattr(app, "app", None)


def owner_of(app: object) -> object:
    """Return the object whose method ``app`` is, as that of Quart.asgi_app and Flask.wsgi_app; else ``app``."""
    return getattr(app, "__self__", app)


def has_only_files(app: object) -> bool:
    """Return whether ``app`` is a directory of files of Starlette, which answers 405 to a POST, and has no effect."""
    from starlette.staticfiles import StaticFiles

    return any(isinstance(each, StaticFiles) for each in inside(app))


def router_of(app: object) -> Router | None:
    """Return the router of Starlette or FastAPI in ``app``, or None."""
    from starlette.applications import Starlette
    from starlette.routing import Router

    for each in inside(app):
        if isinstance(each, Starlette):
            return each.router
        if isinstance(each, Router):
            return each
    return None

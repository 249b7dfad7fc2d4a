"""Find out whether a 404 or 405 comes from the framework because no route of the application matches the request.

Starlette, FastAPI and Litestar note in the ASGI scope what they found. Quart and Django do not: their own router is
asked. Where nothing is known, such as in an ASGI application without a framework, the response counts as a handler's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from idempotency._http.applications import has_only_files, inside, owner_of, router_of

if TYPE_CHECKING:
    from starlette.routing import Router


def is_unrouted(status: int, scope: MutableMapping[str, Any], app: object) -> bool:
    """Return whether ``app`` answered 404 or 405 because none of its routes takes the request.

    ``scope``: that of the request, as the application has changed it.
    """
    if status not in (404, 405):
        return False
    if "router" not in scope or "starlette.routing" not in sys.modules:
        known = _has_no_route_in(app, scope)
        return "litestar_app" in scope and "route_handler" not in scope if known is None else known
    endpoint = scope.get("endpoint")
    if endpoint is None:
        return True
    of_mounted = _has_no_route_in(endpoint, scope)
    return _has_no_route_in_starlette(scope, endpoint) if of_mounted is None else of_mounted


def _has_no_route_in(app: object, scope: Mapping[str, Any]) -> bool | None:
    """Ask the application of another framework than Starlette; return None if ``app`` contains no such application."""
    litestar, quart = sys.modules.get("litestar"), sys.modules.get("quart")
    django = sys.modules.get("django.core.handlers.asgi")
    for each in inside(app):
        if litestar is not None and isinstance(each, litestar.Litestar):
            return "route_handler" not in scope
        # The middleware is often put around the method Quart.asgi_app.
        owner = owner_of(each)
        if quart is not None and isinstance(owner, quart.Quart):
            return _has_no_route_in_quart(scope, owner)
        if django is not None and isinstance(each, django.ASGIHandler):
            return has_no_route_in_django(django.ASGIRequest(scope, BytesIO()).path_info, scope["method"])
    return None


def _has_no_route_in_starlette(scope: Mapping[str, Any], endpoint: object) -> bool:
    from starlette.endpoints import HTTPEndpoint

    is_class = isinstance(endpoint, type) and issubclass(endpoint, HTTPEndpoint)
    if is_class and not hasattr(endpoint, scope["method"].lower()):
        return True
    # The scope has the endpoint also of a route that does not take the method, and of a mounted application in which no
    # route takes the request. So the routes are matched again, from the outermost on, with the root path of there.
    return not _takes(scope["router"], {**scope, "root_path": scope.get("app_root_path", scope.get("root_path", ""))})


def _takes(router: Router, scope: MutableMapping[str, Any]) -> bool:
    """Return whether a route takes the request, its method included."""
    from starlette.routing import Host, Match, Mount

    for route in router.routes:
        match, found = route.matches(scope)
        if match is Match.FULL:
            if not isinstance(route, Host | Mount):
                return True
            inner = router_of(route.app)
            return _takes(inner, {**scope, **found}) if inner is not None else not has_only_files(route.app)
    return False


def _has_no_route_in_quart(scope: Any, app: Any) -> bool:
    from werkzeug.datastructures import Headers

    root_path, path = scope.get("root_path", ""), scope["path"]
    below = path.startswith(root_path) and path != root_path
    request = app.request_class(
        scope["method"],
        scope["scheme"],
        path.removeprefix(root_path) if below else " ",  # as Quart does: it matches nothing
        scope["query_string"],
        Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]),
        root_path,
        scope["http_version"],
        send_push_promise=_push_nothing,
        scope=scope,
    )
    return matches_nothing(app.create_url_adapter(request))


async def _push_nothing(path: str, headers: object) -> None: ...


def matches_nothing(adapter: Any) -> bool:
    """Return whether no route of Werkzeug takes the request that an adapter is for."""
    from werkzeug.exceptions import HTTPException
    from werkzeug.routing import RequestRedirect

    if adapter is None:
        return False
    try:
        adapter.match()
    except RequestRedirect:
        return False
    except HTTPException:
        return True
    return False


def has_no_route_in_django(path: str, method: str) -> bool:
    """Return whether no route of Django takes the request whose path below its root is ``path``."""
    from django.urls import Resolver404, get_urlconf, resolve  # type: ignore[import-untyped]

    try:
        # The urlconf that a middleware of the application has chosen for this request, if one has.
        view = resolve(path, get_urlconf()).func
    except Resolver404:
        return True
    # A class-based view answers 405 itself where it has no function for the method.
    kind, method = getattr(view, "view_class", None), method.lower()
    return kind is not None and not (method in kind.http_method_names and hasattr(kind, method))

"""The routes of a transactional application whose handlers do not use the session of their operation."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from idempotency._http.route_names import RouteNames

_MOST = 1000
"""The most routes that are remembered. Where the route is not known, each path counts as one."""


class UnusedSessions:
    """The routes that were reported, each once. ``names``: for routes that a framework does not put into a scope."""

    def __init__(self, names: RouteNames) -> None:
        self._names = names
        self._reported: dict[str, object] = {}

    def first_of(self, scope: MutableMapping[str, Any], operation: str) -> str | None:
        """Return the name of the route of ``scope`` if it was not reported; else None.

        ``operation`` names the method and the actual path, for a framework whose routes are not known.
        """
        route, mine = self._route_of(scope, operation), object()
        if len(self._reported) >= _MOST:
            return None
        # In one step: requests in other threads may be the first of their route too.
        return route if self._reported.setdefault(route, mine) is mine else None

    def _route_of(self, scope: MutableMapping[str, Any], operation: str) -> str:
        path = _path_in(scope) or self._names.template_of(scope) or _endpoint_in(scope)
        return operation if path is None else f"{scope['method'].upper()} {path}"


def _path_in(scope: MutableMapping[str, Any]) -> str | None:
    # Starlette, FastAPI and Litestar put what they matched into the scope.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    return _mounted_at(scope) + path if isinstance(path, str) else None


def _endpoint_in(scope: MutableMapping[str, Any]) -> str | None:
    # Older versions of Starlette put the endpoint there.
    endpoint = scope.get("endpoint")
    module, name = getattr(endpoint, "__module__", None), getattr(endpoint, "__qualname__", None)
    return f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else None


def _mounted_at(scope: MutableMapping[str, Any]) -> str:
    """Return the path at which Starlette has mounted the application that has the route."""
    outer = scope.get("app_root_path")
    return str(scope.get("root_path", "")).removeprefix(outer) if isinstance(outer, str) else ""

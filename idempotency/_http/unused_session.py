"""The routes of a transactional application whose handlers do not use the session of their operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 1000
"""The most routes that are remembered. Where the route is not known, each path counts as one."""


class UnusedSessions:
    """The routes that were reported, each once."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def first_of(self, scope: Mapping[str, Any], operation: str) -> str | None:
        """Return the name of the route of ``scope`` if it was not reported; else None.

        ``operation`` names the method and the actual path, for a framework whose routes are not known.
        """
        route = _route_of(scope, operation)
        if route in self._reported or len(self._reported) >= _MOST:
            return None
        self._reported.add(route)
        return route


def _route_of(scope: Mapping[str, Any], operation: str) -> str:
    # Starlette, FastAPI and Litestar put what they matched into the scope; older versions of Starlette the endpoint.
    path = getattr(scope.get("route"), "path", None) or scope.get("path_template")
    if isinstance(path, str):
        path = _mounted_at(scope) + path
    else:
        endpoint = scope.get("endpoint")
        module, name = getattr(endpoint, "__module__", None), getattr(endpoint, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(name, str):
            return operation
        path = f"{module}.{name}"
    return f"{scope['method'].upper()} {path}"


def _mounted_at(scope: Mapping[str, Any]) -> str:
    """Return the path at which Starlette has mounted the application that has the route."""
    outer = scope.get("app_root_path")
    return str(scope.get("root_path", "")).removeprefix(outer) if isinstance(outer, str) else ""

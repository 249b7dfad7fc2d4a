"""The name of a request's route in events: a method, and a template from a finite list, never a path of a caller."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from idempotency._http.app_routes import Templates, routes_of
from idempotency._http.routes import Routes, route_path
from idempotency.events import OTHER


class RouteNames:
    """Find the name of a request's route: the application's own template, else that of ``policies``, else ``other``.

    ``wanted``: whether a hook is given it, or the store records it; if not, every name is empty, and nothing is
    computed. The routes of ``app`` are read at the first request, because routes may be added to it after its
    middleware.
    """

    def __init__(self, app: object, policies: Routes, *, wanted: bool) -> None:
        self._app = app
        self._policies = policies
        self._wanted = wanted
        self._templates: Templates | None = None

    def name_of(self, scope: MutableMapping[str, Any]) -> str:
        """Return the name, such as ``"POST /orders/{id}"``. The request is one that a policy protects."""
        if not self._wanted:
            return ""
        method = scope["method"].upper()
        return f"{method} {self._template_of(method, scope) or OTHER}"

    def template_of(self, scope: MutableMapping[str, Any]) -> str | None:
        """Return the template of the path of such a request, or None; whether a hook is given it or not."""
        return self._template_of(scope["method"].upper(), scope)

    def _template_of(self, method: str, scope: MutableMapping[str, Any]) -> str | None:
        templates = self._templates
        if templates is None:
            templates = self._templates = Templates(routes_of(self._app) or ())
        path = route_path(scope)
        return templates.template_of(method, path) or self._policies.template_for(method, path)

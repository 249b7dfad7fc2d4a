"""The routes of an application, as its framework knows them: for names of operations and for checks at the start."""

from __future__ import annotations

import re
from collections.abc import Iterable

from idempotency._http.framework_routes import AppRoute as AppRoute
from idempotency._http.framework_routes import routes_of as routes_of

_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*(?P<rest>:path)?\}")


class Templates:
    """Find the template of a path among the routes of an application. Nothing is stored for the paths of requests."""

    def __init__(self, routes: Iterable[AppRoute]) -> None:
        known = [(route, _compile(route)) for route in routes]
        named: set[str] = set().union(*(route.methods for route, _ in known if route.methods is not None))
        self._of_any = [(regex, route.template) for route, regex in known if route.methods is None]
        self._of_method = {
            method: [
                (regex, route.template) for route, regex in known if route.methods is None or method in route.methods
            ]
            for method in named
        }

    def template_of(self, method: str, path: str) -> str | None:
        """Return the template of the first route that takes the request, or None. ``method`` is in upper case."""
        for regex, template in self._of_method.get(method, self._of_any):
            if regex.fullmatch(path):
                return template
        return None


def _compile(route: AppRoute) -> re.Pattern[str]:
    if route.regex is not None:
        try:
            # One name may be that of two groups: in the path of a mount and in that of a route below.
            return re.compile(re.sub(r"\(\?P<\w+>", "(", route.regex), re.DOTALL)
        except re.error:
            pass  # such as flags of a regular expression that is not the first part of the path
    parts, end = [], 0
    for match in _PARAMETER.finditer(route.template):
        parts += [re.escape(route.template[end : match.start()]), ".*" if match["rest"] else "[^/]+"]
        end = match.end()
    return re.compile("".join(parts) + re.escape(route.template[end:]), re.DOTALL)

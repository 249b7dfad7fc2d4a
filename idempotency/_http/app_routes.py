"""The routes of an application, as its framework knows them: for names of operations and for checks at the start."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from idempotency._http.framework_routes import AppRoute as AppRoute
from idempotency._http.framework_routes import routes_of as routes_of

_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*(?P<rest>:path)?\}")
_NUMBERED = re.compile(r"\\[1-9]|\(\?\(")
"""What names a group by its number, which is another one where expressions are joined."""

_MOST = 16
"""Routes that are joined. The time for one that is not found grows with their square."""

_Known = tuple[AppRoute, re.Pattern[str]]


class Templates:
    """Find the template of a path among the routes of an application. Nothing is stored for the paths of requests."""

    def __init__(self, routes: Iterable[AppRoute]) -> None:
        known = [(route, _compile(route)) for route in routes]
        named: set[str] = set().union(*(route.methods for route, _ in known if route.methods is not None))
        self._of_any = _joined([each for each in known if each[0].methods is None])
        self._of_method = {
            method: _joined([each for each in known if each[0].methods is None or method in each[0].methods])
            for method in named
        }

    def template_of(self, method: str, path: str) -> str | None:
        """Return the template of the first route that takes the request, or None. ``method`` is in upper case."""
        for regex, templates in self._of_method.get(method, self._of_any):
            match = regex.fullmatch(path)
            if match is not None:
                return templates[match.lastindex or 0]
        return None


def _joined(known: Sequence[_Known]) -> list[tuple[re.Pattern[str], Sequence[str]]]:
    """Join the routes to one expression, with the template of each of its groups; or leave each as it is.

    One expression finds a template among a hundred routes several times as fast as a hundred expressions.
    """
    if not all(regex.flags == re.DOTALL | re.UNICODE and not _NUMBERED.search(regex.pattern) for _, regex in known):
        return [(regex, [route.template] * (1 + regex.groups)) for route, regex in known]
    return [_one_of(known[at : at + _MOST]) for at in range(0, len(known), _MOST)]


def _one_of(known: Sequence[_Known]) -> tuple[re.Pattern[str], Sequence[str]]:
    patterns, templates = [], [""]
    for route, regex in known:
        patterns.append(f"({regex.pattern})")
        templates += [route.template] * (1 + regex.groups)
    return re.compile("|".join(patterns), re.DOTALL), templates


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

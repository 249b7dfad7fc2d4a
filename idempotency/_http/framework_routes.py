"""Read the routes of Starlette, FastAPI, Litestar, Quart, Flask and Django. None of them is imported for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from idempotency._http.applications import has_only_files, inside, owner_of, router_of

if TYPE_CHECKING:
    from starlette.routing import Router

_DEEP = 20
"""The most applications that are read, one mounted in the other."""

_VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_READING = frozenset({"GET", "HEAD"})
_NAMED_PARAMETER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_DJANGO_PARAMETER = re.compile(r"<(?:[^>:]+:)?([^>]+)>")


@dataclass(frozen=True, slots=True)
class AppRoute:
    """One route. ``methods`` None: any method. ``template``: the whole path from the root of the application.

    A parameter is ``{name}``, or ``{name:path}`` for the rest of the path, whatever the framework writes.
    ``regex``: which paths the framework takes, where the template alone does not say it; None: the template does.
    """

    methods: frozenset[str] | None
    template: str
    regex: str | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Path:
    """A path or a part of one: as its template, and as the regular expression of its framework."""

    template: str = ""
    regex: str = ""

    def __add__(self, other: _Path) -> _Path:
        return _Path(self.template + other.template, self.regex + other.regex)

    def route(self, methods: Iterable[str] | None) -> AppRoute:
        return AppRoute(None if methods is None else frozenset(methods), self.template, self.regex)


_ANYTHING = _Path("{path:path}", ".*")
_ROOT = _Path("/", "/")


def routes_of(app: object) -> tuple[AppRoute, ...] | None:
    """Return the routes of the application in ``app``, also of those mounted in it, in the order of their matching.

    ``app`` may be wrapped in middleware. A part of it whose paths are not known, such as a mounted application of
    another kind, is one route that takes every path below, ``{path:path}``. None: the framework of ``app`` is not
    known, so that nothing can be said about its paths.

    The paths are those that the application sees, without its ``root_path`` or ``SCRIPT_NAME``. Routes of Starlette's
    ``Host`` are listed by their path alone. WebSocket routes are not listed. Django: the routes of ``ROOT_URLCONF``.
    """
    return _find(app, 0)


def _find(app: object, depth: int) -> tuple[AppRoute, ...] | None:
    if depth == _DEEP:
        return None
    litestar, quart, flask = sys.modules.get("litestar"), sys.modules.get("quart"), sys.modules.get("flask")
    starlette, django = sys.modules.get("starlette.routing"), sys.modules.get("django.core.handlers.base")
    dispatcher = sys.modules.get("werkzeug.middleware.dispatcher")
    for each in inside(app):
        owner = owner_of(each)
        if litestar is not None and isinstance(each, litestar.Litestar):
            return tuple(_of_litestar(each))
        if (quart is not None and isinstance(owner, quart.Quart)) or (
            flask is not None and isinstance(owner, flask.Flask)
        ):
            return tuple(_of_werkzeug(owner))
        if django is not None and isinstance(each, django.BaseHandler):
            return _of_django()
        if dispatcher is not None and isinstance(each, dispatcher.DispatcherMiddleware):
            return tuple(_of_dispatcher(each, depth))
        if starlette is not None and (router := router_of(each)) is not None:
            return tuple(_of_starlette(router, _Path(), depth))
    return None


def _literal(text: str) -> _Path:
    return _Path(text, re.escape(text))


def _parameter(name: str, regex: str) -> _Path:
    rest = re.fullmatch(regex, "a/b") is not None
    return _Path(f"{{{name}:path}}" if rest else f"{{{name}}}", f"(?:{regex})")


def _below(prefix: _Path, routes: tuple[AppRoute, ...] | None) -> Iterator[AppRoute]:
    """Put the path of a mount before the routes of the application that is mounted there."""
    if routes is None:
        yield (prefix + _ROOT + _ANYTHING).route(None)
        return
    for each in routes:
        yield (prefix + _Path(each.template, each.regex or "")).route(each.methods)


def _of_starlette(router: Router, prefix: _Path, depth: int) -> Iterator[AppRoute]:
    from starlette.routing import Host, Mount, Route, WebSocketRoute

    for route, seen in _with_contexts(router):
        if isinstance(route, WebSocketRoute):
            continue
        if isinstance(route, Route):
            yield (prefix + _path_of_starlette(seen)).route(_methods_of_starlette(seen))
        elif isinstance(route, Mount | Host):
            below = prefix + _path_of_starlette(seen, mount=True) if isinstance(route, Mount) else prefix
            if has_only_files(seen.app):
                yield (below + _ROOT + _ANYTHING).route(_READING)
            else:
                yield from _below(below, _find(seen.app, depth + 1))
        else:
            yield (prefix + _ROOT + _ANYTHING).route(None)
    default = router.default
    if getattr(router, "_low_priority_routes", None):
        yield (prefix + _ROOT + _ANYTHING).route(_READING)  # the pages of FastAPI.frontend()
    if owner_of(default) is not router:
        yield from _below(prefix, _find(default, depth + 1))


def _with_contexts(router: Router) -> Iterator[tuple[Any, Any]]:
    """Return each route, and the object that has its whole path: newer FastAPI leaves an included router one route."""
    fastapi = sys.modules.get("fastapi.routing")
    contexts = getattr(fastapi, "iter_route_contexts", None)
    if contexts is None:
        yield from ((route, route) for route in router.routes)
        return
    yield from ((context.original_route, context) for context in contexts(router.routes))


def _path_of_starlette(route: Any, mount: bool = False) -> _Path:
    path = route.path_format.removesuffix("/{path}") if mount else route.path_format
    whole, end = _Path(), 0
    for match in _NAMED_PARAMETER.finditer(path):
        whole += _literal(path[end : match.start()])
        whole += _parameter(match[1], route.param_convertors[match[1]].regex)
        end = match.end()
    return whole + _literal(path[end:])


def _methods_of_starlette(route: Any) -> Iterable[str] | None:
    from starlette.endpoints import HTTPEndpoint

    endpoint = route.endpoint
    if isinstance(endpoint, type) and issubclass(endpoint, HTTPEndpoint):
        verbs = [verb for verb in _VERBS if hasattr(endpoint, verb.lower())]
        return {*verbs, "HEAD"} if "GET" in verbs else verbs
    methods: Iterable[str] | None = route.methods or None
    return methods


def _of_litestar(app: Any) -> list[AppRoute]:
    from litestar.routes import ASGIRoute, HTTPRoute

    found = []
    for route in app.routes:
        kinds, path = [], _Path()
        for part in route.path_components:
            if isinstance(part, str):
                kinds.append(0)
                path += _ROOT + _literal(part)
            else:
                rest = part.full.endswith(":path")
                kinds.append(2 if rest else 1)
                path += _ROOT + _parameter(part.name, ".+" if rest else "[^/]+")
        if isinstance(route, HTTPRoute):
            # A path without parameters comes first, and a path with a slash at its end is the same path.
            found.append(((2 if any(kinds) else 0, kinds), _with_slash(path).route(route.methods)))
        elif isinstance(route, ASGIRoute):
            below = route.route_handler.is_mount
            whole = path + _ROOT + _ANYTHING if below else _with_slash(path)
            found.append(((1 if below else 0, kinds), whole.route(None)))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


def _with_slash(path: _Path) -> _Path:
    return _Path(path.template or "/", path.regex + "/?")


def _of_werkzeug(app: Any) -> list[AppRoute]:
    rules = [rule for rule in app.url_map.iter_rules() if not rule.websocket]
    rules.sort(key=lambda rule: [(0,) if part.static else (1, part.weight) for part in rule._parts])
    return [_path_of_werkzeug(rule).route(rule.methods) for rule in rules]


def _path_of_werkzeug(rule: Any) -> _Path:
    whole, begun = _Path(), False
    for is_parameter, text in rule._trace:
        if begun:
            whole += _parameter(text, rule._converters[text].regex) if is_parameter else _literal(text)
        begun = begun or text == "|"  # before it is the host
    return whole


def _of_dispatcher(dispatcher: Any, depth: int) -> Iterator[AppRoute]:
    for path in sorted(dispatcher.mounts, key=len, reverse=True):
        yield from _below(_literal(path), _find(dispatcher.mounts[path], depth + 1))
    yield from _below(_Path(), _find(dispatcher.app, depth + 1))


def _of_django() -> tuple[AppRoute, ...]:
    from django.urls import get_resolver  # type: ignore[import-untyped]

    return tuple(_of_patterns(get_resolver().url_patterns, _ROOT))


def _of_patterns(patterns: Iterable[Any], prefix: _Path) -> Iterator[AppRoute]:
    from django.urls import URLPattern

    for each in patterns:
        path = _path_of_django(each.pattern)
        if path is None:
            yield (prefix + _ANYTHING).route(None)
        elif isinstance(each, URLPattern):
            yield (prefix + path).route(_methods_of_view(each.callback))
        else:
            yield from _of_patterns(each.url_patterns, prefix + path)


def _path_of_django(pattern: Any) -> _Path | None:
    """Return the path of a pattern; None for a prefix of the language, and for a regular expression that is no path."""
    from django.urls.resolvers import RegexPattern, RoutePattern  # type: ignore[import-untyped]

    text = str(pattern)
    if isinstance(pattern, RoutePattern):
        whole, end = _Path(), 0
        for match in _DJANGO_PARAMETER.finditer(text):
            whole += _literal(text[end : match.start()]) + _parameter(match[1], pattern.converters[match[1]].regex)
            end = match.end()
        return whole + _literal(text[end:])
    if isinstance(pattern, RegexPattern):
        template = _template_of_regex(text)
        return None if template is None else _Path(template, f"(?:{_without_anchors(text)})")
    return None


def _without_anchors(regex: str) -> str:
    return regex.removeprefix("^").removesuffix("$").removesuffix(r"\Z")


def _template_of_regex(regex: str) -> str | None:
    """Replace the named groups of a regular expression; return None if what remains is not plain text."""
    if not regex.startswith("^") and regex:
        return None
    text, template = _without_anchors(regex), ""
    while (start := text.find("(?P<")) != -1:
        name, end = text[start + 4 : text.index(">", start)], _end_of_group(text, start)
        if text[end : end + 1] in ("?", "*", "+", "{"):
            return None
        rest = re.fullmatch(text[start:end], "a/b") is not None
        template += text[:start] + ("{%s:path}" if rest else "{%s}") % name
        text = text[end:]
    plain = re.sub(r"\\([/.\-_])", r"\1", template + text)
    return None if re.search(r"[\\^$*+?()\[\]|]", plain) else plain


def _end_of_group(regex: str, start: int) -> int:
    open_groups, in_class, position = 0, False, start
    while position < len(regex):
        match regex[position]:
            case "\\":
                position += 1
            case "[":
                in_class = True
            case "]":
                in_class = False
            case "(" if not in_class:
                open_groups += 1
            case ")" if not in_class:
                open_groups -= 1
                if open_groups == 0:
                    return position + 1
        position += 1
    return position


def _methods_of_view(view: Any) -> list[str] | None:
    """Return the methods of a class-based view; a function takes any."""
    kind = getattr(view, "view_class", None)
    if kind is None:
        return None
    return [verb.upper() for verb in kind.http_method_names if hasattr(kind, verb)]

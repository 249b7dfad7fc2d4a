"""Find the keys of ``policies`` that match no route of the application, and so do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from idempotency._http.app_routes import AppRoute, Templates
from idempotency._http.routes import Rule


def unmatched(rules: Iterable[Rule], routes: Sequence[AppRoute]) -> Iterator[str]:
    """Return a sentence for each rule that can match no request that a route takes."""
    for rule in rules:
        if not any(_meet(rule, route) for route in routes):
            yield f"policies[{rule.key!r}] matches no route of the application, so it does nothing" + _nearest(
                rule, routes
            )


def _nearest(rule: Rule, routes: Sequence[AppRoute]) -> str:
    known = {f"{method} {route.template}" for route in routes for method in route.methods or ()}
    near = get_close_matches(f"{rule.method or 'POST'} {rule.path}", sorted(known), 1)
    return f"; the nearest is {near[0]!r}" if near else ""


def _meet(rule: Rule, route: AppRoute) -> bool:
    methods = _methods(rule)
    if methods is not None and route.methods is not None and methods.isdisjoint(route.methods):
        return False
    if "{" not in rule.path:
        anything = AppRoute(None, route.template, route.regex)
        return Templates([anything]).template_of("", rule.path) is not None
    path = rule.path
    if path.endswith("/") and (route.regex or "").endswith("/?"):
        path = path[:-1]  # the framework takes both
    return _overlap(path.split("/"), route.template.split("/"))


def _methods(rule: Rule) -> frozenset[str] | None:
    if rule.method is not None:
        return frozenset({rule.method})
    return None if rule.policy is None else frozenset(rule.policy.methods)


def _overlap(rule: list[str], route: list[str]) -> bool:
    """Return whether a path exists that both take, judged by segments; where it is not certain, True."""
    for ours, theirs in zip(rule, route, strict=False):
        if ":path}" in ours or ":path}" in theirs:
            return True
        if ours != theirs and "{" not in ours and "{" not in theirs:
            return False
    return len(rule) == len(route)

"""Find the policy of a request by its method and path."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from idempotency.errors import ConfigurationError
from idempotency.policy import Policy

_KEY = re.compile(r"(?:(?P<method>[A-Za-z]+) )?(?P<path>/[^\s?#]*)")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"})
_PARAMETER = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*(?P<rest>:path)?\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """One key of ``policies``. ``path``: with its parameters. ``method`` None: those of ``policy``."""

    method: str | None
    path: str
    policy: Policy | None

    @property
    def key(self) -> str:
        return self.path if self.method is None else f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class _Segment:
    rank: int  # 0 literal, 1 parameter, 2 the rest of the path
    pattern: str


_ONE = _Segment(1, "[^/]+")
_REST = _Segment(2, ".*")


@dataclass(frozen=True, slots=True)
class _Route:
    key: str
    method: str | None
    segments: tuple[_Segment, ...]
    policy: Policy | None

    @property
    def literal(self) -> bool:
        return all(segment.rank == 0 for segment in self.segments)

    @property
    def pattern(self) -> str:
        return "/" + "/".join(segment.pattern for segment in self.segments)

    @property
    def order(self) -> tuple[tuple[int, ...], bool]:
        return tuple(segment.rank for segment in self.segments), self.method is None

    def policy_of(self, method: str) -> Policy | None:
        if self.method is None and self.policy is not None and method not in self.policy.methods:
            return None
        return self.policy


@dataclass(frozen=True, slots=True)
class _Table:
    exact: dict[str, Policy | None]
    pattern: re.Pattern[str] | None
    policies: tuple[Policy | None, ...]
    templates: tuple[str, ...]
    default: Policy | None


class Routes:
    r"""Find the policy of every request: one for all, and others for single routes.

    A key of ``policies`` is a path (``"/payments"``) or a method and a path (``"POST /payments/{id}"``). ``{name}``
    stands for one segment, ``{name:path}`` for the rest of the path, which may be empty; a trailing slash makes another
    path. Of several keys that match, the one with the more specific path decides: segment by segment from the first, a
    literal before ``{name}`` before ``{name:path}``; on the same path the key with a method comes first. A key with a
    method protects that method whatever ``Policy.methods`` says, a key without one those of its policy and no other.
    None takes the route out of scope.

    Everything is computed at construction. Nothing is stored for the paths of requests.

    Raises :class:`~idempotency.errors.ConfigurationError` for a key of another form, and for two keys that match the
    same requests.
    """

    def __init__(self, policy: Policy, policies: Mapping[str, Policy | None]) -> None:
        if not isinstance(policy, Policy) or not isinstance(policies, Mapping):
            raise ConfigurationError("policy must be a Policy, and policies a mapping of routes to policies")
        for name, value in policies.items():
            if value is not None and not isinstance(value, Policy):
                raise ConfigurationError(f"policies[{name!r}] must be a Policy or None, not {type(value).__name__}")
        routes = sorted((_parse(key, value) for key, value in policies.items()), key=lambda route: route.order)
        _refuse_equal_routes(routes)
        self.rules = tuple(Rule(route.method, route.key, route.policy) for route in routes)
        """The keys of ``policies``, in the order in which they decide."""
        used = (policy, *(route.policy for route in routes if route.policy is not None))
        self.callable_fingerprints = [each.fingerprint for each in used if callable(each.fingerprint)]
        """The fingerprints of the policies that are functions, which are given a request object."""
        methods = set(policy.methods)
        for route in routes:
            if route.policy is not None:
                methods.update(route.policy.methods if route.method is None else {route.method})
        self._tables = {method: _table(method, routes, policy) for method in methods}

    def policy_for(self, method: str, path: str) -> Policy | None:
        """Return the policy of a request, or None if it is out of scope. ``method`` is in upper case."""
        table = self._tables.get(method)
        if table is None:
            return None
        if path in table.exact:
            return table.exact[path]
        if table.pattern is not None:
            match = table.pattern.fullmatch(path)
            if match is not None and match.lastindex is not None:
                return table.policies[match.lastindex - 1]
        return table.default

    def template_for(self, method: str, path: str) -> str | None:
        """Return the path in the key of ``policies`` that decides about a request; None where no key matches."""
        table = self._tables.get(method)
        if table is None:
            return None
        if path in table.exact:
            return path
        match = table.pattern.fullmatch(path) if table.pattern is not None else None
        return None if match is None or match.lastindex is None else table.templates[match.lastindex - 1]


def route_path(scope: MutableMapping[str, Any]) -> str:
    """Return the path of a request as the application's own routes see it: without the path it is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _table(method: str, routes: list[_Route], policy: Policy) -> _Table:
    exact: dict[str, Policy | None] = {}
    patterns: list[str] = []
    policies: list[Policy | None] = []
    templates: list[str] = []
    for route in routes:
        if route.method not in (None, method):
            continue
        if route.literal:
            exact.setdefault(route.key, route.policy_of(method))
        else:
            patterns.append(f"({route.pattern})")
            policies.append(route.policy_of(method))
            templates.append(route.key)
    pattern = re.compile("|".join(patterns), re.DOTALL) if patterns else None
    return _Table(exact, pattern, tuple(policies), tuple(templates), policy if method in policy.methods else None)


def _parse(key: str, policy: Policy | None) -> _Route:
    match = _KEY.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise ConfigurationError(f'policies takes a path such as "/orders" or "POST /orders/{{id}}", not {key!r}')
    if policy is not None and not isinstance(policy, Policy):
        raise ConfigurationError(f"policies[{key!r}] must be a Policy or None, not {policy!r}")
    segments = tuple(_segment(text, key) for text in match["path"][1:].split("/"))
    if _REST in segments[:-1]:
        raise ConfigurationError(f"only the last segment of a path takes {{name:path}}: {key!r}")
    method = match["method"].upper() if match["method"] else None
    if method is not None and method not in _METHODS and (policy is None or method not in policy.methods):
        raise ConfigurationError(f"{method} is no method known to HTTP or to this policy's methods: {key!r}")
    return _Route(match["path"], method, segments, policy)


def _segment(text: str, key: str) -> _Segment:
    parameter = _PARAMETER.fullmatch(text)
    if parameter is not None:
        return _REST if parameter["rest"] else _ONE
    if "{" in text or "}" in text or text == "*":
        raise ConfigurationError(f"a parameter is a whole segment, {{name}} or {{name:path}}: {text!r} in {key!r}")
    return _Segment(0, re.escape(text))


def _refuse_equal_routes(routes: list[_Route]) -> None:
    seen: dict[tuple[str | None, str], str] = {}
    for route in routes:
        identity = (route.method, route.pattern)
        if identity in seen:
            raise ConfigurationError(f"two keys of policies match the same paths: {seen[identity]!r} and {route.key!r}")
        seen[identity] = route.key

"""The routes of an application, as its framework knows them: for names of operations and for checks at the start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AppRoute:
    """One route. ``methods`` None: any method. ``template``: the whole path from the root of the application.

    A parameter is ``{name}``, or ``{name:path}`` for the rest of the path, whatever the framework writes.
    """

    methods: frozenset[str] | None
    template: str


def routes_of(app: object) -> tuple[AppRoute, ...] | None:
    """Return the routes of the application in ``app``, also of those mounted in it, in the order of their matching.

    ``app`` may be wrapped in middleware. None: its framework is not known, or something in it takes paths that no
    route names (a mounted application of another kind), so that nothing can be said about a path that is not listed.
    """
    raise NotImplementedError


class Templates:
    """Find the template of a path among the routes of an application. Nothing is stored for the paths of requests."""

    def __init__(self, routes: Iterable[AppRoute]) -> None:
        self._routes: Sequence[AppRoute] = tuple(routes)

    def template_of(self, method: str, path: str) -> str | None:
        """Return the template of the first route that takes the request, or None."""
        raise NotImplementedError

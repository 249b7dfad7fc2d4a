"""Find what FastAPI still runs for a request after its response: dependencies with ``yield``.

Since 0.118 their code after the ``yield`` runs after the response, and it often commits the effect. The exit stacks
that run it are in the scope, one for each of :data:`_KEYS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

_KEYS = ("fastapi_inner_astack", "fastapi_function_astack", "fastapi_middleware_astack")
_SEEN = (*_KEYS, "endpoint")

_MANY = 100
"""The most objects that are searched for an application inside its middleware."""


class ExitStacks:
    """The exit stacks of one request. Those of an earlier request in the same scope do not count.

    ``failure`` is what was raised in a stack after :meth:`watch`, also where an outer dependency or a middleware
    swallowed it.
    """

    __slots__ = ("_app", "_before", "_scope", "_watched", "failure")

    def __init__(self, scope: Mapping[str, Any], app: object) -> None:
        self._scope = scope
        self._app = app
        self._before = {key: scope[key] for key in _SEEN if key in scope} if "fastapi" in sys.modules else {}
        self._watched: tuple[AsyncExitStack, ...] = ()
        self.failure: BaseException | None = None

    def watch(self) -> bool:
        """Return whether something is still to run, and record from here on whether it fails."""
        if "fastapi" not in sys.modules:
            return False
        found = False
        for key in _KEYS:
            stack = self._new(key)
            if isinstance(stack, AsyncExitStack) and self._has_work(stack):
                found = True
                self._note_failure(stack)
        return found or self._may_be_hidden()

    def _new(self, key: str) -> Any:
        value = self._scope.get(key)
        return None if value is self._before.get(key) else value

    def _has_work(self, stack: AsyncExitStack) -> bool:
        callbacks = getattr(stack, "_exit_callbacks", None)
        return callbacks is None or any(not self._is_upkeep(callback) for _, callback in callbacks)

    def _is_upkeep(self, callback: Callable[..., object]) -> bool:
        """Return whether a callback is FastAPI's own: it ends cancel scopes, or closes streams or uploaded files."""
        callback = getattr(callback, "__wrapped__", callback)
        owner = getattr(callback, "__self__", callback)
        if owner is self._scope.get("fastapi_async_cleanup_scopes"):
            return True
        code = getattr(getattr(owner, "gen", None), "ag_code", None)
        if code is not None and code.co_name == "_sse_producer_cm":
            return True
        return (
            type(owner).__module__.partition(".")[0] == "anyio" or type(owner).__module__ == "starlette.datastructures"
        )

    def _note_failure(self, stack: AsyncExitStack) -> None:
        callbacks = getattr(stack, "_exit_callbacks", None)
        if callbacks is None or any(stack is each for each in self._watched):
            return
        self._watched += (stack,)
        # Callbacks run from the last to the first. So a callback of ours before that of each dependency is given the
        # error of that dependency, also where an outer one swallows it.
        watched = list[Any]()
        for callback in callbacks:
            if not watched or not self._is_upkeep(callback[1]):
                watched.append((False, self._ended))
            watched.append(callback)
        callbacks.clear()
        callbacks.extend(watched)

    async def _ended(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.failure = error

    def _may_be_hidden(self) -> bool:
        """Return whether FastAPI may have put its stacks into a copy of the scope that a middleware made."""
        if self._new(_KEYS[0]) is not None:
            return False
        kind = sys.modules["fastapi"].FastAPI
        endpoint = self._new("endpoint")
        if endpoint is not None:
            return _leads_to(endpoint, kind)
        # FastAPI has used this scope itself, and none of its routes has answered.
        if self._new("fastapi_middleware_astack") is not None:
            return False
        return isinstance(self._scope.get("app"), kind) or _leads_to(self._app, kind)


def _leads_to(app: object, kind: type) -> bool:
    """Return whether ``app``, or an application inside it, is a ``kind``."""
    found = [app]
    for number in range(_MANY):
        if number == len(found):
            return False
        each = found[number]
        if isinstance(each, kind):
            return True
        found += [getattr(each, name) for name in ("app", "__wrapped__", "__self__") if hasattr(each, name)]
        found += [value for value in getattr(each, "__dict__", {}).values() if callable(value)]
        for cell in getattr(each, "__closure__", None) or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not yet filled
                continue
    return False

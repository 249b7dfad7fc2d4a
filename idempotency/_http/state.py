"""The ``state`` of a request, in which the application finds its operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from idempotency._http.body import Receive, Send
from idempotency.operation import Operation


class RequestState:
    """A state that belongs to one request only: some servers, and batch endpoints, share one state among requests.

    When it is made, it replaces the state in the scope. It begins as a copy of that state.
    """

    __slots__ = ("_given", "_outer", "_own", "_scope")

    def __init__(self, scope: MutableMapping[str, Any], operation: Operation | None) -> None:
        self._scope = scope
        self._outer = scope.get("state")
        self._given = dict(mapping_of(self._outer))
        self._own = scope["state"] = {**self._given, "idempotency": operation}

    def share(self) -> None:
        """Copy what the application has put into the state to the outer one, and nothing that is older."""
        if len(self._own) == 1:  # the operation only
            return
        outer, given = mapping_of(self._outer), self._given
        if isinstance(outer, MutableMapping):
            for name, value in self._own.items():
                if name != "idempotency" and (name not in given or given[name] is not value):
                    outer[name] = given[name] = value

    def leave(self) -> None:
        """Put the outer state back into the scope, at the end of the operation."""
        self.share()
        # A task may outlive the request and still hold this state.
        self._own["idempotency"] = None
        if self._outer is not None and self._scope.get("state") is self._own:
            self._scope["state"] = self._outer


def note_unprotected(scope: MutableMapping[str, Any]) -> bool:
    """Put ``idempotency`` None into the state of a request; False where that state belongs to more than the request."""
    state = mapping_of(scope.setdefault("state", {}))
    if not isinstance(state, dict) or state.get("idempotency") is not None:
        return False
    state["idempotency"] = None
    return True


async def run_unprotected(
    app: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]],
    scope: MutableMapping[str, Any],
    receive: Receive,
    send: Send,
) -> None:
    """Run ``app`` without an operation: ``idempotency`` is None in the state of the request."""
    if note_unprotected(scope):
        await app(scope, receive, send)
        return
    own = RequestState(scope, None)
    try:
        await app(scope, receive, send)
    finally:
        own.leave()


def mapping_of(state: object) -> Mapping[str, Any]:
    """Return the mapping behind the ``state`` of a scope: ASGI's is one, Starlette's ``State`` wraps one."""
    if isinstance(state, dict):
        return state
    state = getattr(state, "_state", state)
    return state if isinstance(state, Mapping) else {}

"""Answer an error of a function of the user (``scope=``, ``fingerprint=``) as the application answers a handler's.

This module is imported only where there are such functions: they are given a Starlette ``Request``.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.formparsers import MultiPartException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request

from idempotency._http.body import Receive, Send, is_about


class ReadRequest(Request):
    """A request that notes the error with which reading its body as JSON or as a form failed."""

    malformed: BaseException | None = None

    async def json(self) -> Any:
        """Read the body as JSON."""
        try:
            return await super().json()
        except (ValueError, RecursionError) as error:
            self.malformed = error
            raise

    async def _get_form(self, **limits: Any) -> Any:
        try:
            return await super()._get_form(**limits)
        except MultiPartException as error:
            self.malformed = error
            raise

    def is_malformed(self, error: BaseException) -> bool:
        """Return whether ``error`` means that the body is malformed, also if the user's function parsed it itself."""
        return error is self.malformed or is_about(error, getattr(self, "_body", b""))


async def answer(error: Exception, app: object, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> bool:
    """Send what the application answers when a handler raises ``error``; return False if it has no answer to it.

    A Starlette or FastAPI application has its own exception handlers; without them a Starlette ``HTTPException`` is
    answered with its status and headers. Litestar calls its handlers itself, outside of its middleware.
    """
    if "litestar_app" in scope:
        return False

    async def fail(*_: object) -> None:
        raise error

    application = _application(scope.get("app"), app)
    handlers = {} if application is None else application.exception_handlers
    # These two run outside of all middleware, for errors that no other handler takes.
    usual = {kind: handler for kind, handler in handlers.items() if kind not in (500, Exception)}
    if application is not None:
        scope.setdefault("app", application)
    try:
        await ExceptionMiddleware(fail, usual)(scope, receive, send)
    except Exception as raised:
        if raised is error:
            return False
        raise
    return True


def _application(outer: object, inner: object) -> Starlette | None:
    """Return the application that this middleware was added to, else the one that it wraps."""
    if isinstance(outer, Starlette):
        return outer
    while inner is not None:
        if isinstance(inner, Starlette):
            return inner
        inner = getattr(inner, "app", None)
    return None

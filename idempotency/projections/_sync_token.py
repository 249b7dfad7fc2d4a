"""Read your own writes over HTTP: a token of what was written, which a later request gives back."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

from idempotency._durations import DAY, seconds
from idempotency._http.body import Message, Receive, Send
from idempotency._http.capture import send_response
from idempotency._http.key import read_prefer_wait
from idempotency._http.problem import DRAFT, check_docs, describe, problem_response
from idempotency._synchronization import loop_time
from idempotency.asgi import ASGIApp, Scope
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.projections._async import AsyncProjection
from idempotency.projections.errors import ProjectionBehindError, SyncTokenInvalidError
from idempotency.streams._position import Appended

MOST_BYTES = 4096
"""Of a token. The longest that :func:`sync_token` makes has about 2,100: a stream of 255 characters."""

_FIELD = b"sync-token"
_STALE = (b"sync-token-reached", b"false")


def sync_token(appended: Appended) -> str:
    """Return the value of the field ``Sync-Token`` for a response, from what an append returned.

    The transaction need not be committed yet. A client gives the token back with what it reads, see
    :class:`SyncTokenMiddleware`. It is not secret, and not signed: it names the stream and a version of it.
    """
    data = json.dumps([appended.stream, appended.version], ensure_ascii=False, separators=(",", ":"))
    return base64.urlsafe_b64encode(data.encode()).decode().rstrip("=")


def read_token(token: bytes) -> Appended:
    """Read a token; SyncTokenInvalidError for any other text."""
    try:
        if len(token) > MOST_BYTES:
            raise ValueError
        stream, version = json.loads(base64.b64decode(token + b"=" * (-len(token) % 4), b"-_", validate=True))
        if not (isinstance(stream, str) and 0 < len(stream) <= 255 and "\0" not in stream):
            raise ValueError
        if type(version) is not int or not 0 < version < 2**63:
            raise ValueError
        stream.encode()
    except (ValueError, TypeError, RecursionError):
        raise SyncTokenInvalidError("the field must hold one token, as an earlier response had it") from None
    return Appended(stream, version)


class SyncTokenMiddleware:
    """Let a request with ``Sync-Token`` wait until what it reads has what the token names; an ASGI application.

    ``projections``: all of them must have it. ``wait``: the most seconds, default 2; ``Prefer: wait=n`` asks for less.
    ``late``: what happens then. ``"refuse"``: 503 with ``Retry-After``. ``"stale"``: the application answers with what
    is there, and the response has ``Sync-Token-Reached: false``. ``docs``: the URL that problem types link to.
    A request without a token is not touched. A token that is malformed is answered with 400.
    """

    def __init__(
        self,
        app: ASGIApp,
        projections: Sequence[AsyncProjection],
        *,
        wait: float | timedelta = 2.0,
        late: Literal["refuse", "stale"] = "refuse",
        docs: str = DRAFT,
    ) -> None:
        if not projections or not all(isinstance(each, AsyncProjection) for each in projections):
            raise ConfigurationError("projections must be a list of projections with session=async_sessionmaker(...)")
        for each in projections:
            each._definition.feed()
        if late not in ("refuse", "stale"):
            raise ConfigurationError(f"late must be 'refuse' or 'stale', not {late!r}")
        if seconds("wait", wait, DAY) < 0:
            raise ConfigurationError(f"wait must not be negative, as {wait!r} is")
        self._app = app
        self._projections = tuple(projections)
        self._wait = seconds("wait", wait, DAY)
        self._late = late
        self._docs = check_docs(docs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; all but HTTP requests with a token pass through."""
        tokens = [value for name, value in scope["headers"] if name == _FIELD] if scope["type"] == "http" else []
        if not tokens:
            return await self._app(scope, receive, send)
        try:
            if len(tokens) > 1:
                raise SyncTokenInvalidError("the field must be there once")
            if await self._reached(read_token(tokens[0]), read_prefer_wait(scope["headers"])):
                return await self._app(scope, receive, send)
            if self._late == "refuse":
                raise ProjectionBehindError("what the token names is not applied yet")
        except IdempotencyError as error:
            return await send_response(send, problem_response(describe(error, docs=self._docs)))
        await self._app(scope, receive, _marked(send))

    async def _reached(self, appended: Appended, preferred: float | None) -> bool:
        timeout = self._wait if preferred is None else min(preferred, self._wait)
        until = loop_time() + timeout
        for each in self._projections:
            if not await each.reached(appended, timeout=max(0.0, until - loop_time())):
                return False
        return True


def _marked(send: Send) -> Send:
    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), _STALE]}
        await send(message)

    return send_marked

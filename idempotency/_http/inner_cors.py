"""Let a page of another origin read our own answers where Starlette's CORS middleware is inside of this one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from idempotency._http.applications import inside
from idempotency._http.body import Message
from idempotency._http.codec import StoredResponse
from idempotency.policy import Headers

if TYPE_CHECKING:
    from starlette.middleware.cors import CORSMiddleware


class InnerCors:
    """The CORS middleware in an application, which our own answers do not pass.

    Without its headers a browser hides an answer from the page, which then retries for ever what is done.
    """

    def __init__(self, app: object) -> None:
        self._app = app

    # Starlette puts its middleware together at the first request.
    @cached_property
    def _found(self) -> CORSMiddleware | None:
        cors = sys.modules.get("starlette.middleware.cors")
        if cors is None:
            return None
        found: Any = next((each for each in inside(self._app) if isinstance(each, cors.CORSMiddleware)), None)
        return found  # type: ignore[no-any-return]

    async def headed(self, scope: MutableMapping[str, Any], response: StoredResponse) -> StoredResponse:
        """Return an answer with the headers that the CORS middleware gives to answers of the application."""
        if self._found is None:
            return response
        from starlette.datastructures import Headers as RequestHeaders

        start: Message = {"type": "http.response.start", "headers": [*_without_origin(response.headers)]}
        await self._found.send(start, _drop, RequestHeaders(scope=scope))
        return StoredResponse(response.status, [*start["headers"]], response.body)


def _without_origin(headers: Headers) -> Iterator[tuple[bytes, bytes]]:
    """Take ``Origin`` out of Vary: a replay has it from the first answer, and the CORS middleware adds it again."""
    for name, value in headers:
        if name.lower() == b"vary":
            value = b", ".join(each for each in value.replace(b" ", b"").split(b",") if each.lower() != b"origin")
            if not value:
                continue
        yield name, value


async def _drop(_: Message) -> None: ...

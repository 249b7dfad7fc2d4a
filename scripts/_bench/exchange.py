"""The bare application, and requests that are put to an application directly, without a server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

BODY = b'{"item":"book","amount":3}'
ANSWER = b'{"id":1234,"status":"created"}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]


async def bare(scope: Message, receive: Any, send: Any) -> None:
    """Read the body and answer: the least that an ASGI application does."""
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 201, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


async def create(request: Request) -> JSONResponse:
    """Read JSON, and answer with :data:`ANSWER`."""
    await request.json()
    return JSONResponse({"id": 1234, "status": "created"}, 201)


shop = Starlette(routes=[Route("/orders", create, methods=["POST"])])
"""A small application as people write them; its answer is :data:`ANSWER`."""


class Exchange:
    """One request and its answer."""

    __slots__ = ("replayed", "scope", "status")

    def __init__(self, method: str, key: str | None = None) -> None:
        headers = [
            (b"host", b"localhost:8000"),
            (b"user-agent", b"bench"),
            (b"accept", b"*/*"),
            (b"authorization", b"Bearer eyJhbGciOiJIUzI1NiJ9.e30.ZRrHA1JJJW8opsbCGfG_HACGpVUMN_a9IV7pAx_Zmeo"),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(BODY)),
        ]
        if key is not None:
            headers.append((b"idempotency-key", key.encode()))
        self.scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": "/orders",
            "raw_path": b"/orders",
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        self.status = 0
        self.replayed = False

    async def receive(self) -> Message:
        """Return the whole body at once, as servers do with a small one."""
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(self, message: Message) -> None:
        """Take the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.replayed = (b"idempotent-replayed", b"true") in message["headers"]

    def check(self, *, replayed: bool) -> None:
        """Raise unless the answer is the expected one."""
        if self.status != 201 or self.replayed is not replayed:
            raise RuntimeError(f"answered {self.status}, replayed: {self.replayed}; expected 201, {replayed}")

"""ASGI requests made by hand, and an application that counts its effects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from idempotency import Operation
from idempotency.stores.base import Store
from idempotency.stores.memory import MemoryStore
from tests.kit import fronts

Pairs = Iterable[tuple[bytes, bytes]]


@dataclass
class Reply:
    """What an application sent."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, message: Any) -> None:
        self.messages.append(dict(message))

    @property
    def start(self) -> dict[str, Any]:
        [start] = [message for message in self.messages if message["type"] == "http.response.start"]
        return start

    @property
    def status(self) -> int:
        status: int = self.start["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.start["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.messages if each["type"] == "http.response.body")

    @property
    def complete(self) -> bool:
        bodies = [message for message in self.messages if message["type"] == "http.response.body"]
        return bool(bodies) and not bodies[-1].get("more_body", False)

    @property
    def replayed(self) -> bool:
        return (b"idempotent-replayed", b"true") in self.headers

    @property
    def code(self) -> str:
        """Return the code of a problem document."""
        assert self.header(b"content-type") == b"application/problem+json"
        code: str = json.loads(self.body)["code"]
        return code

    def header(self, name: bytes) -> bytes | None:
        values = [value for field_name, value in self.headers if field_name == name]
        assert len(values) < 2
        return values[0] if values else None


def http_scope(
    *,
    method: str = "POST",
    path: str = "/orders",
    key: str | bytes | None = None,
    headers: Pairs = (),
    query: bytes = b"",
    **more: Any,
) -> dict[str, Any]:
    """Make the scope of one request; ``key`` is the field's value as it is sent."""
    pairs = list(headers)
    if key is not None:
        pairs.append((b"idempotency-key", key if isinstance(key, bytes) else key.encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "root_path": "",
        "headers": pairs,
        "client": ("127.0.0.1", 4711),
        "server": ("127.0.0.1", 80),
        "state": {},
        **more,
    }


class Client:
    """The server's ``receive``: the body in pieces, then silence until the client is gone."""

    def __init__(self, *chunks: bytes, gone: bool = False) -> None:
        self.messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": place < len(chunks)}
            for place, chunk in enumerate(chunks or (b"",), start=1)
        ]
        self.gone = asyncio.Event()
        if gone:
            self.gone.set()

    async def __call__(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def call(app: Any, *, body: bytes | tuple[bytes, ...] = b"", **request: Any) -> Reply:
    """Make one request and return the answer; ``request`` as in :func:`http_scope`."""
    reply = Reply()
    chunks = body if isinstance(body, tuple) else (body,)
    await app(http_scope(**request), Client(*chunks), reply.send)
    return reply


async def read(receive: Callable[[], Awaitable[Any]]) -> bytes:
    """Read a whole request body."""
    body = b""
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def respond(send: Any, status: int = 201, body: bytes = b"", headers: Pairs = ()) -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


class Effects:
    """An application with an effect per run: it answers with the number of the run.

    ``handler`` is called instead of answering, with ``scope, receive, send`` after the count. ``gate``, once set to an
    event, holds every run until it is set.
    """

    def __init__(self, handler: Callable[..., Awaitable[None]] | None = None, *, status: int = 201) -> None:
        self.handler = handler
        self.status = status
        self.runs = 0
        self.gate: asyncio.Event | None = None
        self.running = asyncio.Event()
        self.bodies: list[bytes] = []
        self.operations: list[Operation | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        number = self.runs
        self.operations.append(scope.get("state", {}).get("idempotency"))
        self.running.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.handler is not None:
            await self.handler(scope, receive, send)
            return
        self.bodies.append(await read(receive))
        body = b'{"run":%d}' % number
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await respond(send, self.status, body, headers)


def protect(app: Any, store: Store | None = None, **options: Any) -> Any:
    """Put the middleware of the test's front end around ``app``, by default on a store of its own."""
    return fronts.protect(app, store if store is not None else MemoryStore(), **options)

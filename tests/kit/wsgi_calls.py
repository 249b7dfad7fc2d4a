"""WSGI requests made by hand, as a server makes them, and an application that counts its effects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from idempotency.stores.memory import MemoryStore
from idempotency.wsgi import IdempotencyMiddleware

Fields = list[tuple[str, str]]


@dataclass
class Answer:
    """What a server would send: ``steps`` are its starts and pieces in order, and ``closed`` at the end."""

    starts: list[tuple[str, Fields]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def start_response(self, status: str, headers: Fields, exc_info: Any = None) -> Any:
        if exc_info is not None and self.pieces:
            raise exc_info[1]
        self.starts.append((status, headers))
        self.steps.append("start")
        return self.write

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        self.steps.append("piece")

    @property
    def status(self) -> int:
        return int(self.starts[-1][0].split()[0])

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.starts[-1][1]}

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def replayed(self) -> bool:
        return self.headers.get("idempotent-replayed") == "true"

    @property
    def code(self) -> str:
        assert self.headers["content-type"] == "application/problem+json"
        code: str = json.loads(self.body)["code"]
        return code


def environ_of(
    path: str = "/orders", *, key: str | None = None, body: bytes = b"", method: str = "POST", **variables: Any
) -> dict[str, Any]:
    """Make the environ of a request; a variable that is None is missing."""
    environ = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "localhost",
        "HTTP_IDEMPOTENCY_KEY": key,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": False,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **variables,
    }
    return {name: value for name, value in environ.items() if value is not None}


def call(app: Any, path: str = "/orders", **request: Any) -> Answer:
    """Make one request, as :func:`environ_of`, and send its response to the end."""
    return run(app, environ_of(path, **request))


def run(app: Any, environ: dict[str, Any]) -> Answer:
    """Run an application as a server does."""
    answer = Answer()
    iterable: Iterable[bytes] = app(environ, answer.start_response)
    try:
        for piece in iterable:
            answer.write(piece)
    finally:
        if hasattr(iterable, "close"):
            iterable.close()
            answer.steps.append("closed")
    return answer


class Effects:
    """An application with an effect per run: it answers with the number of the run, or as ``handler`` does."""

    def __init__(self, handler: Any = None, *, status: str = "201 Created") -> None:
        self.handler = handler
        self.status = status
        self.runs = 0
        self.bodies: list[bytes] = []

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.runs += 1
        if self.handler is not None:
            answer: Iterable[bytes] = self.handler(environ, start_response)
            return answer
        length = int(environ.get("CONTENT_LENGTH") or 0)
        self.bodies.append(environ["wsgi.input"].read(length))
        body = b'{"run":%d}' % self.runs
        start_response(self.status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def protect(app: Any, store: Any = None, **options: Any) -> IdempotencyMiddleware:
    """Put the middleware around ``app``, by default on a store of its own."""
    return IdempotencyMiddleware(app, store=store if store is not None else MemoryStore(), **options)

"""Both front ends under the same tests: requests of ASGI through the middleware for WSGI, to an application of ASGI.

``@pytest.mark.fronts("asgi", "wsgi")`` on a module runs its tests through each of them; on a test, through those named.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request

from idempotency import Policy, asgi, wsgi
from idempotency._http.fingerprint import OfBody

current = "asgi"
"""The front end of the test that runs."""

_threads = ThreadPoolExecutor(64)


def protect(app: Any, store: Any, **options: Any) -> Any:
    """Put the middleware of the current front end around an application of ASGI."""
    if current == "asgi":
        return asgi.IdempotencyMiddleware(app, store=store, **options)
    if callable(options.get("scope")):
        options["scope"] = _of_environ(options["scope"])
    if "policy" in options:
        options["policy"] = _with_environ(options["policy"])
    if "policies" in options:
        options["policies"] = {route: _with_environ(policy) for route, policy in options["policies"].items()}
    return as_asgi(wsgi.IdempotencyMiddleware(as_wsgi(app), store=store, **options))


def _with_environ(policy: Policy | None) -> Policy | None:
    if policy is None or not callable(policy.fingerprint) or isinstance(policy.fingerprint, OfBody):
        return policy
    return replace(policy, fingerprint=_of_environ(policy.fingerprint))


def _of_environ(function: Callable[[Request], Any]) -> Callable[[Any], Any]:
    """Make a function of an environ of one of a Starlette request, which may be async."""

    def call(environ: Any) -> Any:
        async def run() -> Any:
            body = [environ["wsgi.input"].read()]

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body.pop(), "more_body": False}

            value = function(Request(environ["tests.scope"], receive))
            return await value if inspect.isawaitable(value) else value

        return asyncio.run_coroutine_threadsafe(run(), environ["tests.loop"]).result()

    return call


def environ_of(scope: dict[str, Any], body: bytes) -> dict[str, Any]:
    """Make the environ of a request as a server would that knows where the body ends."""
    root = scope["root_path"]
    path = scope["path"].removeprefix(root)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": root.encode().decode("latin-1"),
        "PATH_INFO": path.encode("utf-8", "surrogateescape").decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.input_terminated": True,
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    tls = (scope.get("extensions") or {}).get("tls") or {}
    if tls.get("client_cert_name") or tls.get("client_cert_chain"):
        environ["SSL_CLIENT_VERIFY"] = "SUCCESS"
    for name, value in scope["headers"]:
        variable = name.decode("latin-1").upper().replace("-", "_")
        variable = variable if variable in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{variable}"
        text = value.decode("latin-1")
        environ[variable] = f"{environ[variable]},{text}" if variable in environ else text
    return environ


def as_asgi(app: Any) -> Callable[..., Any]:
    """Make an application of ASGI of one of WSGI, which runs in a thread."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        loop = asyncio.get_running_loop()
        environ = {**environ_of(scope, body), "tests.scope": scope, "tests.loop": loop}
        run = partial(copy_context().run, _run, app, environ, loop, send)
        await loop.run_in_executor(_threads, run)

    return serve


def _run(app: Any, environ: dict[str, Any], loop: asyncio.AbstractEventLoop, send: Any) -> None:
    started: list[tuple[str, list[tuple[str, str]]]] = []
    sent: list[bool] = []

    def put(message: dict[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(send(message), loop).result()

    def write(data: bytes, more: bool = True) -> None:
        if not sent:
            [(status, headers)] = started
            sent.append(True)
            pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            put({"type": "http.response.start", "status": int(status[:3]), "headers": pairs})
        put({"type": "http.response.body", "body": data, "more_body": more})

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if exc_info is not None and sent:
            raise exc_info[1]
        started[:] = [(status, headers)]
        return write

    iterable = app(environ, start_response)
    try:
        for data in iterable:
            write(data)
        write(b"", more=False)
    finally:
        if hasattr(iterable, "close"):
            iterable.close()


def as_wsgi(app: Any) -> Callable[..., Iterator[bytes]]:
    """Make an application of WSGI of one of ASGI, which runs in the loop of the test."""

    def serve(environ: Any, start_response: Any) -> Iterator[bytes]:
        return _Response(app, environ, start_response)

    return serve


class _Response:
    """Run an application from the first iteration on; ``close`` waits for what it does after its response."""

    def __init__(self, app: Any, environ: dict[str, Any], start_response: Any) -> None:
        self._start_response = start_response
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._pieces = self._iterate(app, environ)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    def _iterate(self, app: Any, environ: dict[str, Any]) -> Iterator[bytes]:
        body = [environ["wsgi.input"].read()]
        operation = {"idempotency": environ["idempotency"]} if "idempotency" in environ else {}
        if operation == {"idempotency": None}:
            environ["tests.scope"]["state"].update(operation)
        scope = {**environ["tests.scope"], "state": operation}
        forever = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await forever.wait()
            return {}

        async def send(message: Any) -> None:
            self._messages.put(dict(message))

        async def run() -> None:
            try:
                await app(scope, receive, send)
            finally:
                self._messages.put(None)

        running = asyncio.run_coroutine_threadsafe(run(), environ["tests.loop"])
        try:
            while (message := self._messages.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in message.get("headers", ())]
                    self._start_response(f"{message['status']} Status", headers)
                elif message["type"] == "http.response.body":
                    yield bytes(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        finally:
            running.result()

"""The three clients of ``idempotency.client`` behind one face, and a server that answers as it is asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx
import requests
from requests.adapters import HTTPAdapter

from idempotency import client
from idempotency.client import Call, Retry
from tests.kit.served import served

AT_ONCE = Retry(first=0.0)
"""No pauses but those that the server asks for."""

HTTPX, ASYNC_HTTPX, REQUESTS = KINDS = ("httpx", "httpx-async", "requests")


@dataclass
class Answer:
    """What the server sends."""

    status: int = 201
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    chunked: bool = False
    silent: bool = False
    """Whether nothing is sent until the client gives up."""


@dataclass
class Seen:
    """A request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str | None:
        """Return its key."""
        return self.headers.get("idempotency-key")


class Scripted:
    """An ASGI application that gives the answers it was given, one after another, and 201 after the last."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[Answer] = []
        self.seen: list[Seen] = []

    def script(self, *answers: Answer | int) -> None:
        """Give these answers; a number is one without headers."""
        self.answers = [Answer(each) if isinstance(each, int) else each for each in answers]
        self.seen = []

    @property
    def keys(self) -> list[str | None]:
        """Return the keys of all requests, in order."""
        return [each.key for each in self.seen]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append(Seen(scope["method"], scope["path"], headers, body))
        answer = self.answers.pop(0) if self.answers else Answer()
        if answer.silent:
            await receive()
        pairs = [(name.lower().encode(), value.encode()) for name, value in answer.headers.items()]
        if not answer.chunked:
            pairs.append((b"content-length", b"%d" % len(answer.body)))
        await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer.body})


@contextmanager
def scripted() -> Iterator[Scripted]:
    """Serve a scripted application."""
    app = Scripted()
    with served(app, date_header=False) as app.url:
        yield app


@dataclass
class Got:
    """What a client got."""

    status: int | None
    call: Call | None
    error: Exception | None = None
    content: bytes = b""

    @property
    def attempts(self) -> int:
        """Return how many requests were sent."""
        assert self.call is not None
        return self.call.attempts


class Sender:
    """One of the clients. ``limit``: how many connections it may open."""

    def __init__(self, kind: str, *, limit: int = 10, timeout: float = 10.0, **options: Any) -> None:
        self.kind = kind
        self._limit = limit
        self._timeout = timeout
        self._options: dict[str, Any] = {"retry": AT_ONCE, **options}

    def post(self, *urls: str, **options: Any) -> Got:
        """Send one POST to each URL, on one connection pool, and return what the last of them got."""
        match self.kind:
            case "httpx":
                return self._by_httpx(urls, **options)
            case "httpx-async":
                return asyncio.run(self._by_async_httpx(urls, **options))
            case _:
                return self._by_requests(urls, **options)

    def _by_httpx(self, urls: Iterable[str], **options: Any) -> Got:
        got = Got(None, None)
        transport = httpx.HTTPTransport(limits=httpx.Limits(max_connections=self._limit))
        wrapped = client.IdempotentTransport(transport, **self._options)
        with httpx.Client(transport=wrapped, timeout=self._timeout) as session:
            for url in urls:
                with _named(options, self.kind):
                    try:
                        got = _got(session.request(**_httpx_options(url, **options)))
                    except httpx.HTTPError as error:
                        got = _failed(error)
        return got

    async def _by_async_httpx(self, urls: Iterable[str], **options: Any) -> Got:
        got = Got(None, None)
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=self._limit))
        wrapped = client.AsyncIdempotentTransport(transport, **self._options)
        async with httpx.AsyncClient(transport=wrapped, timeout=self._timeout) as session:
            for url in urls:
                with _named(options, self.kind):
                    try:
                        got = _got(await session.request(**_httpx_options(url, asynchronous=True, **options)))
                    except httpx.HTTPError as error:
                        got = _failed(error)
        return got

    def _by_requests(self, urls: Iterable[str], **options: Any) -> Got:
        got = Got(None, None)
        adapter = HTTPAdapter(pool_maxsize=self._limit, pool_block=True)
        with requests.Session() as session:
            session.trust_env = False
            session.mount("http://", client.IdempotentAdapter(adapter, **self._options))
            for url in urls:
                with _named(options, self.kind):
                    try:
                        response = session.request(**self._requests_options(url, **options))
                    except requests.RequestException as error:
                        got = Got(None, client.call_of(error), error)
                    else:
                        call = client.call_of((response.history or [response])[0])
                        got = Got(response.status_code, call, None, response.content)
        return got

    def _requests_options(
        self, url: str, *, method: str = "POST", body: Any = b"tea", follow: bool = False, **options: Any
    ) -> dict[str, Any]:
        options.pop("name", None)
        body = iter(body) if isinstance(body, list) else body
        return {
            "method": method,
            "url": url,
            "data": body,
            "allow_redirects": follow,
            "timeout": self._timeout,
            **options,
        }


def _named(options: dict[str, Any], kind: str) -> Any:
    name = options.get("name")
    return client.call(name) if kind == REQUESTS and name is not None else nullcontext()


def _httpx_options(
    url: str,
    *,
    method: str = "POST",
    body: Any = b"tea",
    follow: bool = False,
    name: Any = None,
    asynchronous: bool = False,
    **options: Any,
) -> dict[str, Any]:
    if isinstance(body, list):
        body = _parts(body) if asynchronous else iter(body)
    named = {} if name is None else {"extensions": {"idempotency": name}}
    return {"method": method, "url": url, "content": body, "follow_redirects": follow, **named, **options}


async def _parts(body: list[bytes]) -> Any:
    for part in body:
        yield part


def _got(response: httpx.Response) -> Got:
    first = (response.history or [response])[0]
    return Got(response.status_code, first.extensions.get("idempotency"), None, response.content)


def _failed(error: httpx.HTTPError) -> Got:
    return Got(None, error.request.extensions.get("idempotency"), error)

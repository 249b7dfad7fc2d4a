"""The transport for ``httpx.AsyncClient``, and what it shares with the one for ``httpx.Client``. Needs httpx."""

from __future__ import annotations

import ssl
from collections.abc import Collection, MutableMapping
from datetime import timedelta

import httpx

from idempotency.client._answers import Attempts, is_small, pause_asked
from idempotency.client._call import DAY, HEADER_NAME, METHODS, Call, Keys
from idempotency.client._repeat import repeat
from idempotency.client._stored import begin
from idempotency.client.options import RETRY, Retry, check_retry
from idempotency.stores.base import Store, check_store

EXTENSION = "idempotency"
FAILURES = (
    httpx.NetworkError,
    httpx.ConnectTimeout,
    httpx.ReadTimeout,
    httpx.WriteTimeout,
    httpx.RemoteProtocolError,
)
"""The errors after which the same request is sent again: whether it had an effect is not known."""


class AsyncIdempotentTransport(httpx.AsyncBaseTransport):
    """Send one idempotency key with each logical call of an ``httpx.AsyncClient``, and the same with each retry.

    See :class:`IdempotentTransport`, whose options these are; ``store`` is one that is awaited.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        retry: Retry = RETRY,
        methods: Collection[str] = METHODS,
        header_name: str = HEADER_NAME,
        quoted: bool = False,
        store: Store | None = None,
        ttl: float | timedelta = DAY,
    ) -> None:
        self._keys = Keys(methods=methods, header_name=header_name, quoted=quoted, store=store, ttl=ttl)
        self._retry = check_retry(retry)
        self._store = None if store is None else check_store(store, Store)
        self._transport = httpx.AsyncHTTPTransport() if transport is None else transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request, and send it again where that is of use."""
        outgoing = HttpxRequest(request)
        call = await begin(self._keys, self._store, outgoing)
        if call is None:
            return await self._transport.handle_async_request(request)

        async def send() -> httpx.Response:
            return await _read(await self._transport.handle_async_request(outgoing.sent))

        attempts = Attempts(self._retry, repeatable=is_repeatable(request))
        response = await repeat(call, attempts, send, FAILURES, is_untrusted, pause_of)
        response.extensions[EXTENSION] = call
        return response

    async def aclose(self) -> None:
        """Close the transport that is wrapped, and not the store."""
        await self._transport.aclose()


async def _read(response: httpx.Response) -> httpx.Response:
    if not is_small(response.headers):
        return response
    assert isinstance(response.stream, httpx.AsyncByteStream)
    body = bytearray()
    try:
        async for part in response.stream:
            body += part
    finally:
        await response.aclose()
    return whole(response, bytes(body))


class HttpxRequest:
    """A request of httpx, as the keys see it. ``sent``: the request that is sent, with the key."""

    def __init__(self, request: httpx.Request) -> None:
        self._request = request
        self.sent = request

    @property
    def method(self) -> str:
        """Return the method."""
        return self._request.method

    @property
    def url(self) -> str:
        """Return the URL."""
        return str(self._request.url)

    @property
    def headers(self) -> MutableMapping[str, str]:
        """Return the headers."""
        return self._request.headers

    def given(self, header_name: str) -> str | None:
        """Return the key that the caller has set, or None."""
        value: str | None = self._request.headers.get(header_name)
        return value

    @property
    def body(self) -> bytes | None:
        """Return the body; None if it cannot be sent twice."""
        return self._request.content if is_repeatable(self._request) else None

    @property
    def named(self) -> object:
        """Return the name that the request itself has, or None."""
        return self._request.extensions.get(EXTENSION)

    @property
    def call(self) -> Call | None:
        """Return the call that the request is already part of."""
        return self.named if isinstance(self.named, Call) else None

    def set_key(self, header_name: str, key: str, call: Call) -> None:
        """See :class:`Outgoing`. The client copies headers and extensions into the request of a redirect."""
        request = self._request
        request.headers.pop(header_name, None)
        # Not written into the given dictionary, which may be that of several requests.
        request.extensions = {**request.extensions, EXTENSION: call}
        headers = request.headers.copy()
        headers[header_name] = key
        self.sent = httpx.Request(
            request.method, request.url, headers=headers, stream=request.stream, extensions=request.extensions
        )


def is_repeatable(request: httpx.Request) -> bool:
    """Return whether the body is bytes, and not a stream, which may be consumed by the first attempt."""
    return isinstance(request.stream, httpx.ByteStream)


def is_untrusted(error: BaseException | None) -> bool:
    """Return whether the certificate of the server was refused, as it will be again."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def whole(response: httpx.Response, body: bytes) -> httpx.Response:
    """Return the response with the body that was read, in its content coding."""
    return httpx.Response(
        response.status_code,
        headers=response.headers,
        stream=httpx.ByteStream(body),
        extensions=response.extensions,
    )


def pause_of(response: httpx.Response) -> float | None:
    """Return the seconds that a response asks to wait; None if a retry is of no use."""
    return pause_asked(response.status_code, response.headers, _body_of(response))


def _body_of(response: httpx.Response) -> bytes:
    if response.status_code < 400 or not isinstance(response.stream, httpx.ByteStream):
        return b""
    copy = httpx.Response(response.status_code, headers=response.headers, stream=response.stream)
    try:
        return copy.read()
    except httpx.DecodingError:
        return b""

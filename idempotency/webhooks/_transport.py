"""Connect to addresses that were checked, and to no others. Needs httpx."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpcore
import httpx

from idempotency.webhooks._addresses import AddressCheck, resolve


class CheckedTransport(httpx.AsyncBaseTransport):
    """The transport of an ``httpx.AsyncClient`` that connects to the very addresses which ``check`` approved.

    The name is looked up once for each connection, so no other answer can come between check and connection. The
    certificate is still compared with the name. Errors of a connection are those of httpcore.
    """

    def __init__(self, check: AddressCheck, connections: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=connections,
            keepalive_expiry=5.0,
            network_backend=_CheckedBackend(check),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request."""
        assert isinstance(request.stream, httpx.AsyncByteStream)
        url = request.url
        response = await self._pool.handle_async_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(response.status, headers=response.headers, stream=_Stream(response))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


class _Stream(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._response.aiter_stream():
            yield part

    async def aclose(self) -> None:
        await self._response.aclose()


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    def __init__(self, check: AddressCheck) -> None:
        self._check = check
        # Its type is not known where anyio may be missing.
        self._backend: Any = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await resolve(host, port, self._check)
        each = None if timeout is None else timeout / len(addresses)
        while True:
            try:
                stream: httpcore.AsyncNetworkStream = await self._backend.connect_tcp(
                    addresses[0], port, each, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                del addresses[0]
                if not addresses:
                    raise
            else:
                return stream

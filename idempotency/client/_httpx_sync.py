"""The transport for ``httpx.Client``. Needs httpx."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

import httpx

from idempotency.client._answers import Attempts, is_small
from idempotency.client._call import DAY, HEADER_NAME, METHODS, Keys
from idempotency.client._httpx import (
    EXTENSION,
    FAILURES,
    HttpxRequest,
    is_repeatable,
    is_untrusted,
    pause_of,
    whole,
)
from idempotency.client._repeat_sync import repeat_sync
from idempotency.client._stored_sync import begin_sync
from idempotency.client.options import RETRY, Retry, check_retry
from idempotency.stores.base import SyncStore, check_store


class IdempotentTransport(httpx.BaseTransport):
    """Send one idempotency key with each logical call of an ``httpx.Client``, and the same with each retry.

    Use it only for servers that honour the key: on any other one, a retried POST takes effect twice.

    ``transport``: the transport that is wrapped, default ``httpx.HTTPTransport()``. It has the options of connections,
    such as ``verify=``, and is closed with this one.
    ``retry``: a :class:`Retry`, default ``Retry()``. Sent again are requests with a key whose body is bytes: after an
    error or time-out of the connection, after 408, 429, 502, 503, 504, after a 409 that says that the first one is in
    progress, and after what the server says is worth it. Every other answer is returned. A body that is a stream is
    sent once, since it may be consumed.
    ``methods``: the methods that get a key, default POST and PATCH. A key that the request has already is sent as it
    is, with any method, and a request that has a name itself gets its key with any method.
    ``header_name``: the header, default ``Idempotency-Key``. ``quoted``: whether a key is sent as a String of RFC 9651,
    in quotes; default False.
    ``store``: where the keys of named calls are, so that another process sends the same; see :func:`call`. It is not
    closed. Default None. ``ttl``: how long the key of a name is stored, in seconds or a ``timedelta``; default a day.

    A request is named by ``extensions={"idempotency": "invoice-7"}``, or by :func:`call`. The response and, after an
    error, ``error.request`` have a :class:`Call` as ``.extensions["idempotency"]``.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work. A named call raises, before anything is
    sent, :class:`~idempotency.errors.KeyReusedError` if its name is that of another request,
    :class:`~idempotency.errors.UnreadableError` and :class:`~idempotency.errors.StoreError`.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        retry: Retry = RETRY,
        methods: Collection[str] = METHODS,
        header_name: str = HEADER_NAME,
        quoted: bool = False,
        store: SyncStore | None = None,
        ttl: float | timedelta = DAY,
    ) -> None:
        self._keys = Keys(methods=methods, header_name=header_name, quoted=quoted, store=store, ttl=ttl)
        self._retry = check_retry(retry)
        self._store = None if store is None else check_store(store, SyncStore)
        self._transport = httpx.HTTPTransport() if transport is None else transport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request, and send it again where that is of use."""
        outgoing = HttpxRequest(request)
        call = begin_sync(self._keys, self._store, outgoing)
        if call is None:
            return self._transport.handle_request(request)

        def send() -> httpx.Response:
            return _read(self._transport.handle_request(outgoing.sent))

        attempts = Attempts(self._retry, repeatable=is_repeatable(request))
        response = repeat_sync(call, attempts, send, FAILURES, is_untrusted, pause_of)
        response.extensions[EXTENSION] = call
        return response

    def close(self) -> None:
        """Close the transport that is wrapped, and not the store."""
        self._transport.close()


def _read(response: httpx.Response) -> httpx.Response:
    if not is_small(response.headers):
        return response
    assert isinstance(response.stream, httpx.SyncByteStream)
    body = bytearray()
    try:
        for part in response.stream:
            body += part
    finally:
        response.close()
    return whole(response, bytes(body))

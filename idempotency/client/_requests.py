"""The adapter for ``requests.Session``. Needs requests."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from datetime import timedelta
from typing import Any

import requests
from requests.adapters import BaseAdapter, HTTPAdapter

from idempotency.client._answers import Attempts, is_small, pause_asked
from idempotency.client._call import DAY, HEADER_NAME, METHODS, Call, Keys
from idempotency.client._repeat_sync import repeat_sync
from idempotency.client._stored_sync import begin_sync
from idempotency.client.options import RETRY, Retry, check_retry
from idempotency.stores.base import SyncStore, check_store

_FAILURES = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

_CALL = "idempotency"
"""Where the hooks of a request have its call: its copies, such as that for a redirect, have the same hooks."""


class IdempotentAdapter(BaseAdapter):
    """Send one idempotency key with each logical call of a ``requests.Session``, and the same with each retry.

    Mount it for servers that honour the key, and for no others: there a retried POST takes effect twice.

    ``adapter``: the adapter that is wrapped, default ``HTTPAdapter()``; it is closed with this one. The other options
    are those of :class:`IdempotentTransport`. A request is named by :func:`call`, and :func:`call_of` tells what was
    sent. Without ``timeout=``, requests waits for ever, also here.
    """

    def __init__(
        self,
        adapter: BaseAdapter | None = None,
        *,
        retry: Retry = RETRY,
        methods: Collection[str] = METHODS,
        header_name: str = HEADER_NAME,
        quoted: bool = False,
        store: SyncStore | None = None,
        ttl: float | timedelta = DAY,
    ) -> None:
        super().__init__()
        self._keys = Keys(methods=methods, header_name=header_name, quoted=quoted, store=store, ttl=ttl)
        self._retry = check_retry(retry)
        self._store = None if store is None else check_store(store, SyncStore)
        self._adapter = HTTPAdapter() if adapter is None else adapter

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send one request, and send it again where that is of use."""
        options = {"stream": stream, "timeout": timeout, "verify": verify, "cert": cert, "proxies": proxies}
        outgoing = _Prepared(request)
        call = begin_sync(self._keys, self._store, outgoing)
        if call is None:
            return self._adapter.send(request, **options)

        def send() -> requests.Response:
            return _read(self._adapter.send(outgoing.sent, **options), request, stream)

        def pause_of(response: requests.Response) -> float | None:
            body = response.content if _is_read(response, stream) else b""
            return pause_asked(response.status_code, response.headers, body)

        attempts = Attempts(self._retry, repeatable=_body_of(request) is not None)
        response = repeat_sync(call, attempts, send, _FAILURES, _is_lasting, pause_of)
        # By this, Digest authentication sends its second request.
        response.connection = self  # type: ignore[assignment]
        return response

    def close(self) -> None:
        """Close the adapter that is wrapped, and not the store."""
        self._adapter.close()


def call_of(sent: requests.Response | requests.RequestException) -> Call | None:
    """Return the call that a response, or an error, is the end of; None if its request has no key of a call."""
    request = sent.request
    return None if request is None else _call_in(request)


class _Prepared:
    """A request of requests, as the keys see it. ``sent``: the request that is sent, with the key."""

    named = None

    def __init__(self, request: requests.PreparedRequest) -> None:
        self._request = request
        self.sent = request

    @property
    def method(self) -> str:
        return self._request.method or ""

    @property
    def url(self) -> str:
        return self._request.url or ""

    @property
    def headers(self) -> MutableMapping[str, Any]:
        return self._request.headers

    def given(self, header_name: str) -> str | None:
        value: object = self._request.headers.get(header_name)
        return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else None

    @property
    def body(self) -> bytes | None:
        return _body_of(self._request)

    @property
    def call(self) -> Call | None:
        return _call_in(self._request)

    def set_key(self, header_name: str, key: str, call: Call) -> None:
        hooks: dict[str, Any] = self._request.hooks
        hooks[_CALL] = call
        self._request.headers.pop(header_name, None)
        self.sent = self._request.copy()
        self.sent.headers[header_name] = key


def _is_lasting(error: Exception) -> bool:
    """Return whether another attempt does not change the error."""
    return isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError)


def _call_in(request: requests.PreparedRequest | requests.Request) -> Call | None:
    found: object = request.hooks.get(_CALL)
    return found if isinstance(found, Call) else None


def _body_of(request: requests.PreparedRequest) -> bytes | None:
    """Return the body; None if it is a stream, which may be consumed by the first attempt."""
    body: object = request.body
    if body is None:
        return b""
    if isinstance(body, str):
        return body.encode()
    return body if isinstance(body, bytes) else None


def _is_read(response: requests.Response, stream: bool) -> bool:
    """Return whether the body is read before the response is returned."""
    return not stream or (response.status_code >= 400 and is_small(response.headers))


def _read(response: requests.Response, request: requests.PreparedRequest, stream: bool) -> requests.Response:
    if _is_read(response, stream):
        try:
            _ = response.content
        except requests.RequestException as error:
            error.request = request
            response.close()
            raise
    return response

"""Send the outbox as webhooks, as Standard Webhooks 1.0 says: signed, retried, and to public addresses only.

Needs ``asgi-idempotency[webhooks]``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from idempotency._durations import positive
from idempotency._hooks import check_callable
from idempotency._http.error_hook import FIELD_NAME, FRAMING
from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Refused, RetryLater, Sent, in_chains
from idempotency.webhooks._addresses import Address, AddressCheck, AddressRefusedError, checked_networks, is_public
from idempotency.webhooks._transport import CheckedTransport
from idempotency.webhooks.endpoint import Endpoint
from idempotency.webhooks.schedule import PAUSES
from idempotency.webhooks.signature import signed_headers

EndpointOf = Callable[[Message], Endpoint | str | None | Awaitable[Endpoint | str | None]]
OnGone = Callable[[Endpoint], object]

_LONGEST_WAIT = max(PAUSES)
"""Seconds: no receiver can keep a message waiting for longer with one Retry-After."""

_MOST_OF_ANSWER = 1 << 16
"""Bytes of an answer that are read, so that its connection can be used again. Nothing of them is looked at."""

_OUT_OF_TIME = RetryLater("the time of its batch was over", held=True)

_logger = logging.getLogger("idempotency")


class WebhookPublisher:
    """Publish each message as one webhook.

    ``endpoint``: where a message goes: an :class:`~idempotency.webhooks.Endpoint`, a URL, or a function, sync or async,
    that is given the message and returns one of these, or None: then nobody wants it, and it counts as sent. A message
    goes to one endpoint. Emit one message for each endpoint where there are several.
    ``secrets``: what webhooks to a URL are signed with.
    ``on_gone``: is given an endpoint, sync or async, that answers 410: it wants no more webhooks.
    ``allow``: networks whose addresses may be connected to besides public ones, such as ``["10.1.0.0/16"]``.
    ``address_check``: returns whether an address may be connected to. Default: whether it is public.
    ``timeout``: seconds for one attempt, from the first name lookup to the status. Default 15.
    ``concurrency``: how many webhooks are under way at once. Default 50.
    ``client``: an ``httpx.AsyncClient`` of yours, as for a proxy. It is not closed, and its addresses are not checked:
    that is then the proxy's task.

    The answers: 2xx is sent. 410 is refused. Everything else, and no answer, is retried, after ``Retry-After`` if the
    endpoint says so. A redirect is not followed. An address that must not be connected to is refused.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything that cannot work.
    """

    limits = Limits(tombstones=False)

    def __init__(
        self,
        endpoint: EndpointOf | Endpoint | str,
        *,
        secrets: Sequence[str] = (),
        on_gone: OnGone | None = None,
        allow: Iterable[str] = (),
        address_check: AddressCheck = is_public,
        timeout: float = 15.0,
        concurrency: int = 50,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        if client is not None and (tuple(allow) or address_check is not is_public):
            raise ConfigurationError("allow and address_check do not apply to a client that is passed in")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ConfigurationError(f"concurrency must be a number from 1, not {concurrency!r}")
        check_callable("address_check", address_check)
        self._secrets = secrets
        fixed = None if callable(endpoint) else self._endpoint(endpoint)
        self._endpoint_of: EndpointOf = endpoint if callable(endpoint) else lambda message: fixed
        self._on_gone = on_gone
        self._timeout = positive("timeout", timeout)
        self._free = asyncio.Semaphore(concurrency)
        self._own = None if client is not None else _client(allow, address_check, concurrency)
        self._client = client or self._own

"""Send the outbox as webhooks, as Standard Webhooks 1.0 says: signed, in order per key, to public addresses only.

    def endpoint_of(message: Message) -> Endpoint | None: ...

    relay = PollingRelay(engine, WebhookPublisher(endpoint_of), lease=60, backoff=standard_webhooks_schedule)

``webhook-id`` is the id of the message, at every attempt. The headers are ``id``, ``eventType`` and the message's own,
beside those of the signature. Needs ``asgi-idempotency[webhooks]``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from idempotency._durations import DAY, positive
from idempotency._hooks import check_callable
from idempotency._http.error_hook import FIELD_NAME, FRAMING
from idempotency._outbox.message import NO_HEADERS, Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Refused, RetryLater, Sent, in_chains
from idempotency.outbox.publishers._brokers import WEBHOOK
from idempotency.outbox.publishers._cloudevents import DEFAULT_SOURCE, Format, headers_for
from idempotency.outbox.publishers._webhook_answers import THROTTLING, outcome_of
from idempotency.outbox.publishers._webhook_pauses import Pauses
from idempotency.webhooks._addresses import AddressCheck, AddressRefusedError, allowing, is_public
from idempotency.webhooks._transport import CheckedTransport
from idempotency.webhooks.endpoint import Endpoint
from idempotency.webhooks.schedule import PAUSES
from idempotency.webhooks.signature import signed_headers

Destination = Endpoint | str | None
EndpointOf = Callable[[Message], Destination | Awaitable[Destination]]
OnGone = Callable[[Endpoint], object]

SECRETS = "IDEMPOTENCY_WEBHOOK_SECRETS"
"""The variable of the environment with the secrets of a publisher that is made by its URL, separated by spaces."""

OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "allow": lambda text: text.split(","),
    "concurrency": int,
    "delivery_timeout": float,
    "format": str,
    "source": str,
}
CLIENT_OPTIONS: frozenset[str] = frozenset()

_MOST_OF_ANSWER = 1 << 16
"""Bytes of an answer that are read, so that its connection can be used again. Nothing looks at them."""

_DEFAULTS = {"content-type": "application/json", "accept-encoding": "identity"}

_OUT_OF_TIME = RetryLater("the time of its batch was over", held=True)

_logger = logging.getLogger("idempotency")

_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")


class _UnsendableError(Exception):
    """A message can never be a webhook; the text says why."""


class WebhookPublisher:
    """Publish each message as one webhook.

    ``endpoint``: where a message goes: an :class:`~idempotency.webhooks.Endpoint`, a URL, or a function, sync or async,
    that is given the message and returns one of these, or None: nobody wants it, and it counts as sent. Where several
    want it, emit a message for each.
    ``secrets``: what webhooks to a URL are signed with.
    ``on_gone``: is given an endpoint that answered 410 and wants no more webhooks. It may be async, and is brief: it is
    cancelled after a second.
    ``delivery_timeout``: seconds after which a batch is given up. Default 30. One attempt may take half of it.
    ``concurrency``: how many webhooks, of different keys, are sent at a time. Default 50.
    ``allow``: networks that may be connected to besides public addresses, such as ``["10.1.0.0/16"]``.
    ``address_check``: returns whether an address may be connected to. Default: whether it is public.
    ``format``: ``"cloudevents"`` adds the attributes of CloudEvents as headers ``ce-...``, with ``source``.
    ``client``: an ``httpx.AsyncClient`` of yours, such as one with a proxy. It is not closed here, and its addresses
    are not checked: that is then the task of the proxy.

    2xx is sent. 410 is refused, as is an address that must not be connected to. Any other answer, and none, is retried,
    after ``Retry-After`` if there is one. Redirects are not followed. After 429, 502, 503, 504 and no answer, other
    messages to that endpoint are retried later too, without being sent.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    limits = WEBHOOK

    def __init__(
        self,
        endpoint: EndpointOf | Endpoint | str,
        *,
        secrets: Sequence[str] = (),
        on_gone: OnGone | None = None,
        delivery_timeout: float = 15.0,
        concurrency: int = 50,
        allow: Iterable[str] = (),
        address_check: AddressCheck = is_public,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ConfigurationError(f"concurrency must be at least 1, not {concurrency!r}")
        check_callable("address_check", address_check)
        if on_gone is not None and not callable(on_gone):
            raise ConfigurationError(f"on_gone must be a function, not {on_gone!r}")
        check = allowing(allow, address_check)
        if client is not None and check is not is_public:
            raise ConfigurationError("allow and address_check have no effect on a client that is passed in")
        self.delivery_timeout = positive("delivery_timeout", delivery_timeout, DAY)
        # A batch must end in time: an attempt that begins last, the rest of its answer, and the hook.
        self._starting, self._attempt, self._ending = (self.delivery_timeout * part for part in (0.4, 0.5, 0.04))
        self._secrets = secrets
        self._endpoint = endpoint if callable(endpoint) else self._read(endpoint)
        self._on_gone = on_gone
        self._headers = headers_for(format, source, "ce-")
        self._pauses = Pauses()
        self._free = asyncio.Semaphore(concurrency)
        self._client = client or _client(check, concurrency)
        self._is_own = client is None
        self._closed = False

    async def publish(self, batch: Sequence[Message], /) -> Sequence[Outcome]:
        """Send the messages, and return one outcome for each."""
        if self._closed:
            raise RuntimeError("the publisher is closed")
        clock = asyncio.get_running_loop().time
        last_start = clock() + self._starting

        async def send(message: Message) -> Outcome:
            async with self._free:
                return await self._send(message) if clock() < last_start else _OUT_OF_TIME

        return await in_chains(batch, send)

    async def aclose(self) -> None:
        """Close the connections that were made here."""
        self._closed = True
        if self._is_own:
            await self._client.aclose()

    async def _send(self, message: Message) -> Outcome:
        refusal = self.limits.refusal(message)
        if refusal is not None:
            return Refused(refusal)
        endpoint = None
        try:
            async with asyncio.timeout(self._attempt):
                endpoint = await self._endpoint_of(message)
                if endpoint is None:
                    return Sent()
                if pause := self._pauses.remaining(endpoint.url):
                    return RetryLater("the endpoint has a pause, after another message", after=pause)
                request = self._request(endpoint, message)
                response = await self._client.send(request, stream=True, follow_redirects=False)
        except TimeoutError:
            if endpoint is not None:
                self._pauses.pause(endpoint.url, self._attempt)
            return RetryLater(f"no answer in {self._attempt:g} s")
        except (AddressRefusedError, _UnsendableError, ConfigurationError) as error:
            return Refused(str(error))
        await _finish(response, self._ending)
        outcome = outcome_of(response.status_code, response.headers.get("retry-after"), time.time())
        if response.status_code in THROTTLING and isinstance(outcome, RetryLater):
            self._pauses.pause(endpoint.url, PAUSES[0] if outcome.after is None else outcome.after)
        if isinstance(outcome, Refused):
            await self._tell_gone(endpoint)
        return outcome

    async def _endpoint_of(self, message: Message) -> Endpoint | None:
        if isinstance(self._endpoint, Endpoint):
            return self._endpoint
        found = self._endpoint(message)
        destination = await found if inspect.isawaitable(found) else found
        return None if destination is None else self._read(destination)

    def _read(self, destination: Endpoint | str) -> Endpoint:
        return destination if isinstance(destination, Endpoint) else Endpoint(destination, self._secrets)

    def _request(self, endpoint: Endpoint, message: Message) -> httpx.Request:
        body = message.payload or b""
        try:
            signed = signed_headers(message.id, body, endpoint.signers, time.time())
        except ValueError as error:
            raise _UnsendableError(str(error)) from error
        # A field of the message never replaces one of ours, in whatever case its name is written.
        ours = _fields(self._headers(replace(message, headers=NO_HEADERS)))
        headers = _DEFAULTS | _fields(message.headers) | ours | signed
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        return self._client.build_request(
            "POST", _parsed(endpoint.url), content=body, headers=pairs, timeout=httpx.Timeout(self._attempt)
        )

    async def _tell_gone(self, endpoint: Endpoint) -> None:
        if self._on_gone is None:
            return
        try:
            async with asyncio.timeout(self._ending):
                done = self._on_gone(endpoint)
                if inspect.isawaitable(done):
                    await done
        except Exception:
            _logger.exception("the hook on_gone failed")


def from_url(url: str, options: Mapping[str, Any], /) -> WebhookPublisher:
    """Make a publisher with the options of a URL's query, and the secrets of the environment."""
    secrets = os.environ.get(SECRETS, "").split()
    if not secrets:
        raise ConfigurationError(f"{SECRETS} in the environment must have the secrets, with spaces between them")
    return WebhookPublisher(url, secrets=secrets, **options)


def _client(check: AddressCheck, connections: int) -> httpx.AsyncClient:
    # Endpoints set no cookies, and what the environment says of proxies and passwords is not for them.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    return httpx.AsyncClient(transport=CheckedTransport(check, connections), cookies=no_cookies, trust_env=False)


def _parsed(text: str) -> httpx.URL:
    """Parse the URL of an endpoint as the client does, which is stricter about its host than an endpoint is."""
    try:
        url = httpx.URL(text)
        # Only here is a host in Punycode decoded, and encoded again.
        return url.copy_with(host=url.host)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _UnsendableError("the URL of its endpoint has a malformed host") from error


def _fields(headers: Mapping[str, str]) -> dict[str, str]:
    """Return header fields with their names in lower case; refuse what HTTP cannot carry, or reserves for itself."""
    for name, value in headers.items():
        if not FIELD_NAME.fullmatch(name) or name.lower() in FRAMING or name.lower() == "host":
            raise _UnsendableError("it has a header whose name HTTP cannot carry, or reserves for itself")
        if not _VALUE.fullmatch(value):
            raise _UnsendableError("it has a header with control characters")
    return {name.lower(): value for name, value in headers.items()}


async def _finish(response: httpx.Response, longest: float) -> None:
    """Read the rest of an answer, if it is short and comes within ``longest`` seconds, and throw it away."""
    size = 0
    try:
        with suppress(Exception):
            async with asyncio.timeout(longest):
                async for part in response.aiter_raw():
                    size += len(part)
                    if size > _MOST_OF_ANSWER:
                        break
    finally:
        with suppress(Exception):
            await response.aclose()

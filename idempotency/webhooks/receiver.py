"""Receive webhooks: verify each, then let it take effect once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from idempotency._durations import positive
from idempotency._http.body import BodyReceive, DisconnectedError, Receive, Send
from idempotency._http.caller import KnownCaller, sender_scope
from idempotency._http.capture import send_response
from idempotency._http.problem import check_docs, describe, problem_response
from idempotency._http.routes import Routes, route_path
from idempotency._http.state import mapping_of
from idempotency.asgi import IdempotencyMiddleware
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    RequestTooLargeError,
    WebhookUnverifiedError,
)
from idempotency.events import OTHER, EventHooks, OnEvent, emit_event
from idempotency.policy import Policy
from idempotency.stores.base import Store
from idempotency.webhooks._secrets import verifiers
from idempotency.webhooks.signature import ID, TOLERANCE, Webhook, read_claimed

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

Scope = MutableMapping[str, Any]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

WEBHOOKS = Policy(
    ttl=7 * 86400,
    required=True,
    methods={"POST"},
    # A sender takes every answer but 2xx for a failure and sends the webhook again: its handler must run again then.
    outcomes={"3xx": "release", "4xx": "release", "5xx": "release"},
    max_request=1 << 20,
    key_per_path=True,
)
"""The policy of received webhooks. Senders repeat for three days or more, so an id is known for seven."""

SPECIFICATION = "https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"

_MOST_IN_MEMORY = 16 << 20

_NOTHING = Policy(methods=frozenset())

_CHALLENGE = (b"www-authenticate", b"StandardWebhooks")
"""What RFC 9110 section 15.5.2 requires of a 401."""


class WebhookReceiver:
    """Verify the webhooks of one sender, as Standard Webhooks 1.0 says, and make each take effect once.

    A webhook that was taken before is answered like the first time, and the application does not see it again. What it
    does see has ``request.state.webhook``, a :class:`~idempotency.webhooks.Webhook`, and the operation as in
    :class:`~idempotency.IdempotencyMiddleware`, whose key is ``webhook-id``. Each other request is answered with a
    problem document: 400 if a header is missing or malformed, 401 if no signature is right or the timestamp is not
    near, 413 if the body is too large.

    ``secrets``: ``whsec_``, or ``whpk_`` (ed25519). Any one is enough, so that the sender can rotate.
    ``store``, ``session``, ``docs``, ``on_event``: as :class:`~idempotency.IdempotencyMiddleware` has them.
    ``sender``: a name for the sender. The ids of two names never meet. Give each sender of one path its own.
    ``path``: which requests are webhooks, ``"/webhooks/shop"`` or ``"/webhooks/{account}"`` as ``app`` sees its paths;
    the same with more slashes is meant too. Whatever their method, they must be signed. Other requests go to ``app`` as
    they are. Default None: every request.
    ``policy``: default :data:`WEBHOOKS`; ``dataclasses.replace`` changes a part of it. A body is in memory before it is
    verified, so ``max_request`` is at most 16 MiB.
    ``tolerance``: by how many seconds a timestamp may differ from the clock of this machine. Default 300.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything that cannot work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        secrets: Sequence[str],
        store: Store | str,
        sender: str = "",
        path: str | None = None,
        policy: Policy = WEBHOOKS,
        session: async_sessionmaker[AsyncSession] | None = None,
        tolerance: float = TOLERANCE,
        docs: str = SPECIFICATION,
        on_event: OnEvent = (),
    ) -> None:
        if not isinstance(sender, str):
            raise ConfigurationError(f"sender must be text, not {sender!r}")
        if not isinstance(policy, Policy) or policy.max_request > _MOST_IN_MEMORY:
            raise ConfigurationError("policy must be a Policy whose max_request is at most 16 MiB, such as WEBHOOKS")
        self.app = app
        self._secrets = verifiers(secrets)
        self._tolerance = positive("tolerance", tolerance)
        self._docs = check_docs(docs)
        self._hooks = EventHooks(on_event)
        self._route = f"POST {OTHER if path is None else path}"
        self._routes = Routes(_NOTHING if path is not None else WEBHOOKS, {} if path is None else {_post(path): policy})
        self._protected = IdempotencyMiddleware(
            app,
            store=store,
            policy=policy,
            session=session,
            scope=KnownCaller(sender_scope(sender)),
            header_name=ID,
            docs=docs,
            on_event=on_event,
        )
        self._max_body = policy.max_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._protected(scope, receive, send)
        elif scope["type"] == "http" and self._is_webhook(scope):
            await self._receive(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_webhook(self, scope: Scope) -> bool:
        # Some frameworks take the same path with more slashes for the same route: it must not pass unverified.
        return self._routes.policy_for("POST", _without_extra_slashes(route_path(scope))) is not None

    async def _receive(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"] = list(scope["headers"])
        try:
            claimed = read_claimed(headers, now=None, tolerance=self._tolerance)
            body = await _read(receive, self._max_body)
            webhook = claimed.verify(body, self._secrets)
        except (WebhookUnverifiedError, RequestTooLargeError) as error:
            await self._refuse(scope, send, error)
        except DisconnectedError:
            pass
        else:
            await self._protected(_with_webhook(scope, webhook), BodyReceive(body, receive), send)

    async def _refuse(self, scope: Scope, send: Send, error: IdempotencyError) -> None:
        emit_event(self._hooks, "refused", f"{scope['method']} {scope['path']}", error=error, route=self._route)
        response = problem_response(describe(error, docs=self._docs))
        if error.status == 401:
            response = replace(response, headers=[*response.headers, _CHALLENGE])
        await send_response(send, response)


def _post(path: str) -> str:
    if not isinstance(path, str) or not path.startswith("/"):
        raise ConfigurationError(f'path must be the path of webhooks, such as "/webhooks/shop", not {path!r}')
    return f"POST {_without_extra_slashes(path)}"


def _without_extra_slashes(path: str) -> str:
    return "/" + "/".join(filter(None, path.split("/")))


def _with_webhook(scope: Scope, webhook: Webhook) -> Scope:
    # Some servers share one state among requests.
    return {**scope, "state": {**mapping_of(scope.get("state")), "webhook": webhook}}


async def _read(receive: Receive, limit: int) -> bytes:
    """Read a whole request body into memory, at most ``limit`` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise DisconnectedError
        body += message.get("body", b"")
        if len(body) > limit:
            raise RequestTooLargeError(f"The body of a webhook may have {limit} bytes.")
        if not message.get("more_body", False):
            return bytes(body)

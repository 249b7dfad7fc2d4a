"""What the middleware reads of a request before anything runs: its key, its caller, its body and its fingerprint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from idempotency._http.body import Body, Receive, Send, read_body
from idempotency._http.caller import ANONYMOUS, Credentials, KnownCaller, scope_text
from idempotency._http.fingerprint import aside, json_digest, value_digest
from idempotency._http.head import Head
from idempotency._http.key import send_with_key
from idempotency._http.options import CallerScope, Options
from idempotency._http.state import RequestState
from idempotency._rules import Claim
from idempotency.errors import BodyInvalidError
from idempotency.policy import Fingerprint, Policy

if TYPE_CHECKING:
    from starlette.requests import Request


NAMING = (Credentials, KnownCaller)
"""What names a caller by itself, without a function of the user."""


class AnsweredError(Exception):
    """A function of the user raised ``error``, and the application's answer to it is sent."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class KeyedRequest(Head):
    """One request that has a key, or needs one, as it is read. It answers nothing, except for a function of the user.

    ``keys`` are the values of the field with the key. ``send`` is the server's, or the one that puts the key into each
    response.
    """

    __slots__ = ("_app", "_body", "_receive", "send")

    def __init__(
        self,
        app: object,
        options: Options,
        policy: Policy,
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
        keys: Sequence[bytes],
    ) -> None:
        super().__init__(options, policy, scope, keys)
        self._app = app
        self._receive = receive
        self.send = send
        if options.echo_key:
            self.send = send_with_key(send, keys, options.header_name, strict=options.strict)
        self._body: Body | None = None

    async def claim(self, key: str, route: str) -> Claim:
        """Read the caller and the body, and return the claim for ``key``. Call it once; :meth:`close` the request then.

        ``route`` is the name of the operation in the record.

        Raises :class:`~idempotency.errors.CallerUnknownError`, :class:`~idempotency.errors.RequestTooLargeError`,
        :class:`~idempotency.errors.BodyInvalidError`, :class:`DisconnectedError`, and :class:`AnsweredError` for an
        error of a function of the user, or that error if the application has no answer to it.
        """
        policy, named = self._policy, self._options.caller
        caller = named.caller_of(self._scope) if isinstance(named, NAMING) else await self._caller_by(named)
        content_type, length = self._content()
        self._body = body = await read_body(self._receive, policy.max_request, content_type, length)
        digest = body.digest if policy.fingerprint == "raw" else await self._digest_by(policy.fingerprint, body)
        return self._claim(key, route, caller, content_type, digest)

    def receive(self) -> Receive:
        """Make the ``receive`` of the application, which gives the body that :meth:`claim` has read."""
        return self._receive if self._body is None else self._body.receive(self._receive)

    def close(self) -> None:
        """Remove the temporary file of a large body."""
        if self._body is not None:
            self._body.close()

    async def _caller_by(self, function: CallerScope | None) -> str:
        if function is None:
            return ANONYMOUS
        from starlette.requests import Request

        return scope_text(await self._call(function, Request(self._scope)), self._options.secret)

    async def _digest_by(self, rule: Fingerprint, body: Body) -> bytes:
        if callable(rule):
            from idempotency._http.callables import ReadRequest

            return value_digest(await self._call(rule, ReadRequest(self._scope, self.receive())))
        digest = None if body.data is None else await aside(json_digest, body.data)
        return digest or body.digest

    async def _call(self, function: Callable[[Request], Any], request: Request) -> Any:
        """Call a function of the user; an error of it is answered as if a handler had raised it."""
        from idempotency._http.callables import ReadRequest, answer

        try:
            value = function(request)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            if isinstance(request, ReadRequest) and request.is_malformed(error):
                raise BodyInvalidError from error
            RequestState(self._scope, None)
            if not await answer(error, self._app, self._scope, self.receive(), self.send):
                raise
            raise AnsweredError(error) from error
        finally:
            await request.close()  # closes the files of a form that it has read

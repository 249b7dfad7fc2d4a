"""What the middleware for WSGI reads of a request before anything runs; see :mod:`idempotency._http.request`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from idempotency._http.body import Body, is_about
from idempotency._http.body_sync import read_body_sync
from idempotency._http.caller import ANONYMOUS, scope_text
from idempotency._http.capture_sync import echoing
from idempotency._http.fingerprint import OfBody, json_digest, value_digest
from idempotency._http.head import Head
from idempotency._http.key import key_to_echo
from idempotency._http.options import EnvironScope, Options
from idempotency._http.request import NAMING
from idempotency._rules import Claim
from idempotency.errors import BodyInvalidError
from idempotency.policy import Fingerprint, Policy


class AnsweredError(Exception):
    """A function of the user raised ``error``, which is an answer itself: ``answer``, a WSGI application."""

    def __init__(self, error: Exception, answer: WSGIApplication) -> None:
        super().__init__(error)
        self.error = error
        self.answer = answer


class SyncKeyedRequest(Head):
    """One request that has a key, or needs one, as it is read; see :class:`idempotency._http.request.KeyedRequest`.

    ``start_response`` is the server's, or the one that puts the key into each response.
    """

    __slots__ = ("_body", "_environ", "start_response")

    def __init__(
        self,
        options: Options,
        policy: Policy,
        scope: dict[str, Any],
        environ: WSGIEnvironment,
        start_response: StartResponse,
        keys: Sequence[bytes],
    ) -> None:
        super().__init__(options, policy, scope, keys)
        self._environ = environ
        self.start_response = start_response
        if options.echo_key and (sent := key_to_echo(keys, strict=options.strict)) is not None:
            self.start_response = echoing(start_response, options.header_name, sent)
        self._body: Body | None = None

    def claim(self, key: str, route: str) -> Claim:
        """See :meth:`KeyedRequest.claim`."""
        policy, named = self._policy, self._options.caller
        caller = named.caller_of(self._scope) if isinstance(named, NAMING) else self._caller_by(named)
        content_type, _ = self._content()
        self._body = body = read_body_sync(self._environ, policy.max_request, content_type)
        try:
            digest = body.digest if policy.fingerprint == "raw" else self._digest_by(policy.fingerprint, body)
        except BaseException:
            body.close()
            raise
        return self._claim(key, route, caller, content_type, digest)

    def give_body_back(self) -> None:
        """Put the body that :meth:`claim` has read into the environ, for the application."""
        if self._body is not None:
            self._environ.update(self._with_body(self._body))

    def close(self) -> None:
        """Remove the temporary file of a large body."""
        if self._body is not None:
            self._body.close()

    def _with_body(self, body: Body) -> dict[str, Any]:
        # Frameworks read no further than the length, and nothing without one, although the server knows the end.
        return {"wsgi.input": body.open(), "wsgi.input_terminated": True, "CONTENT_LENGTH": str(body.size)}

    def _caller_by(self, function: EnvironScope | None) -> str:
        if function is None:
            return ANONYMOUS
        # Without the body, which is not read yet: the application would miss what is read here.
        head = {**self._environ, "wsgi.input": io.BytesIO(), "CONTENT_LENGTH": "0"}
        return scope_text(self._call(function, head), self._options.secret)

    def _digest_by(self, rule: Fingerprint, body: Body) -> bytes:
        if isinstance(rule, OfBody):
            return value_digest(rule.digest_of(body.open().read()))
        if callable(rule):
            return value_digest(self._call(rule, {**self._environ, **self._with_body(body)}))
        digest = None if body.data is None else json_digest(body.data)
        return digest or body.digest

    def _call(self, function: Callable[[WSGIEnvironment], Any], environ: WSGIEnvironment) -> Any:
        """Call a function of the user. An error of it is answered by itself where it can, as one of Werkzeug can."""
        try:
            return function(environ)
        except Exception as error:
            if self._body is not None and isinstance(error, ValueError) and is_about(error, self._body.open().read()):
                raise BodyInvalidError from error
            werkzeug = sys.modules.get("werkzeug.exceptions")
            if werkzeug is None or not isinstance(error, werkzeug.HTTPException):
                raise
            raised: Any = error
            answer: WSGIApplication = raised.get_response(environ)
            raise AnsweredError(error, answer) from error

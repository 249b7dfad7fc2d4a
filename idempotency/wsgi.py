"""Idempotency keys for any WSGI application."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from idempotency._engine.lease_sync import SyncLease
from idempotency._engine.modes import leases_of_sync
from idempotency._engine.runner_sync import SyncRunner
from idempotency._hooks import check_callable
from idempotency._http.body import DisconnectedError
from idempotency._http.caller import CredentialScope, KnownCaller, UnknownCredentials
from idempotency._http.capture_sync import Closing, SyncResponseCapture, send_response_sync
from idempotency._http.codec import StoredResponse, encode_response
from idempotency._http.content_coding import is_acceptable
from idempotency._http.cors_sync import with_cors
from idempotency._http.duplicate import answer_of, in_accepted_coding, status_of
from idempotency._http.environ import path_below, scope_of, variable_of
from idempotency._http.error_hook import ErrorHook, answer_to
from idempotency._http.fingerprint import OfBody
from idempotency._http.options import Caller as Caller
from idempotency._http.options import EnvironScope, protect
from idempotency._http.outcome import REFUSAL, is_brief, outcome_of_response
from idempotency._http.problem import DRAFT, describe
from idempotency._http.profile import Profile, choose
from idempotency._http.recorded_headers import replayed_headers, trace_of
from idempotency._http.redact import record_of
from idempotency._http.request_sync import AnsweredError, SyncKeyedRequest
from idempotency._http.route_names import RouteNames
from idempotency._http.startup import Startup
from idempotency._http.unrouted_sync import is_unrouted_sync
from idempotency._http.unused_session import UnusedSessions
from idempotency._rules import Claim, Execute, Known
from idempotency.errors import (
    BodyInvalidError,
    CallerUnknownError,
    IdempotencyError,
    KeyInvalidError,
    KeyMissingError,
    RequestTooLargeError,
    StoreError,
    WaitFailedError,
)
from idempotency.events import EventHooks, EventKind, OnEvent
from idempotency.operation import RUNNING
from idempotency.policy import Headers, Policy
from idempotency.stores import open_store
from idempotency.stores.base import SyncStore, check_store, writes_names
from idempotency.stores.memory import MemoryStore

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, sessionmaker

    S = TypeVar("S", bound=Session)

_OPERATION = "idempotency"
"""The member of an environ in which the application finds its operation."""

_SERVER_ERROR = encode_response(500, [(b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error")
_INCOMPLETE = StoredResponse(400, [(b"content-length", b"0")], b"")
_REFUSALS = (KeyMissingError, KeyInvalidError, CallerUnknownError, RequestTooLargeError, BodyInvalidError)


class IdempotencyMiddleware:
    """Make retried requests that carry an ``Idempotency-Key`` take effect once, in an application of WSGI (PEP 3333).

    The options are those of :class:`idempotency.asgi.IdempotencyMiddleware`, and a key that is used through one of the
    two is known to the other, on one store. These differ:

    ``store``: a :class:`~idempotency.stores.base.SyncStore`, or a URL for :func:`~idempotency.open_store`, whose store
    is then closed when the interpreter exits.
    ``session``: a ``sessionmaker`` on the database of the store. ``idempotency.current().session`` is its session.
    ``scope``: a callable is given a copy of the environ, without the body, and is not async. An ``HTTPException`` of
    Werkzeug that it raises is the answer; any other exception is raised to the server. Nothing runs then.
    ``Policy.fingerprint``: a callable is given a copy of the environ, with the body in ``wsgi.input``.

    The operation is ``environ["idempotency"]``, and :func:`idempotency.current` while the application is called, and
    while what it returns is iterated and closed. Without a key it is None.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything that cannot work.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        store: SyncStore | str,
        policy: Policy | None = None,
        policies: Mapping[str, Policy | None] | None = None,
        session: sessionmaker[Session] | None = None,
        scope: EnvironScope | CredentialScope | KnownCaller | None = "credentials",
        unknown_credentials: UnknownCredentials = "warn",
        secret: bytes | str | None = None,
        header_name: str = "Idempotency-Key",
        replayed_header: str = "Idempotent-Replayed",
        strict: bool = False,
        docs: str = DRAFT,
        error: ErrorHook | None = None,
        echo_key: bool | None = None,
        profile: Profile | None = None,
        on_event: OnEvent = (),
    ) -> None:
        hooks = EventHooks(on_event)
        self.app = app
        own = choose(profile, error, echo_key, policy)
        self.protection = protect(
            scope, unknown_credentials, secret, header_name, replayed_header, strict, docs, own, policies, session
        )
        """Which requests are protected and how, for :func:`idempotency.openapi.describe`."""
        self._routes, self._options = self.protection.routes, self.protection.options
        self._check_functions(scope)
        opened = open_store(store) if isinstance(store, str) else store
        self._route_names = RouteNames(app, self._routes, wanted=bool(hooks.hooks) or writes_names(opened))
        self._runner = SyncRunner(check_store(opened, SyncStore), hooks)
        in_memory = isinstance(opened, MemoryStore)
        self._startup = Startup(app, self._routes, by_headers=scope == "credentials", in_memory=in_memory)
        if isinstance(store, str):
            # At the exit of the interpreter, or when the application is dropped. What is pending is written before.
            weakref.finalize(self, opened.close)
        self._new_lease = leases_of_sync(self._runner, session)
        self._key_variable = variable_of(self._options.header_name)
        self._unused_sessions = UnusedSessions(self._route_names)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        policy = self._routes.policy_for(environ["REQUEST_METHOD"].upper(), path_below(environ))
        if policy is not None:
            key: str | None = environ.get(self._key_variable)
            if key is not None or policy.required:
                if not self._startup.looked:
                    self._startup.look(environ)
                keys = () if key is None else (key.encode("latin-1"),)
                return _Exchange(self, policy, environ, start_response, keys).run()
            if environ.get(_OPERATION) is not None:
                environ = {**environ}  # that of another middleware, whose request this one is inside
            environ[_OPERATION] = None
        return self.app(environ, start_response)

    def _check_functions(self, scope: object) -> None:
        if callable(scope):
            check_callable("scope", scope)
        for fingerprint in self._routes.callable_fingerprints:
            if not isinstance(fingerprint, OfBody):
                check_callable("fingerprint", fingerprint)


class _Exchange:
    """One request to a protected route: read, claim, run, record, send."""

    __slots__ = (
        "_claim",
        "_environ",
        "_key",
        "_lease",
        "_middleware",
        "_options",
        "_policy",
        "_request",
        "_scope",
        "_send",
        "_send_own",
    )

    # sync only: what a server gives of a request.
    def __init__(
        self,
        middleware: IdempotencyMiddleware,
        policy: Policy,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        keys: Sequence[bytes],
    ) -> None:
        self._middleware = middleware
        self._options = middleware._options
        self._policy = policy
        self._environ = environ
        self._scope = scope_of(environ)
        self._request = SyncKeyedRequest(middleware._options, policy, self._scope, environ, start_response, keys)
        self._send = self._request.start_response
        self._send_own = with_cors(self._send, middleware.app, environ)
        self._key: str | None = None
        self._claim: Claim | None = None
        self._lease: SyncLease

    # sync only: what is returned to the server is the body of the answer, and its close() ends the request.
    def run(self) -> Iterable[bytes]:
        """Answer the request."""
        try:
            self._key = key = self._request.key()
            claim = None if self._is_protected_already(key) else self._request.claim(key, self._route())
        except _REFUSALS as error:
            return self._refuse("refused", error)
        except AnsweredError as answered:
            self._emit("refused", answered.error)
            return answered.answer(self._environ, self._send_own)
        except DisconnectedError:
            return send_response_sync(self._send, _INCOMPLETE)
        if claim is None:
            return self._middleware.app(self._environ, self._send)
        try:
            return self._begin(claim)
        except BaseException:
            self._request.close()
            raise

    # sync only: the operation of an environ is that of its request.
    def _is_protected_already(self, key: str) -> bool:
        """Return whether the middleware was added twice, as to an application and one mounted in it."""
        outer = RUNNING.get()
        if outer is None or (outer.key, outer.name) != (key, self._request.name):
            return False
        return self._environ.get(_OPERATION) is outer

    # sync only: see run().
    def _begin(self, claim: Claim) -> Iterable[bytes]:
        """Claim the key, and execute the operation or answer the duplicate."""
        policy, self._claim = self._policy, claim
        try:
            verdict, claimed_at = self._middleware._runner.claim(claim, self._request.wait())
        except StoreError as error:
            if policy.on_store_error == "fail_open" and not isinstance(error, WaitFailedError):
                self._emit("unprotected", error)
                return self._run_unprotected()
            return self._refuse("unavailable", error)
        if not isinstance(verdict, Execute):
            self._request.close()
            return send_response_sync(self._send_own, self._answer(verdict))
        self._lease = self._middleware._new_lease(
            claim, verdict.attempt, self._request.name, claimed_at, policy, claim.name
        )
        return self._execute()

    # sync only: see run().
    def _run_unprotected(self) -> Iterable[bytes]:
        self._environ[_OPERATION] = None
        self._request.give_body_back()
        return Closing(self._middleware.app(self._environ, self._send), self._request.close)

    # sync only: see run().
    def _execute(self) -> Iterable[bytes]:
        operation = self._lease.operation
        self._environ[_OPERATION] = operation
        self._request.give_body_back()
        capture = SyncResponseCapture(
            self._send, self._send_own, self._policy.max_response, self._settle, operation, self._leave
        )
        try:
            capture.run(self._middleware.app, self._environ)
        except BaseException as error:
            try:
                if not self._lease.ended:
                    self._failed(error)
            finally:
                capture.close()
            raise
        return capture

    # sync only: see run().
    def _leave(self) -> None:
        """End what belongs to the operation, after the application is closed."""
        self._environ[_OPERATION] = None
        try:
            self._lease.close()
        finally:
            self._request.close()

    def _settle(self, status: int, headers: Headers, body: bytes | None) -> StoredResponse | None:
        # sync only: the environ, as the application has changed it, has what the router of a framework reads.
        chosen = outcome_of_response(
            self._policy, status, headers, body, self._environ, self._middleware.app, is_unrouted_sync
        )
        operation = self._lease.operation
        outcome = operation.outcome_after(chosen)
        if outcome == "store" and is_brief(operation, status):
            self._lease.shorten(REFUSAL)
        result, error = None, None
        if outcome == "store" and body is not None:
            trace = self._middleware._runner.hooks.traceparent()
            result, error = record_of(self._policy, status, headers, body, trace)
        try:
            verdict = (self._lease.fail if status >= 500 else self._lease.end)(outcome, result, error)
        except StoreError as failure:
            return self._problem("unavailable", failure)
        except Exception as failure:
            if not self._lease.ended:
                self._failed(failure)
            raise
        if verdict is not None:
            return self._answer(verdict)
        if outcome == "store" and status < 400 and self._lease.session_unused:
            self._report_unused_session()
        return None

    def _report_unused_session(self) -> None:
        middleware = self._middleware
        route = middleware._unused_sessions.first_of(self._scope, self._request.name)
        if route is not None:
            middleware._runner.emit("session-unused", route, self._claim, self._lease.operation.attempt)

    def _failed(self, error: BaseException) -> None:
        outcome = self._lease.operation.outcome_after(self._policy.outcome_of_exception(error))
        self._lease.fail(outcome, _SERVER_ERROR if outcome == "store" else None, error)

    def _answer(self, verdict: Known) -> StoredResponse:
        kind, answer = answer_of(verdict)
        headers = self._scope["headers"]
        if isinstance(answer, StoredResponse) and not is_acceptable(answer, headers):
            # sync only: there is no event loop that this would block.
            kind, answer = in_accepted_coding(answer, headers, self._policy.max_response)
        if isinstance(answer, IdempotencyError):
            return self._problem(kind, answer)
        self._emit(kind, first_trace=trace_of(answer.headers))
        return StoredResponse(answer.status, replayed_headers(answer.headers, self._options.replayed), answer.body)

    # sync only: see run().
    def _refuse(self, kind: EventKind, error: IdempotencyError) -> Iterable[bytes]:
        self._request.close()
        return send_response_sync(self._send_own, self._problem(kind, error))

    def _problem(self, kind: EventKind, error: IdempotencyError) -> StoredResponse:
        self._emit(kind, error)
        status = status_of(error, self._policy)
        return answer_to(describe(error, docs=self._options.docs, status=status, key=self._key), self._options.error)

    def _emit(self, kind: EventKind, error: BaseException | None = None, first_trace: str = "") -> None:
        runner = self._middleware._runner
        if runner.hooks.wants(kind):
            name, route = self._request.name, self._route()
            runner.emit(kind, name, self._claim, error=error, route=route, first_trace=first_trace)

    def _route(self) -> str:
        if self._claim is not None:
            return self._claim.name
        return self._middleware._route_names.name_of(self._scope)


def session_of(sessions: sessionmaker[S], /) -> Callable[[], AbstractContextManager[S]]:
    """Make a function that gives code one session: ``with get_session() as session:``.

    ``sessions`` is the ``sessionmaker`` that the middleware has as ``session=``. In an operation, the context has the
    operation's session, which is committed with the recorded response; the code never commits it, and an exception that
    leaves the block rolls it back. Anywhere else (a GET, a request without a key, an application without the
    middleware) it has a session of its own, which is committed at the end of the block, rolled back on an exception,
    and closed.

    Raises :class:`~idempotency.errors.ConfigurationError` for what is no such factory, and in a request
    :class:`~idempotency.errors.TransactionError` where the middleware has no ``session=``.
    """
    from idempotency._sql.session_of import contexts_of_sync

    return contexts_of_sync(sessions)

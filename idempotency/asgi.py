"""Idempotency keys for any ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from idempotency._engine.background import drain
from idempotency._engine.lease import Lease
from idempotency._engine.modes import awaited_store, leases_of
from idempotency._engine.runner import Runner
from idempotency._http.body import DisconnectedError, Receive, Send
from idempotency._http.caller import CredentialScope, KnownCaller, UnknownCredentials
from idempotency._http.capture import ResponseCapture, send_response
from idempotency._http.codec import StoredResponse, encode_response
from idempotency._http.content_coding import is_acceptable
from idempotency._http.disconnect import Disconnect
from idempotency._http.duplicate import answer_of, in_accepted_coding, status_of
from idempotency._http.error_hook import ErrorHook, answer_to
from idempotency._http.exit_stacks import ExitStacks
from idempotency._http.fields import values_of
from idempotency._http.inner_cors import InnerCors
from idempotency._http.lifespan import Lifespan
from idempotency._http.options import Caller as Caller
from idempotency._http.options import CallerScope, protect, require_starlette
from idempotency._http.outcome import REFUSAL, is_brief, outcome_of_response
from idempotency._http.problem import DRAFT, describe
from idempotency._http.profile import Profile, choose
from idempotency._http.recorded_headers import replayed_headers, trace_of
from idempotency._http.redact import record_of
from idempotency._http.request import AnsweredError, KeyedRequest
from idempotency._http.route_names import RouteNames
from idempotency._http.routes import Routes, route_path
from idempotency._http.startup import Startup, logged
from idempotency._http.state import RequestState, mapping_of, note_unprotected, run_unprotected
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
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Headers, Policy
from idempotency.stores import open_store
from idempotency.stores.base import Checking, Store, supports, writes_names
from idempotency.stores.memory import MemoryStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

Scope = MutableMapping[str, Any]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_SERVER_ERROR = encode_response(500, [(b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error")
_REFUSALS = (KeyMissingError, KeyInvalidError, CallerUnknownError, RequestTooLargeError, BodyInvalidError)


class IdempotencyMiddleware:
    """Make retried requests that carry an ``Idempotency-Key`` take effect once.

    ``store``: a :class:`~idempotency.stores.base.Store`, or a URL for :func:`~idempotency.open_store`, whose store is
    then closed at the application's shutdown.
    ``policy``: the policy of every protected route. ``policies``: other policies by route, ``"POST /payments/{id}"``
    or ``"/payments"``, as ``app`` sees its paths (without ``root_path``); None takes a route out of scope.
    ``session``: makes the middleware transactional. ``store`` is then an :class:`~idempotency.stores.sql.SQLStore` on
    the same database, and ``request.state.idempotency.session`` is a session of this factory, begun at its first use
    and committed with the recorded response, before the response is sent. Handlers do not commit it. A synchronous
    ``sessionmaker`` needs a store on a synchronous engine; what the library does with both runs in threads.
    ``scope``: who is calling. Default ``"credentials"``: a digest of the credentials in the headers (Authorization,
    API keys, tenants, and names that proxies set). ``"authorization"``: of the Authorization header alone. A callable,
    sync or async, is given the Starlette ``Request`` (with ``state``) and returns the caller's name; its exceptions are
    answered as a handler's are. None is the opt-out: one key space for all callers, in which a caller who sends the
    key of another gets the other's response.
    ``unknown_credentials``: what happens to a request with a key and with credentials that such a digest does not
    contain, as a cookie alone. ``"warn"``, the default: one warning for each header. ``"refuse"``: the request is
    answered 500 ``caller-unknown``, and nothing runs.
    ``secret``: makes the stored digests of callers and requests keyed (HMAC); give it where the store is readable by
    people who should not test guesses.
    ``header_name`` of the key, default ``Idempotency-Key``; ``replayed_header`` marks replays, default
    ``Idempotent-Replayed``. ``strict``: accept only keys in the draft's syntax, an RFC 9651 String; by default bare
    text is accepted too, and ``abc`` and ``"abc"`` are one key.
    ``docs``: URL of your published idempotency specification, to which every problem document links.
    ``error``: makes the answer where the application gives none, instead of a problem document: an ordinary function
    that is given a :class:`~idempotency.Problem` and returns the members of a JSON body, or a status, header fields and
    a body. It must not block.
    ``echo_key``: whether each response to a request with a readable key has the key in the header of the same name, as
    it was sent. Default False.
    ``profile``: what ``error``, ``echo_key`` and ``policy`` are if they are not given: ``Profile.acp``,
    ``Profile.stripe``, or a :class:`~idempotency.Profile` of your own.
    ``on_event``: a hook, or several, that are given one event per outcome. Each event is logged too.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything that cannot work.
    """

    @logged
    def __init__(
        self,
        app: ASGIApp,
        *,
        store: Store | str,
        policy: Policy | None = None,
        policies: Mapping[str, Policy | None] | None = None,
        session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None = None,
        scope: CallerScope | CredentialScope | KnownCaller | None = "credentials",
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
        opened = open_store(store) if isinstance(store, str) else store
        self._route_names = RouteNames(app, self._routes, wanted=bool(hooks.hooks) or writes_names(opened))
        awaited = awaited_store(opened, session)
        self._runner = Runner(awaited, hooks)
        self._startup = _startup(app, self._routes, scope == "credentials", awaited)
        self._lifespan = Lifespan(drain, awaited.aclose if isinstance(store, str) else None, self._startup)
        if callable(scope) or self._routes.callable_fingerprints:
            require_starlette()
        self._new_lease = leases_of(self._runner, session)
        self._unused_sessions = UnusedSessions(self._route_names)
        self._inner_cors = InnerCors(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            # Some servers pass the method on as it was sent, and some frameworks read "post" as POST.
            policy = self._routes.policy_for(scope["method"].upper(), route_path(scope))
            if policy is not None:
                if not isinstance(scope["headers"], (list, tuple)):
                    # ASGI allows any iterable. Here it is read more than once.
                    scope["headers"] = list(scope["headers"])
                keys = values_of(scope["headers"], self._options.header_name)
                if keys or policy.required:
                    if not self._startup.looked:
                        self._startup.look(scope)
                    exchange = _Exchange(self, policy, scope, receive, send, keys)
                    await exchange.run()
                    if self._runner.writing and self._lifespan.requests_wait_for_writes():
                        # The answer is sent. A server that stops waits for its requests, and for nothing else.
                        await exchange.wait_for_writes()
                    return
                if not note_unprotected(scope):
                    await run_unprotected(self.app, scope, receive, send)
                    return
        elif scope["type"] == "lifespan":
            await self.app(scope, self._lifespan.receive(receive), self._lifespan.send(send, scope))
            return
        await self.app(scope, receive, send)


def _startup(app: ASGIApp, rules: Routes, by_headers: bool, store: Store) -> Startup:
    check = store.check if supports(store, Checking) else None
    return Startup(app, rules, by_headers=by_headers, in_memory=isinstance(store, MemoryStore), check=check)


class _NoResponse(BaseException):
    """The application returned without a response, as some do when their client is gone.

    How far its operation got is not known.
    """


class _Exchange:
    """One request to a protected route: read, claim, run, record, send."""

    __slots__ = (
        "_claim",
        "_key",
        "_lease",
        "_middleware",
        "_options",
        "_policy",
        "_receive",
        "_request",
        "_scope",
        "_send",
        "_state",
    )

    # async only: what a server gives of a request.
    def __init__(
        self,
        middleware: IdempotencyMiddleware,
        policy: Policy,
        scope: Scope,
        receive: Receive,
        send: Send,
        keys: Sequence[bytes],
    ) -> None:
        self._middleware = middleware
        self._options = middleware._options
        self._policy = policy
        self._scope = scope
        self._receive = receive
        self._request = KeyedRequest(middleware.app, middleware._options, policy, scope, receive, send, keys)
        self._send = self._request.send
        self._key: str | None = None
        self._claim: Claim | None = None
        self._lease: Lease
        self._state: RequestState

    # async only: an answer is sent, and not returned.
    async def run(self) -> None:
        """Answer the request."""
        try:
            self._key = key = self._request.key()
            claim = None if self._is_protected_already(key) else await self._request.claim(key, self._route())
        except _REFUSALS as error:
            await self._refuse("refused", error)
        except AnsweredError as answered:
            self._emit("refused", answered.error)
        except DisconnectedError:
            pass
        else:
            if claim is None:
                await self._middleware.app(self._scope, self._receive, self._send)
            elif await self._begin(claim):
                await self._execute(self._lease.operation, self._request.receive())
        finally:
            self._request.close()

    # async only: the interpreter waits for the writes of threads.
    async def wait_for_writes(self) -> None:
        """Wait until the background writes of this request are done, but not longer than a lease."""
        if self._claim is not None:
            await self._middleware._runner.wait_for_writes(self._claim)

    # async only: the state of a scope may be that of several requests.
    def _is_protected_already(self, key: str) -> bool:
        """Return whether the middleware was added twice, as to an application and one mounted in it."""
        # Both places are checked: some servers share a state among requests, and a task that outlives its request still
        # has its context.
        outer = RUNNING.get()
        if outer is None or (outer.key, outer.name) != (key, self._request.name):
            return False
        return mapping_of(self._scope.get("state")).get("idempotency") is outer

    # async only: see run().
    async def _begin(self, claim: Claim) -> bool:
        """Claim the key, and return whether the operation is to be executed here; if not, the request is answered."""
        policy, self._claim = self._policy, claim
        try:
            verdict, claimed_at = await self._middleware._runner.claim(claim, self._request.wait())
        except StoreError as error:
            if policy.on_store_error == "fail_open" and not isinstance(error, WaitFailedError):
                self._emit("unprotected", error)
                await run_unprotected(self._middleware.app, self._scope, self._request.receive(), self._send)
            else:
                await self._refuse("unavailable", error)
            return False
        if not isinstance(verdict, Execute):
            await self._send_own(await self._answer(verdict))
            return False
        self._lease = self._middleware._new_lease(
            claim, verdict.attempt, self._request.name, claimed_at, policy, claim.name
        )
        return True

    # async only: see run().
    async def _execute(self, operation: Operation, receive: Receive) -> None:
        disconnect = Disconnect(receive, operation)
        stacks = ExitStacks(self._scope, self._middleware.app)
        capture = ResponseCapture(
            self._send, self._send_own, self._policy.max_response, self._settle, disconnect, stacks
        )
        self._state = RequestState(self._scope, operation)
        token = RUNNING.set(operation)
        try:
            await self._middleware.app(self._scope, disconnect, capture)
            await capture.flush()
            if not self._lease.ended:
                await self._failed(_NoResponse())
        except BaseException as error:
            capture.drop()
            # If it ended, the response is recorded and sent, and a background task failed or was cancelled.
            if not self._lease.ended:
                await self._failed(error)
            raise
        finally:
            disconnect.pass_on()
            self._state.leave()
            RUNNING.reset(token)
            await self._lease.close()

    async def _settle(self, status: int, headers: Headers, body: bytes | None) -> StoredResponse | None:
        self._state.share()  # async only: an environ belongs to one request
        # async only: the scope, as the application has changed it, has what the router of a framework has found.
        chosen = outcome_of_response(self._policy, status, headers, body, self._scope, self._middleware.app)
        operation = self._lease.operation
        outcome = operation.outcome_after(chosen)
        if outcome == "store" and is_brief(operation, status):
            self._lease.shorten(REFUSAL)
        result, error = None, None
        if outcome == "store" and body is not None:
            trace = self._middleware._runner.hooks.traceparent()
            result, error = record_of(self._policy, status, headers, body, trace)
        try:
            # Frameworks answer an exception with a 5xx, so it is a failure, whether it is recorded or not.
            verdict = await (self._lease.fail if status >= 500 else self._lease.end)(outcome, result, error)
        except StoreError as failure:
            # The transaction did not commit, or this is not known. In both cases the request may be sent again.
            return self._problem("unavailable", failure)
        except Exception as failure:
            # The database refused the commit: the operation has failed, as if its code had raised the error.
            if not self._lease.ended:
                await self._failed(failure)
            raise
        if verdict is not None:
            return await self._answer(verdict)
        if outcome == "store" and status < 400 and self._lease.session_unused:
            self._report_unused_session()
        return None

    def _report_unused_session(self) -> None:
        middleware = self._middleware
        route = middleware._unused_sessions.first_of(self._scope, self._request.name)
        if route is not None:
            middleware._runner.emit("session-unused", route, self._claim, self._lease.operation.attempt)

    async def _failed(self, error: BaseException) -> None:
        outcome = self._lease.operation.outcome_after(self._policy.outcome_of_exception(error))
        await self._lease.fail(outcome, _SERVER_ERROR if outcome == "store" else None, error)

    async def _answer(self, verdict: Known) -> StoredResponse:
        kind, answer = answer_of(verdict)
        headers = self._scope["headers"]
        if isinstance(answer, StoredResponse) and not is_acceptable(answer, headers):
            # async only: decoding a large body would block the event loop.
            kind, answer = await asyncio.to_thread(in_accepted_coding, answer, headers, self._policy.max_response)
        if isinstance(answer, IdempotencyError):
            return self._problem(kind, answer)
        self._emit(kind, first_trace=trace_of(answer.headers))
        return StoredResponse(answer.status, replayed_headers(answer.headers, self._options.replayed), answer.body)

    # async only: see run().
    async def _refuse(self, kind: EventKind, error: IdempotencyError) -> None:
        await self._send_own(self._problem(kind, error))

    # async only: CORS middleware of WSGI has no answer to ask it for.
    async def _send_own(self, answer: StoredResponse) -> None:
        await send_response(self._send, await self._middleware._inner_cors.headed(self._scope, answer))

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

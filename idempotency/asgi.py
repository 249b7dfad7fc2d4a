"""Idempotency keys for any ASGI application."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal

from idempotency._engine.background import drain
from idempotency._engine.lease import Lease
from idempotency._engine.modes import leases_of
from idempotency._engine.runner import Runner
from idempotency._http.body import Body, DisconnectedError, Receive, Send, read_body
from idempotency._http.capture import ResponseCapture, send_response
from idempotency._http.codec import Headers, StoredResponse, encode_response
from idempotency._http.disconnect import Disconnect
from idempotency._http.duplicate import answer_of
from idempotency._http.exit_stacks import ExitStacks
from idempotency._http.fingerprint import authorization_scope, fingerprint, json_digest, scope_text, value_digest
from idempotency._http.key import read_key, read_prefer_wait
from idempotency._http.lifespan import Lifespan
from idempotency._http.options import Caller as Caller
from idempotency._http.options import CallerScope, check_options, require_starlette
from idempotency._http.problem import DRAFT, problem_response
from idempotency._http.redact import record_of
from idempotency._http.routes import Routes, route_path
from idempotency._http.state import RequestState, mapping_of
from idempotency._rules import Claim, Execute, Known
from idempotency.errors import (
    BodyInvalidError,
    ConfigurationError,
    IdempotencyError,
    KeyInvalidError,
    KeyMissingError,
    RequestTooLargeError,
    StoreError,
    WaitFailedError,
)
from idempotency.events import EventHook, EventKind, log_event
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Policy
from idempotency.stores import open_store
from idempotency.stores.base import Store, check_store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from starlette.requests import Request

Scope = MutableMapping[str, Any]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_SERVER_ERROR = encode_response(500, [(b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error")


class IdempotencyMiddleware:
    """Make retried requests that carry an ``Idempotency-Key`` take effect once.

    ``store``: a :class:`~idempotency.stores.base.Store`, or a URL for :func:`~idempotency.open_store`, whose store is
    then closed at the application's shutdown.
    ``policy``: the policy of every protected route. ``policies``: other policies by route, ``"POST /payments/{id}"``
    or ``"/payments"``, as ``app`` sees its paths (without ``root_path``); None takes a route out of scope.
    ``session``: makes the middleware transactional. ``store`` is then an :class:`~idempotency.stores.sql.SQLStore` on
    the same database, and ``request.state.idempotency.session`` is a session of this factory, begun at its first use
    and committed with the recorded response, before the response is sent. Handlers do not commit it.
    ``scope``: who is calling. Default ``"authorization"``: a digest of the Authorization header. A callable, sync or
    async, is given the Starlette ``Request`` (with ``state``) and returns the caller's name; its exceptions are
    answered as a handler's are. None is the opt-out: one key space for all callers, in which a caller who sends the
    key of another gets the other's response.
    ``secret``: makes the stored digests of callers and requests keyed (HMAC); give it where the store is readable by
    people who should not test guesses.
    ``header_name`` of the key, default ``Idempotency-Key``; ``replayed_header`` marks replays, default
    ``Idempotent-Replayed``. ``strict``: accept only keys in the draft's syntax, an RFC 9651 String; by default bare
    text is accepted too, and ``abc`` and ``"abc"`` are one key.
    ``docs``: URL of your published idempotency specification, to which every problem document links.
    ``on_event``: is given one event per outcome; default: log it.

    Raises :class:`~idempotency.errors.ConfigurationError` for anything that cannot work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        store: Store | str,
        policy: Policy | None = None,
        policies: Mapping[str, Policy | None] | None = None,
        session: async_sessionmaker[AsyncSession] | None = None,
        scope: CallerScope | Literal["authorization"] | None = "authorization",
        secret: bytes | str | None = None,
        header_name: str = "Idempotency-Key",
        replayed_header: str = "Idempotent-Replayed",
        strict: bool = False,
        docs: str = DRAFT,
        on_event: EventHook = log_event,
    ) -> None:
        if not callable(on_event):
            raise ConfigurationError(f"on_event must be callable, not {type(on_event).__name__}")
        self.app = app
        self._options = check_options(scope, secret, header_name, replayed_header, strict, docs)
        self._routes = Routes(policy if policy is not None else Policy(), {} if policies is None else policies)
        opened = open_store(store) if isinstance(store, str) else store
        self._runner = Runner(check_store(opened, Store), on_event)
        self._lifespan = Lifespan(drain, opened.aclose if isinstance(store, str) else None)
        if callable(scope) or self._routes.has_callable_fingerprint:
            require_starlette()
        self._new_lease = leases_of(self._runner, session)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            # Some servers pass the method on as it was sent, and some frameworks read "post" as POST.
            policy = self._routes.policy_for(scope["method"].upper(), route_path(scope))
            if policy is not None:
                exchange = _Exchange(self, policy, scope, receive, send)
                await exchange.run()
                if self._runner.writing and self._lifespan.requests_wait_for_writes():
                    # The answer is sent. A server that stops waits for its requests, and for nothing else.
                    await exchange.wait_for_writes()
                return
        elif scope["type"] == "lifespan":
            await self.app(scope, self._lifespan.receive(receive), self._lifespan.send(send))
            return
        await self.app(scope, receive, send)


class _AnsweredError(Exception):
    """A function of the user raised an error, and the application's answer to it is sent."""


class _NoResponse(BaseException):
    """The application returned without a response, as some do when their client is gone.

    How far its operation got is not known.
    """


class _Exchange:
    """One request to a protected route: parse, scope, fingerprint, claim, run, record, send."""

    __slots__ = (
        "_claim",
        "_lease",
        "_middleware",
        "_options",
        "_policy",
        "_receive",
        "_scope",
        "_send",
        "_state",
    )

    def __init__(
        self, middleware: IdempotencyMiddleware, policy: Policy, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._middleware = middleware
        self._options = middleware._options
        self._policy = policy
        self._scope = scope
        self._receive = receive
        self._send = send
        self._claim: Claim | None = None
        self._lease: Lease
        self._state: RequestState

    async def run(self) -> None:
        """Answer the request."""
        if not isinstance(self._scope["headers"], list | tuple):
            # ASGI allows any iterable. Here it is read more than once.
            self._scope["headers"] = list(self._scope["headers"])
        try:
            key = read_key(self._scope["headers"], self._options.header_name, strict=self._options.strict)
            if key is None:
                if self._policy.required:
                    name = self._options.header_name.decode()
                    raise KeyMissingError(f"This operation needs a key in the header {name}.")
                await self._unprotected(self._receive)
                return
            if self._is_protected_already(key):
                await self._middleware.app(self._scope, self._receive, self._send)
                return
            caller = await self._caller()
            body = await self._read()
        except (KeyMissingError, KeyInvalidError, RequestTooLargeError) as error:
            await self._refuse("refused", error)
            return
        except (DisconnectedError, _AnsweredError):
            return
        try:
            await self._run_with_key(key, caller, body)
        except _AnsweredError:
            return
        finally:
            body.close()

    async def wait_for_writes(self) -> None:
        """Wait until the background writes of this request are done, but not longer than a lease."""
        if self._claim is not None:
            await self._middleware._runner.wait_for_writes(self._claim)

    def _is_protected_already(self, key: str) -> bool:
        """Return whether the middleware was added twice, as to an application and one mounted in it."""
        # Both places are checked: some servers share a state among requests, and a task that outlives its request still
        # has its context.
        outer = RUNNING.get()
        if outer is None or (outer.key, outer.name) != (key, self._name()):
            return False
        return mapping_of(self._scope.get("state")).get("idempotency") is outer

    async def _caller(self) -> str:
        caller, secret = self._options.caller, self._options.secret
        if caller is None:
            return scope_text(None, secret)
        if isinstance(caller, str):
            return authorization_scope(self._scope["headers"], secret)
        from starlette.requests import Request

        return scope_text(await self._call(caller, Request(self._scope), self._receive), secret)

    async def _call(self, function: Callable[[Request], Any], request: Request, receive: Receive) -> Any:
        """Call a function of the user; an error of it is answered as if a handler had raised it."""
        from idempotency._http.callables import ReadRequest, answer

        try:
            value = function(request)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            if isinstance(request, ReadRequest) and request.is_malformed(error):
                await self._refuse("refused", BodyInvalidError())
                raise _AnsweredError from error
            RequestState(self._scope, None)
            if not await answer(error, self._middleware.app, self._scope, receive, self._send):
                raise
            self._emit("refused", error)
            raise _AnsweredError from error
        finally:
            await request.close()  # closes the files of a form that it has read

    async def _read(self) -> Body:
        return await read_body(
            self._receive, self._policy.max_request, self._header(b"content-type"), self._header(b"content-length")
        )

    def _header(self, name: bytes) -> bytes | None:
        for field, value in self._scope["headers"]:
            if field == name:
                return bytes(value)
        return None

    async def _fingerprint(self, body: Body) -> bytes:
        scope, rule = self._scope, self._policy.fingerprint
        digest = body.digest
        if rule == "json" and body.data is not None:
            # Parsing a large body would block the event loop.
            parsed = (
                await asyncio.to_thread(json_digest, body.data) if len(body.data) > 65536 else json_digest(body.data)
            )
            digest = parsed or digest
        elif callable(rule):
            from idempotency._http.callables import ReadRequest

            request = ReadRequest(scope, body.receive(self._receive))
            digest = value_digest(await self._call(rule, request, body.receive(self._receive)))
        content_type = self._header(b"content-type")
        return fingerprint(
            scope["method"], scope["path"], scope["query_string"], content_type, digest, self._options.secret
        )

    async def _run_with_key(self, key: str, caller: str, body: Body) -> None:
        policy = self._policy
        self._claim = claim = Claim(
            scope=caller,
            key=key,
            fingerprint=await self._fingerprint(body),
            lease=policy.lease,
            ttl=policy.ttl,
            hold=policy.on_crash == "hold",
        )
        try:
            verdict, claimed_at = await self._middleware._runner.claim(claim, self._wait())
        except StoreError as error:
            if policy.on_store_error == "fail_open" and not isinstance(error, WaitFailedError):
                self._emit("unprotected", error)
                await self._unprotected(body.receive(self._receive))
            else:
                await self._refuse("unavailable", error, _retry_after(error))
            return
        if isinstance(verdict, Execute):
            self._lease = self._middleware._new_lease(claim, verdict.attempt, self._name(), claimed_at, policy)
            await self._execute(self._lease.operation, body.receive(self._receive))
        else:
            await send_response(self._send, self._answer(verdict))

    def _wait(self) -> float:
        cap = self._policy.wait
        if cap == 0:
            return 0.0
        preferred = read_prefer_wait(self._scope["headers"])
        return cap if preferred is None else min(preferred, cap)

    async def _execute(self, operation: Operation, receive: Receive) -> None:
        disconnect = Disconnect(receive, operation)
        stacks = ExitStacks(self._scope, self._middleware.app)
        capture = ResponseCapture(self._send, self._policy.max_response, self._settle, disconnect, stacks)
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
        self._state.share()
        outcome = self._lease.operation.outcome_after(self._policy.outcome_of_status(status))
        result, error = None, None
        if outcome == "store" and body is not None:
            result, error = record_of(self._policy.redact, status, headers, body)
        try:
            # Frameworks answer an exception with a 5xx, so it is a failure, whether it is recorded or not.
            end = self._lease.fail if status >= 500 else self._lease.end
            verdict = await end(outcome, result, error)
        except StoreError as failure:
            # The transaction did not commit, or this is not known. In both cases the request may be sent again.
            return self._problem("unavailable", failure, _retry_after(failure))
        except Exception as failure:
            # The database refused the commit: the operation has failed, as if its code had raised the error.
            if not self._lease.ended:
                await self._failed(failure)
            raise
        return None if verdict is None else self._answer(verdict)

    async def _failed(self, error: BaseException) -> None:
        outcome = self._lease.operation.outcome_after(self._policy.outcome_of_exception(error))
        await self._lease.fail(outcome, _SERVER_ERROR if outcome == "store" else None, error)

    async def _unprotected(self, receive: Receive) -> None:
        state = mapping_of(self._scope.setdefault("state", {}))
        if isinstance(state, dict) and state.get("idempotency") is None:
            state["idempotency"] = None
            await self._middleware.app(self._scope, receive, self._send)
            return
        own = RequestState(self._scope, None)
        try:
            await self._middleware.app(self._scope, receive, self._send)
        finally:
            own.leave()

    def _answer(self, verdict: Known) -> StoredResponse:
        kind, answer, retry_after = answer_of(verdict)
        if isinstance(answer, IdempotencyError):
            return self._problem(kind, answer, retry_after)
        self._emit(kind)
        return StoredResponse(answer.status, [*answer.headers, self._options.replayed], answer.body)

    async def _refuse(self, kind: EventKind, error: IdempotencyError, retry_after: float | None = None) -> None:
        await send_response(self._send, self._problem(kind, error, retry_after))

    def _problem(self, kind: EventKind, error: IdempotencyError, retry_after: float | None = None) -> StoredResponse:
        self._emit(kind, error)
        return problem_response(error, docs=self._options.docs, retry_after=retry_after)

    def _emit(self, kind: EventKind, error: BaseException | None = None) -> None:
        self._middleware._runner.emit(kind, self._name(), self._claim, error=error)

    def _name(self) -> str:
        return f"{self._scope['method']} {self._scope['path']}"


def _retry_after(error: StoreError) -> float | None:
    """Return the seconds after which a retry is worth while, or None if it never is."""
    return 1.0 if error.retryable else None

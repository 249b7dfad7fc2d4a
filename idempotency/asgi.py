"""Idempotency keys for any ASGI application."""

from __future__ import annotations

import asyncio
import inspect
import re
import signal
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, assert_never

from idempotency._engine.background import drain
from idempotency._engine.lease import Lease
from idempotency._engine.runner import Runner
from idempotency._engine.transaction import transactions
from idempotency._http.body import Body, DisconnectedError, Receive, Send, read_body
from idempotency._http.capture import ResponseCapture, send_response
from idempotency._http.codec import Headers, StoredResponse, decode_response, encode_response
from idempotency._http.disconnect import Disconnect
from idempotency._http.exit_stacks import ExitStacks
from idempotency._http.fingerprint import authorization_scope, fingerprint, json_digest, scope_text, value_digest
from idempotency._http.key import read_key, read_prefer_wait
from idempotency._http.problem import DRAFT, check_docs, problem_response
from idempotency._http.routes import Routes
from idempotency._rules import (
    Claim,
    Completed,
    Execute,
    InProgress,
    Known,
    Mismatch,
    Replay,
    Unknown,
    Unreadable,
)
from idempotency.errors import (
    BodyInvalidError,
    ConfigurationError,
    IdempotencyError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    RequestTooLargeError,
    StoreError,
    UnreadableError,
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
Caller = str | bytes | int | None
CallerScope = Callable[["Request"], Caller | Awaitable[Caller]]

_SERVER_ERROR = encode_response(500, [(b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error")


_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.1


class IdempotencyMiddleware:
    """Make retried requests that carry an ``Idempotency-Key`` take effect once.

    ``store``: a :class:`~idempotency.stores.base.Store`, or a URL for :func:`~idempotency.open_store`, whose store is
    then closed at the application's shutdown.
    ``policy``: what every protected route is given. ``policies``: other policies by route, ``"POST /payments/{id}"``
    or ``"/payments"``, as ``app`` sees its paths (without ``root_path``); None takes a route out of scope.
    ``session``: makes the middleware transactional. ``store`` is then an :class:`~idempotency.stores.sql.SQLStore` on
    the same database, and ``request.state.idempotency.session`` is a session of this factory, begun at its first use
    and committed with the recorded response, before the response is sent. Handlers do not commit it.
    ``scope``: who is calling. Default ``"authorization"``: a digest of the Authorization header. A callable, sync or
    async, is given the Starlette ``Request`` (with ``state``) and returns the caller's name; what it raises is
    answered as a handler's exception. None is the opt-out: one key space for all callers, in which one caller's key
    answers another with the first one's response.
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
        if scope is not None and scope != "authorization" and not callable(scope):
            raise ConfigurationError(f'scope must be "authorization", a callable or None, not {scope!r}')
        for option, name in (("header_name", header_name), ("replayed_header", replayed_header)):
            if not isinstance(name, str) or not _FIELD_NAME.fullmatch(name):
                raise ConfigurationError(f"{option} must be the name of a header, not {name!r}")
        if secret is not None and (not isinstance(secret, str | bytes) or not secret):
            raise ConfigurationError("secret must be bytes or text, and not empty; None: the digests are not keyed")
        if not callable(on_event):
            raise ConfigurationError(f"on_event must be callable, not {type(on_event).__name__}")
        self.app = app
        self.caller = scope
        self.secret = secret.encode() if isinstance(secret, str) else secret
        self.header_name = header_name.lower().encode("ascii")
        self.replayed = (replayed_header.lower().encode("ascii"), b"true")
        self.strict = strict
        self.docs = check_docs(docs)
        self._routes = Routes(policy if policy is not None else Policy(), policies or {})
        self._opened = isinstance(store, str)
        self._hears_of_stop = False
        opened = open_store(store) if isinstance(store, str) else store
        check_store(opened, Store)
        self.runner = Runner(opened, on_event)
        if callable(scope) or self._routes.calls_back:
            _require_starlette()
        self.transactions = None if session is None else transactions(self.runner.store, session)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            # Some servers hand on the method as it was sent, and some frameworks read "post" as POST.
            policy = self._routes.policy_for(scope["method"].upper(), _route_path(scope))
            if policy is not None:
                exchange = _Exchange(self, policy, scope, receive, send)
                await exchange.run()
                if self.runner.writes and not self._hears_of_stop and _stops_gracefully():
                    # The answer is out. A server that stops waits for its requests, and for nothing else.
                    await exchange.written()
                return
        elif scope["type"] == "lifespan":
            await self.app(scope, _drain_after(receive), self._close_after(send))
            return
        await self.app(scope, receive, send)

    def _close_after(self, send: Send) -> Send:
        async def send_and_close(message: MutableMapping[str, Any]) -> None:
            match message["type"]:
                case "lifespan.startup.complete":
                    self._hears_of_stop = True
                case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                    await drain()
                    if self._opened:
                        await self.runner.store.aclose()
            await send(message)

        return send_and_close


def _stops_gracefully() -> bool:
    """Say whether the process goes on after a SIGTERM, as servers do to wait for their requests."""
    return signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)


def _drain_after(receive: Receive) -> Receive:
    """Finish what is still to be recorded before the application, at its end, closes what that is recorded with."""

    async def receive_and_drain() -> MutableMapping[str, Any]:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            await drain()
        return message

    return receive_and_drain


class _AnsweredError(Exception):
    """A callable of the user's raised, and the application's answer to that is sent."""


class _NoResponse(BaseException):
    """The application returned without a response, as some do when their client is gone: it was stopped anywhere."""


class _Exchange:
    """One request to a protected route: parse, scope, fingerprint, claim, run, record, send."""

    __slots__ = (
        "_claim",
        "_given_state",
        "_lease",
        "_outer_state",
        "_policy",
        "_receive",
        "_scope",
        "_send",
        "_shared",
        "_state",
    )

    def __init__(
        self, shared: IdempotencyMiddleware, policy: Policy, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._shared = shared
        self._policy = policy
        self._scope = scope
        self._receive = receive
        self._send = send
        self._claim: Claim | None = None
        self._lease: Lease

    async def run(self) -> None:
        if not isinstance(self._scope["headers"], list | tuple):
            self._scope["headers"] = list(self._scope["headers"])  # any iterable by ASGI, and read more than once here
        try:
            key = read_key(self._scope["headers"], self._shared.header_name, strict=self._shared.strict)
            if key is None:
                if self._policy.required:
                    raise KeyMissingError(
                        f"This operation needs a key in the header {self._shared.header_name.decode()}."
                    )
                await self._unprotected(self._receive)
                return
            if self._is_protected_already(key):
                await self._shared.app(self._scope, self._receive, self._send)
                return
            caller = await self._caller()
            body = await self._read()
        except (KeyMissingError, KeyInvalidError, RequestTooLargeError) as error:
            await self._refuse("refused", error)
            return
        except (DisconnectedError, _AnsweredError):
            return
        try:
            await self._keyed(key, caller, body)
        except _AnsweredError:
            return
        finally:
            body.close()

    async def written(self) -> None:
        """Wait until what is written in the background for this request is written: for a lease at the most."""
        if self._claim is not None:
            await self._shared.runner.written(self._claim)

    def _is_protected_already(self, key: str) -> bool:
        """Say whether the middleware was added twice, as to an application and one mounted in it."""
        # Seen in both places: some servers share a state among requests, and a task that outlives its request keeps
        # its context.
        outer = RUNNING.get()
        if outer is None or (outer.key, outer.name) != (key, self._name()):
            return False
        return _state_of(self._scope.get("state")).get("idempotency") is outer

    async def _caller(self) -> str:
        caller, secret = self._shared.caller, self._shared.secret
        if caller is None:
            return scope_text(None, secret)
        if isinstance(caller, str):
            return authorization_scope(self._scope["headers"], secret)
        from starlette.requests import Request

        return scope_text(await self._call(caller, Request(self._scope), self._receive), secret)

    async def _call(self, function: Callable[[Request], Any], request: Request, receive: Receive) -> Any:
        """Call what the user gave; what it raises is answered as if a handler had raised it."""
        from idempotency._http.callables import ReadRequest, answer

        try:
            value = function(request)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            if isinstance(request, ReadRequest) and request.is_malformed(error):
                await self._refuse("refused", BodyInvalidError())
                raise _AnsweredError from error
            self._enter_state(None)
            if not await answer(error, self._shared.app, self._scope, receive, self._send):
                raise
            self._emit("refused", error)
            raise _AnsweredError from error
        finally:
            await request.close()  # of the files of a form that it has read

    async def _read(self) -> Body:
        limit = self._policy.max_request
        length = self._header(b"content-length")
        # Announced too large: refused before it is read. 19 digits are more than any limit.
        if length is not None and length.isdigit() and int(length[:19]) > limit:
            raise RequestTooLargeError(f"The body of a request with a key may have {limit} bytes.")
        return await read_body(self._receive, limit, self._header(b"content-type"))

    def _header(self, name: bytes) -> bytes | None:
        for field, value in self._scope["headers"]:
            if field == name:
                return bytes(value)
        return None

    async def _fingerprint(self, body: Body) -> bytes:
        scope, rule = self._scope, self._policy.fingerprint
        digest = body.digest
        if rule == "json" and body.data is not None:
            # Parsing a large body would hold up the event loop.
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
            scope["method"], scope["path"], scope["query_string"], content_type, digest, self._shared.secret
        )

    async def _keyed(self, key: str, caller: str, body: Body) -> None:
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
            verdict, claimed_at = await self._shared.runner.claim(claim, self._wait())
        except StoreError as error:
            if policy.on_store_error == "fail_open" and not isinstance(error, WaitFailedError):
                self._emit("unprotected", error)
                await self._unprotected(body.receive(self._receive))
            else:
                await self._refuse("unavailable", error, _again_after(error))
            return
        if isinstance(verdict, Execute):
            transaction = self._shared.transactions(claim) if self._shared.transactions is not None else None
            operation = Operation(claim, verdict.attempt, transaction, self._name())
            self._lease = Lease(
                self._shared.runner,
                claim,
                operation,
                self._name(),
                claimed_at,
                transaction,
                policy.outcome_of_exception,
            )
            await self._execute(operation, body.receive(self._receive))
        else:
            await send_response(self._send, self._answer(verdict))

    def _wait(self) -> float:
        cap = self._policy.wait
        if cap == 0:
            return 0.0
        preferred = read_prefer_wait(self._scope["headers"])
        return cap if preferred is None else min(preferred, cap)

    async def _execute(self, operation: Operation, receive: Receive) -> None:
        disconnect = Disconnect(receive, lambda context: context.get(RUNNING) is operation)
        stacks = ExitStacks(self._scope, self._shared.app)
        capture = ResponseCapture(self._send, self._policy.max_response, self._settle, disconnect, stacks)
        self._enter_state(operation)
        token = RUNNING.set(operation)
        try:
            await self._shared.app(self._scope, disconnect, capture)
            await capture.flush()
            if not self._lease.ended:
                await self._failed(_NoResponse())
        except BaseException as error:
            capture.drop()
            # Settled already: the response is recorded and sent, and a background task failed or was cancelled.
            if not self._lease.ended:
                await self._failed(error)
            raise
        finally:
            disconnect.tell()
            self._leave_state()
            RUNNING.reset(token)
            await self._lease.close()

    def _enter_state(self, operation: Operation | None) -> None:
        """Give the request a state of its own: some servers share one among requests, as batch endpoints do theirs."""
        self._outer_state = self._scope.get("state")
        self._given_state = dict(_state_of(self._outer_state))
        self._state = self._scope["state"] = {**self._given_state, "idempotency": operation}

    def _share_state(self) -> None:
        """Show what stands outside what the application has put into the state, and nothing that is older."""
        outer, given = _state_of(self._outer_state), self._given_state
        if len(self._state) > 1 and isinstance(outer, MutableMapping):
            for name, value in self._state.items():
                if name != "idempotency" and (name not in given or given[name] is not value):
                    outer[name] = given[name] = value

    def _leave_state(self) -> None:
        self._share_state()
        # A task may outlive the request, with this state in its hands.
        self._state["idempotency"] = None
        if self._outer_state is not None and self._scope.get("state") is self._state:
            self._scope["state"] = self._outer_state

    async def _settle(self, status: int, headers: Headers, body: bytes | None) -> StoredResponse | None:
        self._share_state()
        outcome = self._lease.operation.outcome_after(self._policy.outcome_of_status(status))
        result = encode_response(status, headers, body) if outcome == "store" and body is not None else None
        try:
            # A 5xx is how frameworks answer an exception, so it is a failure, whatever is recorded of it.
            told = await self._lease.end(outcome, result, failed=status >= 500)
        except StoreError as error:
            # The transaction did not commit, or nobody can say: the same request may be sent again either way.
            return self._problem("unavailable", error, _again_after(error))
        except Exception as error:
            # Refused by the database at the last moment: the operation's own failure, as if its code had raised it.
            if not self._lease.ended:
                await self._failed(error)
            raise
        return None if told is None else self._answer(told)

    async def _failed(self, error: BaseException) -> None:
        outcome = self._lease.operation.outcome_after(self._policy.outcome_of_exception(error))
        await self._lease.end(outcome, _SERVER_ERROR if outcome == "store" else None, error, failed=True)

    async def _unprotected(self, receive: Receive) -> None:
        state = _state_of(self._scope.setdefault("state", {}))
        if isinstance(state, dict) and state.get("idempotency") is None:
            state["idempotency"] = None
            await self._shared.app(self._scope, receive, self._send)
            return
        self._enter_state(None)
        try:
            await self._shared.app(self._scope, receive, self._send)
        finally:
            self._leave_state()

    def _answer(self, told: Known) -> StoredResponse:
        match told:
            case Replay(result):
                try:
                    response = decode_response(result)
                except UnreadableError as error:
                    return self._problem("unreadable", error)
                self._emit("replayed")
                return StoredResponse(response.status, [*response.headers, self._shared.replayed], response.body)
            case Completed():
                return self._problem("completed", NotReplayableError())
            case InProgress(retry_after):
                return self._problem("in-progress", InProgressError(), retry_after)
            case Mismatch():
                return self._problem("mismatch", KeyReusedError())
            case Unknown():
                return self._problem("unknown", OutcomeUnknownError())
            case Unreadable(version):
                return self._problem("unreadable", UnreadableError(f"its format is {version}"))
            case _:
                assert_never(told)

    async def _refuse(self, kind: EventKind, error: IdempotencyError, retry_after: float | None = None) -> None:
        await send_response(self._send, self._problem(kind, error, retry_after))

    def _problem(self, kind: EventKind, error: IdempotencyError, retry_after: float | None = None) -> StoredResponse:
        self._emit(kind, error)
        return problem_response(error, docs=self._shared.docs, retry_after=retry_after)

    def _emit(self, kind: EventKind, error: BaseException | None = None) -> None:
        self._shared.runner.emit(kind, self._name(), self._claim, error=error)

    def _name(self) -> str:
        return f"{self._scope['method']} {self._scope['path']}"


def _again_after(error: StoreError) -> float | None:
    return 1.0 if error.retryable else None


def _route_path(scope: Scope) -> str:
    """Return the path as the application's own routes see it: without what it is mounted under."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _state_of(state: object) -> Mapping[str, Any]:
    """Return the mapping behind the ``state`` of a scope: ASGI's is one, Starlette's ``State`` wraps one."""
    if not isinstance(state, dict):
        state = getattr(state, "_state", state)
    return state if isinstance(state, Mapping) else {}


def _require_starlette() -> None:
    try:
        import starlette.requests  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "a callable scope or fingerprint is given a Starlette Request: pip install starlette"
        ) from error

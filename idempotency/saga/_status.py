"""SagaAnswer over HTTP how a saga stands: 202 with a URL at first, and at that URL its result once there is one."""

from __future__ import annotations

import hmac
import json
import math
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from idempotency._http.body import Receive, Send
from idempotency._http.capture import send_response
from idempotency._http.codec import StoredResponse
from idempotency._http.problem import DRAFT, Problem, check_docs, describe, problem_response
from idempotency._results.codec import PLAIN_RESULTS
from idempotency._rules import InProgress, pause
from idempotency._sagas.journal import Look, Phase, Row, saga_id
from idempotency.errors import ConfigurationError, StoreError, UnreadableError
from idempotency.saga._ask import Journal
from idempotency.saga._saga import AsyncSaga, SyncSaga
from idempotency.saga.errors import SagaFailedError, SagaLostError, SagaPendingError, SagaStuckError

_LONGEST_PAUSE = 60.0
"""Seconds after which a client asks again at the latest: a signal may end a wait at any time."""

_SHORTEST_SECRET = 32
_SIGNATURE = 16
"""Bytes of a signature in a URL."""

Scope = MutableMapping[str, Any]


class SagaAnswer:
    """A response with ``status``, ``headers`` and ``body``, which is an ASGI application too.

    Starlette sends what a handler of it, or an exception handler of it or of FastAPI, returns. Elsewhere make the
    framework's response of its attributes.
    """

    def __init__(self, response: StoredResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
        self.body = response.body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; without its body to HEAD."""
        response = self._response
        if scope["method"] == "HEAD":
            response = StoredResponse(response.status, response.headers, b"")
        await send_response(send, response)


class SagaStatus:
    """An ASGI application that answers how a saga stands, and the first answer that names its URL.

    The URL of a saga ends with its id and a signature of the id. Who has the URL may read the result of the saga; it
    cannot be made from another one, or from a key, without the secret. So hand it only to the caller of the saga, and
    mount the application behind what authenticates your callers if a URL that leaks must not be enough.

    ``sagas``: those that it answers for. ``secret``: at least 32 characters, the same in each process; several: the
    first one signs, each is accepted. ``url``: where the application is mounted, a path or a whole URL. ``docs``: the
    URL of your documentation, to which problems link.

    GET answers 200 with ``{"status": "done", "result": ...}``; 202 with ``{"status": "pending"}`` and ``Retry-After``
    while the saga runs, waits or is undone; 409 with a problem (RFC 9457) for one that has failed and is undone, or is
    stuck; 404 for any other URL, and once the saga has expired; 503 where the store fails. The result is as it is
    recorded, JSON by the annotation of the saga's function, and absent where it is none, as for bytes.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        sagas: Sequence[AsyncSaga[Any] | SyncSaga[Any]],
        *,
        secret: str | Sequence[str],
        url: str,
        docs: str = DRAFT,
    ) -> None:
        self._names = {saga.name for saga in sagas}
        stores = {id(saga._definition.store): saga._definition.store for saga in sagas}
        self._journals = [Journal(store, "the status of sagas") for store in stores.values()]
        secrets = [secret] if isinstance(secret, str) else list(secret)
        if not secrets or any(len(each) < _SHORTEST_SECRET for each in secrets):
            raise ConfigurationError(f"secret must have at least {_SHORTEST_SECRET} characters: it signs the URLs")
        if not url.startswith(("/", "https://", "http://")) or not url.isascii() or not url.isprintable():
            raise ConfigurationError(f"url is where the application is mounted, such as /sagas, not {url!r}")
        self._secrets = [each.encode() for each in secrets]
        self._url = url.rstrip("/")
        self._docs = check_docs(docs)

    def url(self, name: str, key: str) -> str:
        """Return the URL of the saga of this name and key."""
        if name not in self._names:
            raise ConfigurationError(f"there is no saga {name} among those of the status: list it there")
        record = saga_id(name, key)
        ticket = urlsafe_b64encode(record + _signature(self._secrets[0], record)).decode()
        return f"{self._url}/{ticket}"

    def accepted(
        self, of: SagaPendingError | SagaLostError | AsyncSaga[Any] | SyncSaga[Any], key: str | None = None
    ) -> SagaAnswer:
        """Return the 202 that names the URL of a saga: that of an error, or the one that was started with ``key``."""
        wait = of.retry_after if isinstance(of, SagaPendingError) else 1.0
        if key is None:
            if not isinstance(of, SagaPendingError | SagaLostError):
                raise ConfigurationError("accepted() needs the error of a saga, or a saga and its key")
            key = of.key
        location = (b"location", self.url(of.name, key).encode())
        return SagaAnswer(_pending(wait, location))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """SagaAnswer one request."""
        if scope["type"] != "http":
            raise ValueError(f"the status of sagas is HTTP, not {scope['type']}")
        await SagaAnswer(await self._answer(scope["method"], scope["path"]))(scope, receive, send)

    async def _answer(self, method: str, path: str) -> StoredResponse:
        if method not in ("GET", "HEAD"):
            refusal = self._problem(405, "method-not-allowed", "The status of a saga is only read")
            return StoredResponse(405, [*refusal.headers, (b"allow", b"GET, HEAD")], refusal.body)
        record = self._record(path.rpartition("/")[2])
        try:
            row = None if record is None else await self._find(record)
        except (StoreError, UnreadableError) as error:
            return problem_response(describe(error, docs=self._docs))
        if row is None or row.name not in self._names:
            return self._problem(404, "saga-unknown", "There is no such saga, or it has expired")
        return self._answer_of(row)

    def _answer_of(self, row: Row) -> StoredResponse:
        if row.phase is Phase.DONE:
            return _done(row.result or b"")
        if row.phase is Phase.UNDONE:
            return problem_response(describe(SagaFailedError(), docs=self._docs))
        if row.due_in is None:
            return problem_response(describe(SagaStuckError(), docs=self._docs))
        return _pending(pause(InProgress(retry_after=row.due_in, age=row.age)) if row.token else row.due_in)

    async def _find(self, record: bytes) -> Row | None:
        for journal in self._journals:
            if (saga := await journal.ask(Look(id=record))) is not None:
                return saga.row
        return None

    def _record(self, ticket: str) -> bytes | None:
        try:
            data = urlsafe_b64decode(ticket.encode("ascii"))
        except ValueError:
            return None
        record, signature = data[:-_SIGNATURE], data[-_SIGNATURE:]
        signed = [hmac.compare_digest(signature, _signature(secret, record)) for secret in self._secrets]
        return record if any(signed) else None

    def _problem(self, status: int, code: str, title: str) -> StoredResponse:
        return problem_response(
            Problem(
                status=status,
                code=code,
                title=title,
                detail=f"{title}.",
                retryable=False,
                safe_new_key=False,
                retry_after=None,
                lease_left=None,
                docs=self._docs,
            )
        )


def _signature(secret: bytes, record: bytes) -> bytes:
    return hmac.digest(secret, b"saga-status:1:" + record, "sha256")[:_SIGNATURE]


def _pending(seconds: float, *headers: tuple[bytes, bytes]) -> StoredResponse:
    wait = math.ceil(min(max(seconds, 1.0), _LONGEST_PAUSE))
    return _json(202, {"status": "pending"}, (b"retry-after", b"%d" % wait), *headers)


def _done(result: bytes) -> StoredResponse:
    document: dict[str, Any] = {"status": "done"}
    with suppress(UnreadableError):  # it is no JSON
        document["result"] = PLAIN_RESULTS.decode(result)
    return _json(200, document)


def _json(status: int, document: dict[str, Any], *headers: tuple[bytes, bytes]) -> StoredResponse:
    body = json.dumps(document).encode("ascii")
    own = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    return StoredResponse(status, [*own, *headers, (b"content-length", b"%d" % len(body))], body)

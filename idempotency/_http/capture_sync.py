"""The response of one operation in WSGI: collected until it is recorded, or sent live where it cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from time import monotonic
from types import TracebackType
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from idempotency._http import capture
from idempotency._http.codec import StoredResponse
from idempotency.operation import RUNNING, Operation
from idempotency.policy import Headers

Settle = Callable[[int, Headers, bytes | None], StoredResponse | None]
"""Record a response (body None: it cannot be recorded); return what to send in its place, or None to send it."""

Fields = list[tuple[str, str]]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]
Write = Callable[[bytes], object]


class SyncResponseCapture:
    """The ``start_response`` of one operation, and the iterable that the server is given.

    A response that ends within ``limit`` bytes is settled and then sent, in however many pieces it comes. So a client
    never has a success that is not recorded. A larger one, an event stream, or one still unfinished after
    :data:`idempotency._http.capture.PATIENCE` is settled without its body and then sent live. What was
    collected cannot be sent before the application yields its next piece.

    ``start_instead`` starts a response that is sent in the place of the application's. ``operation`` is the current one
    while the application runs, is iterated and is closed. ``end`` is called once, at the end of :meth:`close`.
    """

    __slots__ = (
        "_chunks",
        "_end",
        "_iterable",
        "_late",
        "_limit",
        "_operation",
        "_rest",
        "_server",
        "_settle",
        "_settled",
        "_size",
        "_start",
        "_start_instead",
        "_write",
    )

    def __init__(
        self,
        start_response: StartResponse,
        start_instead: StartResponse,
        limit: int,
        settle: Settle,
        operation: Operation,
        end: Callable[[], object],
    ) -> None:
        self._server = start_response
        self._start_instead = start_instead
        self._limit = limit
        self._settle = settle
        self._operation = operation
        self._end = end
        self._settled: bool | None = False  # None: another response was sent in its place, and the rest is dropped
        self._start: tuple[int, str, Fields, Headers] | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._late: float | None = None
        self._write: Write | None = None
        self._iterable: Iterable[bytes] = ()
        self._rest: Iterator[bytes] = iter(())

    def run(self, app: WSGIApplication, environ: WSGIEnvironment) -> None:
        """Run the application until its response is settled."""
        with self._running():
            self._iterable = app(environ, self)
            self._rest = iter(self._iterable)
            if self._settled is False and self._is_event_stream():
                self._finish(None)
            while self._settled is False:
                chunk = next(self._rest, None)
                if chunk is not None:
                    self._take(chunk)
                elif self._start is None:
                    raise RuntimeError("The application returned without a call of start_response.")
                else:
                    self._finish(b"".join(self._chunks))

    def __call__(self, status: str, headers: Fields, exc_info: ExcInfo | None = None, /) -> Write:
        """Take the start of the response: the ``start_response`` of the application."""
        if exc_info is not None and exc_info[1] is not None and self._settled is not False:
            # Too late: the first start may be sent already.
            raise exc_info[1].with_traceback(exc_info[2])
        if exc_info is None and self._start is not None:
            raise RuntimeError("The application called start_response twice.")
        # It replaces the first start: the application cancelled the response that it had begun.
        self._chunks, self._size = [], 0
        # In lower case, as every application of ASGI sends them.
        pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._start = int(status.partition(" ")[0]), status, list(headers), pairs
        return self._written

    def __iter__(self) -> SyncResponseCapture:
        return self

    def __next__(self) -> bytes:
        if self._chunks:
            return self._collected()
        if self._settled is None:
            raise StopIteration
        with self._running():
            return next(self._rest)

    def close(self) -> None:
        """Close what the application has returned, which may have work to do after the response."""
        iterable, self._iterable = self._iterable, ()
        try:
            with self._running():
                close_iterable(iterable)
        finally:
            self._end()

    @contextmanager
    def _running(self) -> Iterator[None]:
        # Not from the call to the close: a server may never close, and use the thread for the next request.
        token = RUNNING.set(self._operation)
        try:
            yield
        finally:
            RUNNING.reset(token)

    def _written(self, data: bytes) -> None:
        """Take a piece of the body: the ``write`` of the application."""
        self._take(data)
        if self._write is not None and self._chunks:
            self._write(self._collected())

    def _take(self, chunk: bytes) -> None:
        if self._settled is None or not chunk:
            return
        if self._start is None:
            raise RuntimeError("The application sent a response body before the call of start_response.")
        self._chunks.append(bytes(chunk))
        self._size += len(chunk)
        if self._settled is False:
            now = monotonic()
            if self._late is None:
                self._late = now + capture.PATIENCE
            if self._size > self._limit or now >= self._late or self._is_event_stream():
                self._finish(None)

    def _is_event_stream(self) -> bool:
        return self._start is not None and capture.is_event_stream(self._start[3])

    def _collected(self) -> bytes:
        chunks, self._chunks = self._chunks, []
        return b"".join(chunks)

    def _finish(self, body: bytes | None) -> None:
        """Settle the response, then send its start, or the whole response that takes its place."""
        assert self._start is not None
        status, line, fields, headers = self._start
        instead = self._settle(status, headers, body)
        self._settled = True if instead is None else None
        if instead is None:
            self._write = self._server(line, fields)
        else:
            self._chunks = send_response_sync(self._start_instead, instead)


class Closing:
    """What an application has returned, with a function that is called after its ``close()``."""

    __slots__ = ("_end", "_iterable")

    def __init__(self, iterable: Iterable[bytes], end: Callable[[], object]) -> None:
        self._iterable = iterable
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._iterable)

    def close(self) -> None:
        """Close what the application has returned, then call the function."""
        try:
            close_iterable(self._iterable)
        finally:
            self._end()


def close_iterable(iterable: Iterable[bytes]) -> None:
    """Call ``close()`` where there is one (PEP 3333)."""
    close = getattr(iterable, "close", None)
    if close is not None:
        close()


def send_response_sync(start_response: StartResponse, response: StoredResponse) -> list[bytes]:
    """Start a whole response, and return its body."""
    fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers]
    start_response(status_line(response.status), fields)
    return [response.body] if response.body else []


def status_line(status: int) -> str:
    """Return a status with its reason phrase."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} Unknown"


def echoing(start_response: StartResponse, name: bytes, key: bytes) -> StartResponse:
    """Return a ``start_response`` that puts the key into each response, in place of what the application sends."""
    field, sent = name.decode("ascii"), key.decode("latin-1")

    def start(status: str, headers: Fields, exc_info: ExcInfo | None = None, /) -> Write:
        pairs = [*(pair for pair in headers if pair[0].lower() != field), (field, sent)]
        return start_response(status, pairs) if exc_info is None else start_response(status, pairs, exc_info)

    return start

"""How a response of WSGI is collected, recorded and sent (PEP 3333)."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest

from idempotency import Policy, current, drain_sync
from idempotency._http.caller import ANONYMOUS
from idempotency._rules import State, record_id
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.wsgi_calls import Answer, Effects, call, environ_of, protect, run

LINE = [("Content-Type", "text/plain")]


def plain(*pieces: bytes) -> Any:
    """Return a handler that answers 200 with these pieces."""

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", LINE)
        return list(pieces)

    return handler


def state_of(store: MemoryStore, key: str = "k") -> State | None:
    entry = store.inspect_sync(record_id(ANONYMOUS, key))
    return entry.state if entry is not None else None


def test_server_and_application_are_met_as_the_standard_says() -> None:
    """The checker of the standard library finds no fault on either side: first answer, replay, refusal and stream."""

    def checked(app: Any) -> Any:
        inner = validator(app)
        # The checker takes every name without a dot for one of CGI, which is a text.
        return lambda environ, start: inner({k: v for k, v in environ.items() if k != "idempotency"}, start)

    app = Effects(plain(b"one", b"two"))
    protected = validator(protect(checked(app)))
    streamed = validator(protect(checked(plain(b"x" * 100, b"y" * 100)), policy=Policy(max_response=150)))

    answers = [run(protected, environ_of(key=key, body=b"b")) for key in ("k", "k", '"bad')]
    sent = run(streamed, environ_of(key="k"))

    assert [(each.status, each.body[:6]) for each in answers[:2]] == [(200, b"onetwo")] * 2
    assert answers[1].replayed
    assert answers[2].code == "key-invalid"
    assert sent.body == b"x" * 100 + b"y" * 100
    assert app.runs == 1


def test_the_response_is_recorded_before_the_server_hears_of_it() -> None:
    """When the server is given the status, the record is done, also where the application is a generator."""
    store = MemoryStore()
    seen: list[State | None] = []

    def handler(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", LINE)
        seen.append(state_of(store))
        yield b"done"

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        seen.append(state_of(store))

    protect(Effects(handler), store)(environ_of(key="k"), start_response)

    assert seen == [State.RUNNING, State.DONE]


def test_what_write_is_given_comes_first() -> None:
    """The response is what was written and then what is yielded, and both are recorded."""

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", LINE)
        write(b"one ")
        write(b"two ")
        return [b"three"]

    protected = protect(Effects(handler))

    assert call(protected, key="k").body == b"one two three"
    assert (call(protected, key="k").body, call(protected, key="k").replayed) == (b"one two three", True)


def test_what_is_written_past_the_limit_is_sent_live() -> None:
    """What write() is given goes to that of the server, in order, once the response is too large to record."""

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", LINE)
        for piece in (b"12345", b"67890", b"abc"):
            write(piece)
        return [b"def"]

    protected = protect(Effects(handler), policy=Policy(max_response=8))

    first = call(protected, key="k")

    assert first.pieces == [b"1234567890", b"abc", b"def"]
    assert call(protected, key="k").code == "completed-not-replayable"


def test_an_application_that_starts_late() -> None:
    """A generator that calls start_response only when it is iterated is recorded as any other."""

    def handler(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield b""
        start_response("201 Created", [*LINE, ("X-A", "1"), ("x-a", "2")])
        yield b"late"

    protected = protect(Effects(handler))
    first, again = call(protected, key="k"), call(protected, key="k")

    assert first.starts == [("201 Created", [*LINE, ("X-A", "1"), ("x-a", "2")])]
    assert (again.status, again.body, again.replayed) == (201, b"late", True)
    assert [value for name, value in again.starts[0][1] if name == "x-a"] == ["1", "2"]


def test_an_error_page_replaces_what_was_begun() -> None:
    """With exc_info a second start replaces the first, and what was collected, while nothing is sent."""

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", LINE)(b"half")
        try:
            raise LookupError
        except LookupError:
            start_response("404 Not Found", LINE, sys.exc_info())
        return [b"none"]

    answer = call(protect(Effects(handler)), key="k")

    assert (answer.status, answer.body, len(answer.starts)) == (404, b"none", 1)


def test_an_error_page_after_the_first_byte_is_an_error() -> None:
    """Once the response is sent live, its start cannot be replaced: the error is raised, and the key is not freed."""

    def handler(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", LINE)
        yield b"123456789"
        try:
            raise LookupError("in the middle")
        except LookupError:
            start_response("500 Oh", LINE, sys.exc_info())

    app = Effects(handler)
    protected = protect(app, policy=Policy(max_response=4))

    with pytest.raises(LookupError, match="in the middle"):
        call(protected, key="k")
    assert call(protected, key="k").code == "completed-not-replayable"
    assert app.runs == 1


@pytest.mark.parametrize("fault", ["twice", "never", "before", "raises", "late"])
def test_an_application_that_breaks_off(fault: str) -> None:
    """The error reaches the server, what was returned is closed, and the key is free again."""
    closed: list[bool] = []

    class Pieces:
        def __init__(self, start_response: Any) -> None:
            self._start_response = start_response

        def __iter__(self) -> Iterator[bytes]:
            if fault == "never":
                return
            if fault != "before":
                self._start_response("200 OK", LINE)
            if fault == "twice":
                self._start_response("200 OK", LINE)
            yield b"piece"
            raise ValueError("in the middle")

        def close(self) -> None:
            closed.append(current() is not None)

    def handler(environ: Any, start_response: Any) -> Pieces:
        if fault == "raises":
            raise ValueError("at once")
        return Pieces(start_response)

    store = MemoryStore()
    events: list[Event] = []
    protected = protect(Effects(handler), store, on_event=events.append)

    with pytest.raises((RuntimeError, ValueError)):
        call(protected, key="k")

    assert closed == ([] if fault == "raises" else [True])
    assert [event.kind for event in events] == ["released"]
    assert state_of(store) is None
    assert current() is None


def test_close_comes_after_the_response_and_undoes_nothing() -> None:
    """What the application does when it is closed runs once, after the last byte, as its operation; it may fail."""
    steps: list[object] = []

    class Pieces(list[bytes]):
        def close(self) -> None:
            operation = current()
            steps.append(operation.key if operation else None)
            raise OSError("after the response")

    def handler(environ: Any, start_response: Any) -> Pieces:
        start_response("201 Created", LINE)
        return Pieces([b"one", b"two"])

    app = Effects(handler)
    protected = protect(app)
    answer = Answer()
    iterable = protected(environ_of(key="k"), answer.start_response)
    steps += iterable
    with pytest.raises(OSError, match="after the response"):
        iterable.close()  # type: ignore[attr-defined]
    again = call(protected, key="k")

    assert steps == [b"onetwo", "k"]
    assert (again.body, again.replayed, app.runs) == (b"onetwo", True, 1)


def test_the_operation_is_current_from_the_call_to_the_close() -> None:
    """In the call, in each iteration, also of a live response, and in close(); never in between, and not after it."""
    found: list[str | None] = []

    def note(environ: Any) -> None:
        operation = current()
        assert operation is environ["idempotency"]
        found.append(operation.key if operation else None)

    def handler(environ: Any, start_response: Any) -> Iterator[bytes]:
        try:
            for _ in range(4):
                note(environ)
                start_response("200 OK", LINE) if not found[1:] else None
                yield b"12345"
        finally:
            note(environ)

    environ = environ_of(key="k")
    iterable = protect(Effects(handler), policy=Policy(max_response=8))(environ, Answer().start_response)
    between: list[object] = []
    for _ in iterable:
        between.append(current())
    iterable.close()  # type: ignore[attr-defined]

    assert found == ["k"] * 5
    assert between == [None] * 3
    assert environ["idempotency"] is None


def test_without_a_key_there_is_no_operation() -> None:
    """The environ says None where a key would be protected; another method's environ is not touched."""
    found: list[object] = []

    def handler(environ: Any, start_response: Any) -> Any:
        found.append(environ.get("idempotency", "missing"))
        return plain()(environ, start_response)

    app = Effects(handler)
    protected = protect(app)

    call(protected)
    call(protected, method="GET", key="k")

    assert found == [None, "missing"]


def test_an_event_stream_is_sent_as_it_is_made() -> None:
    """Its start is sent before its first event is made, and its retry learns that it cannot be replayed."""
    steps: list[str] = []

    def handler(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/event-stream")])

        def events() -> Iterator[bytes]:
            steps.append("made")
            yield b"data: 1\n\n"
            steps.append("made")
            yield b"data: 2\n\n"

        return events()

    protected = protect(Effects(handler))
    iterable = iter(protected(environ_of(key="k"), lambda *_: steps.append("start")))
    for piece in iterable:
        steps.append(piece[6:7].decode())

    assert steps == ["start", "made", "1", "made", "2"]
    assert call(protected, key="k").code == "completed-not-replayable"


def test_a_slow_response_is_sent_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is unfinished after two seconds is sent from then on, and remembered as completed."""
    now = [100.0]
    monkeypatch.setattr("idempotency._http.capture_sync.monotonic", lambda: now[0])
    running: list[int] = []

    def handler(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", LINE)
        for number in range(5):
            running.append(number)
            yield b"%d" % number
            now[0] += 0.9

    protected = protect(Effects(handler))
    iterable = iter(protected(environ_of(key="k"), Answer().start_response))

    assert next(iterable) == b"0123"
    assert running == [0, 1, 2, 3]
    assert list(iterable) == [b"4"]
    assert call(protected, key="k").code == "completed-not-replayable"


@pytest.mark.parametrize(
    ("status", "method"), [("204 No Content", "POST"), ("304 Not Modified", "POST"), ("200 OK", "HEAD")]
)
def test_a_response_without_a_body_is_replayed(status: str, method: str) -> None:
    """An empty response has no piece, as it had none, and keeps its header fields."""

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        start_response(status, [("ETag", '"1"'), ("X-Length", "7")])
        return []

    app = Effects(handler)
    protected = protect(app, policy=Policy(methods={"POST", "HEAD"}))
    first, again = call(protected, key="k", method=method), call(protected, key="k", method=method)

    assert (again.starts[0][0], again.pieces, again.replayed, app.runs) == (status, [], True, 1)
    assert first.starts == [(status, [("ETag", '"1"'), ("X-Length", "7")])]
    assert (again.headers["etag"], again.headers["x-length"]) == ('"1"', "7")


def test_a_file_is_recorded_if_it_is_small() -> None:
    """What wsgi.file_wrapper makes is read as any iterable, and its file is closed."""
    files = [io.BytesIO(b"small"), io.BytesIO(b"x" * 100_000)]

    def handler(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", LINE)
        return environ["wsgi.file_wrapper"](files[int(environ["PATH_INFO"][1:])])

    protected = protect(Effects(handler), policy=Policy(max_response=50_000))
    wrapped = {"wsgi.file_wrapper": FileWrapper}
    sent = [call(protected, f"/{number}", key=f"{number}", **wrapped).body for number in (0, 1)]

    assert sent == [b"small", b"x" * 100_000]
    assert [each.closed for each in files] == [True, True]
    assert call(protected, "/0", key="0").body == b"small"
    assert call(protected, "/1", key="1").code == "completed-not-replayable"


@pytest.mark.parametrize(("on_crash", "state"), [("rerun", None), ("hold", State.UNKNOWN)])
def test_a_worker_that_has_to_exit(on_crash: Any, state: State | None) -> None:
    """After SystemExit, as gunicorn raises at a time-out, how far the operation got is not known: on_crash decides."""

    def handler(environ: Any, start_response: Any) -> Any:
        raise SystemExit(1)

    store = MemoryStore()
    with pytest.raises(SystemExit):
        call(protect(Effects(handler), store, policy=Policy(on_crash=on_crash)), key="k")

    assert state_of(store) is state


def test_a_superseded_response_is_replaced() -> None:
    """Where another owner has taken over and finished, its response is the answer, and what was begun is closed."""
    clock = ManualClock()
    closed: list[bytes] = []

    class Pieces(list[bytes]):
        def close(self) -> None:
            closed.append(self[0])

    def handler(environ: Any, start_response: Any) -> Pieces:
        start_response("201 Created", LINE)
        if environ["idempotency"].attempt == 2:
            return Pieces([b"second"])
        clock.advance(31)
        assert call(protected, key="k").body == b"second"
        return Pieces([b"first"])

    protected = protect(Effects(handler), MemoryStore(clock=clock), policy=Policy(lease=30))
    late = call(protected, key="k")

    assert (late.status, late.body, late.replayed) == (201, b"second", True)
    assert closed == [b"second", b"first"]


def test_a_superseded_stream_is_replaced_as_a_whole() -> None:
    """Where that is found out when the stream would go live, nothing of it is sent, neither written nor yielded."""
    clock = ManualClock()

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("201 Created", LINE)
        if environ["idempotency"].attempt == 2:
            return [b"second"]
        clock.advance(31)
        call(protected, key="k")
        write(b"x" * 20)
        write(b"y")
        return [b"z"]

    protected = protect(Effects(handler), MemoryStore(clock=clock), policy=Policy(lease=30, max_response=10))
    late = call(protected, key="k")

    assert (late.status, late.body, late.replayed) == (201, b"second", True)


def test_a_store_that_fails_after_the_effect_does_not_change_the_answer() -> None:
    """The answer is delivered and the key stays claimed, until the record is written in the background."""
    store = FaultyStore().order("complete", "fail")
    events: list[str] = []
    app = Effects()
    protected = protect(app, store, on_event=lambda event: events.append(event.kind))

    first = call(protected, key="k")
    protected._runner._pending.wait()

    assert first.status == 201
    assert (call(protected, key="k").replayed, app.runs) == (True, 1)
    assert events == ["unrecorded", "stored", "replayed"]


def test_a_store_that_is_down_means_503_or_no_protection() -> None:
    """By policy nothing runs, or the application runs with its body and without an operation."""
    store = FaultyStore()
    store.down = True
    closed, opened = Effects(), Effects()

    refused = call(protect(closed, store), key="k")
    answer = call(protect(opened, store, policy=Policy(on_store_error="fail_open")), key="k", body=b"payload")
    store.down = False
    drain_sync()

    assert (refused.code, refused.headers["retry-after"], closed.runs) == ("store-unavailable", "1", 0)
    assert (answer.status, opened.bodies) == (201, [b"payload"])

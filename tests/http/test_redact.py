"""``Policy.redact``: what is recorded in place of a response that holds what must not be stored."""

from __future__ import annotations

import functools
import gzip
from typing import Any

import pytest

from idempotency import IdempotencyMiddleware, Policy
from idempotency.errors import ConfigurationError
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from tests.kit.asgi_calls import call, respond
from tests.kit.ledger import Ledger

CARD = b'{"card": "4111111111111111", "order": 7}'
HIDDEN = b'{"card": "...1111", "order": 7}'
HEADERS = [(b"content-type", b"application/json"), (b"x-card", b"4111111111111111"), (b"set-cookie", b"session=1")]


class Payments:
    """An application whose response holds the number of a card."""

    def __init__(self, status: int = 201) -> None:
        self.status = status
        self.runs = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        await send({"type": "http.response.start", "status": self.status, "headers": HEADERS})
        await send({"type": "http.response.body", "body": CARD})


def hide(status: int, headers: Any, body: bytes) -> Any:
    return (pair for pair in headers if pair[0] != b"x-card"), body.replace(b"411111111111", b"...")


async def test_the_first_response_is_sent_and_the_redacted_one_is_replayed():
    """The function is given what would be recorded: no cookies, which never are."""
    given: list[Any] = []

    def redact(*response: Any) -> Any:
        given.append(response)
        return hide(*response)

    store, payments = MemoryStore(), Payments()
    app = IdempotencyMiddleware(payments, store=store, policy=Policy(redact=redact))

    first, retry = [await call(app, key="k") for _ in range(2)]

    assert (first.status, first.headers, first.body) == (201, HEADERS, CARD)
    assert given == [(201, HEADERS[:2], CARD)]
    assert (retry.status, retry.replayed, retry.body, payments.runs) == (201, True, HIDDEN, 1)
    assert retry.header(b"x-card") is None
    [stored] = store._records.values()
    assert b"4111111111111111" not in stored.result


async def test_fields_over_the_body_follow_it():
    """A replay with the length of the first body is no valid message, and a digest of it tells what was hidden."""

    async def pay(scope: Any, receive: Any, send: Any) -> None:
        length = (b"Content-Length", b"%d" % len(CARD))
        await respond(send, 201, CARD, [length, (b"content-digest", b"sha-256=:AA=:"), (b"etag", b'"7"')])

    for redact, length, digest in ((hide, len(HIDDEN), None), (lambda _, *same: same, len(CARD), b"sha-256=:AA=:")):
        app = IdempotencyMiddleware(pay, store=MemoryStore(), policy=Policy(redact=redact))
        first, retry = [await call(app, key="k") for _ in range(2)]

        assert (first.body, len(retry.body)) == (CARD, length)
        assert retry.header(b"Content-Length") == b"%d" % length
        assert (retry.header(b"content-digest"), retry.header(b"etag")) == (digest, b'"7"')


@pytest.mark.parametrize(("coding", "replayed"), [(b"gzip", True), (b"br", False)])
async def test_a_compressed_body_is_decoded_first(coding: bytes, replayed: bool):
    """Nothing could be found in compressed bytes; what cannot be decoded is not stored at all."""
    given: list[bytes] = []
    packed = gzip.compress(CARD)

    def redact(status: int, headers: Any, body: bytes) -> Any:
        given.append(body)
        return hide(status, headers, body)

    async def pay(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 201, packed, [(b"content-encoding", coding), (b"content-length", b"%d" % len(packed))])

    store = MemoryStore()
    app = IdempotencyMiddleware(pay, store=store, policy=Policy(redact=redact))
    first, retry = [await call(app, key="k", headers=[(b"accept-encoding", coding)]) for _ in range(2)]

    assert (first.body, retry.replayed) == (packed, replayed)
    [stored] = store._records.values()
    if replayed:
        assert (given, retry.body, retry.header(b"content-encoding")) == ([CARD], HIDDEN, None)
        assert retry.header(b"content-length") == b"%d" % len(HIDDEN)
    else:
        assert (given, retry.code, stored.result) == ([], "completed-not-replayable", None)


async def fail_later(status: int, headers: Any, body: bytes) -> Any:
    return headers, body


@pytest.mark.parametrize(
    ("redact", "error"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda *_: None, "TypeError"),
        (lambda *response: fail_later(*response), "TypeError"),
        (lambda status, headers, body: (headers, "text"), "TypeError"),
        (lambda status, headers, body: ([("text", "text")], body), "TypeError"),
        (lambda status, headers, body: ([(b"one",)], body), "ValueError"),
    ],
)
async def test_a_function_that_fails_records_no_response(redact, error):
    """The operation is done, never again run, and nothing of its response is stored; the event names the error."""
    events: list[Any] = []
    store, payments = MemoryStore(), Payments()
    app = IdempotencyMiddleware(payments, store=store, policy=Policy(redact=redact), on_event=events.append)

    first, retry = [await call(app, key="k") for _ in range(2)]

    assert (first.status, first.body) == (201, CARD)
    assert (retry.code, payments.runs) == ("completed-not-replayable", 1)
    assert [(event.kind, event.error) for event in events[:1]] == [("stored-without-result", error)]
    [stored] = store._records.values()
    assert stored.result is None


async def test_a_response_that_is_not_recorded_is_not_redacted():
    calls: list[Any] = []
    app = IdempotencyMiddleware(Payments(503), store=MemoryStore(), policy=Policy(redact=lambda *it: calls.append(it)))

    assert (await call(app, key="k")).body == CARD
    assert calls == []


@pytest.mark.stores("sqlite")
async def test_a_function_that_fails_does_not_undo_the_transaction(ledger: Ledger):
    """The effect commits with its record, which has no response."""
    events: list[Any] = []

    async def pay(scope: Any, receive: Any, send: Any) -> None:
        await scope["state"]["idempotency"].session.execute(ledger.insert("paid"))
        await Payments()(scope, receive, send)

    assert isinstance(ledger.store, SQLStore)
    policy = Policy(redact=lambda *_: 1 / 0)
    app = IdempotencyMiddleware(pay, store=ledger.store, session=ledger.sessions, policy=policy, on_event=events.append)

    assert (await call(app, key="k")).body == CARD
    assert (await call(app, key="k")).code == "completed-not-replayable"
    assert [(event.kind, event.error) for event in events[:1]] == [("stored-without-result", "ZeroDivisionError")]
    assert await ledger.effects() == ["paid"]


class CalledLater:
    async def __call__(self, status: int, headers: Any, body: bytes) -> Any:
        return headers, body


@pytest.mark.parametrize("redact", [fail_later, functools.partial(fail_later, 200), CalledLater(), "card"])
def test_a_function_that_would_not_be_awaited_is_refused(redact):
    """It would never run, and everything would be stored."""
    with pytest.raises(ConfigurationError, match="redact must"):
        Policy(redact=redact)

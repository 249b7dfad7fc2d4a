"""The events of an operation: one for each outcome, without what the caller sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_args

import pytest

from idempotency import Policy
from idempotency._http.caller import ANONYMOUS
from idempotency._rules import record_id
from idempotency.events import Event, EventKind, log_event
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, respond
from tests.kit.time_travel import settled, travelling, travelling_store

KEY = "kEy-Y9pHd2"
BODY = b'{"card": "4111-b0dY"}'
ANSWER = b'{"token": "answ3r"}'
CREDENTIAL = b"Bearer cr3dential"
RECORD = record_id(ANONYMOUS, KEY).hex()[:12]


class Scene:
    """A protected application whose events are kept, and one request to it."""

    def __init__(self, **policy: Any) -> None:
        self.clock = ManualClock()
        self.store = FaultyStore(MemoryStore(clock=self.clock))
        self.events: list[Event] = []
        self.status: int | type[Exception] = 201
        self.app = Effects(self._handle)
        self.protected = protect(self.app, self.store, policy=Policy(**policy), on_event=self.events.append)

    async def _handle(self, scope: Any, receive: Any, send: Any) -> None:
        if isinstance(self.status, type):
            raise self.status("a message")
        await respond(send, self.status, ANSWER)

    async def ask(self, key: str | None = KEY, body: bytes = BODY) -> None:
        with suppress(ValueError):
            await call(self.protected, key=key, body=body)

    async def run(self) -> asyncio.Task[None]:
        """Begin a request, and leave it running."""
        self.app.gate = asyncio.Event()
        task = asyncio.create_task(self.ask())
        await self.app.running.wait()
        return task


async def _stored() -> Scene:
    scene = Scene()
    await scene.ask()
    return scene


async def _released() -> Scene:
    scene = Scene()
    scene.status = 503
    await scene.ask()
    return scene


async def _failed() -> Scene:
    scene = Scene()
    scene.status = ValueError
    await scene.ask()
    return scene


async def _held() -> Scene:
    scene = Scene(outcomes={201: "hold"})
    await scene.ask()
    return scene


async def _replayed() -> Scene:
    scene = await _stored()
    await scene.ask()
    return scene


async def _completed() -> Scene:
    scene = Scene(max_response=0)
    await scene.ask()
    await scene.ask()
    return scene


async def _in_progress() -> Scene:
    scene = Scene()
    task = await scene.run()
    await scene.ask()
    scene.app.gate.set()
    await task
    return scene


async def _mismatch() -> Scene:
    scene = await _stored()
    await scene.ask(body=b"other")
    return scene


async def _unknown() -> Scene:
    scene = await _held()
    await scene.ask()
    return scene


async def _unreadable() -> Scene:
    scene = await _stored()
    scene.store.inner._records[record_id(ANONYMOUS, KEY)].result = b"\xff"
    await scene.ask()
    return scene


async def _newer() -> Scene:
    scene = await _stored()
    scene.store.inner._records[record_id(ANONYMOUS, KEY)].version = 99
    await scene.ask()
    return scene


async def _missing() -> Scene:
    scene = Scene(required=True)
    await scene.ask(key=None)
    return scene


async def _malformed() -> Scene:
    scene = Scene()
    await scene.ask(key=f'"{KEY}')
    return scene


async def _large() -> Scene:
    scene = Scene(max_request=1)
    await scene.ask()
    return scene


async def _superseded() -> Scene:
    scene = Scene()
    task = await scene.run()
    scene.clock.advance(31)
    gate, scene.app.gate = scene.app.gate, None
    await scene.ask()
    gate.set()
    await task
    return scene


async def _unavailable() -> Scene:
    scene = Scene()
    scene.store.order("claim", "fail")
    await scene.ask()
    return scene


async def _unprotected() -> Scene:
    scene = Scene(on_store_error="fail_open")
    scene.store.order("claim", "fail")
    await scene.ask()
    return scene


async def _unrecorded() -> Scene:
    scene = Scene()
    scene.store.order("complete", "fail")
    await scene.ask()
    while len(scene.events) < 2:
        await asyncio.sleep(0.005)
    return scene


async def _unkeyed() -> Scene:
    scene = Scene()
    await scene.ask(key=None)
    return scene


# (kind, record known, attempt, error)
SCENES: list[tuple[Callable[[], Any], list[tuple[EventKind, bool, int, str]]]] = [
    (_stored, [("stored", True, 1, "")]),
    (_released, [("released", True, 1, "")]),
    (_failed, [("released", True, 1, "ValueError")]),
    (_held, [("held", True, 1, "")]),
    (_replayed, [("stored", True, 1, ""), ("replayed", True, 0, "")]),
    (_completed, [("stored-without-result", True, 1, ""), ("completed", True, 0, "NotReplayableError")]),
    (_in_progress, [("in-progress", True, 0, "InProgressError"), ("stored", True, 1, "")]),
    (_mismatch, [("stored", True, 1, ""), ("mismatch", True, 0, "KeyReusedError")]),
    (_unknown, [("held", True, 1, ""), ("unknown", True, 0, "OutcomeUnknownError")]),
    (_unreadable, [("stored", True, 1, ""), ("unreadable", True, 0, "UnreadableError")]),
    (_newer, [("stored", True, 1, ""), ("unreadable", True, 0, "UnreadableError")]),
    (_missing, [("refused", False, 0, "KeyMissingError")]),
    (_malformed, [("refused", False, 0, "KeyInvalidError")]),
    (_large, [("refused", False, 0, "RequestTooLargeError")]),
    # The owner that lost its key is an outcome; that its client is given the other's result is another.
    (_superseded, [("stored", True, 2, ""), ("superseded", True, 1, ""), ("replayed", True, 0, "")]),
    (_unavailable, [("unavailable", True, 0, "StoreError")]),
    (_unprotected, [("unprotected", True, 0, "StoreError")]),
    (_unrecorded, [("unrecorded", True, 1, "StoreError"), ("stored", True, 1, "")]),
    (_unkeyed, []),
]


@pytest.mark.parametrize(("scene", "expected"), SCENES, ids=[scene.__name__ for scene, _ in SCENES])
async def test_each_outcome_is_one_event(scene, expected):
    """Of its kind, with the operation, the record where there is one, and the failure's class."""
    done = await scene()
    assert done.events == [
        Event(
            kind=kind,
            operation="POST /orders",
            record=RECORD if known else "",
            attempt=attempt,
            error=error,
            detail="not applied, as ordered" if error == "StoreError" else "",
            route="POST other",
        )
        for kind, known, attempt, error in expected
    ]
    await settled()


@travelling
async def test_a_lost_lease_is_one_event():
    """Told when it is learnt, once."""
    events: list[Event] = []
    store = FaultyStore(travelling_store()).order("renew", "refuse")
    app = Effects()
    app.gate = asyncio.Event()
    first = asyncio.create_task(call(protect(app, store, on_event=events.append), key=KEY))
    await asyncio.sleep(60)
    app.gate.set()
    await first
    assert events[0] == Event(kind="lease-lost", operation="POST /orders", record=RECORD, attempt=1, route="POST other")
    assert [event.kind for event in events] == ["lease-lost", "stored"]


OF_DELIVERIES = {"dead-lettered", "unsettled"}
"""Kinds that only messages have, which are tested with their brokers."""

OF_SESSIONS = {"session-unused"}
"""Kinds of requests that have sessions, which are tested in ``tests/http/test_unused_session.py``."""


def test_every_kind_is_shown():
    """No kind of event exists that none of these tests has met."""
    shown = {kind for _, expected in SCENES for kind, *_ in expected} | {"lease-lost"}
    assert shown == set(get_args(EventKind)) - OF_DELIVERIES - OF_SESSIONS


WARNINGS = (
    OF_DELIVERIES
    | OF_SESSIONS
    | {
        "stored-without-result",
        "held",
        "unknown",
        "unreadable",
        "superseded",
        "lease-lost",
        "unavailable",
        "unprotected",
        "unrecorded",
    }
)


@pytest.mark.parametrize("kind", get_args(EventKind))
def test_the_level_of_each_kind(kind, caplog):
    """A warning where somebody should look, else a line for who searches."""
    caplog.set_level(logging.DEBUG, "idempotency")
    log_event(Event(kind=kind, operation="POST /orders", record="0123456789ab", attempt=2, error="StoreError"))
    [line] = caplog.records
    assert line.levelno == (logging.WARNING if kind in WARNINGS else logging.DEBUG)
    assert line.name == "idempotency"
    assert line.getMessage() == f"{kind} POST /orders record=0123456789ab attempt=2 error=StoreError"


def test_what_is_not_known_is_a_dash(caplog):
    """A line without a record or an error is as easy to read."""
    caplog.set_level(logging.DEBUG, "idempotency")
    log_event(Event(kind="refused", operation="POST /orders"))
    assert caplog.messages == ["refused POST /orders record=- attempt=0"]


def test_a_level_that_is_off_costs_no_line(caplog):
    """Debug lines are not made unless somebody listens."""
    caplog.set_level(logging.INFO, "idempotency")
    log_event(Event(kind="stored", operation="POST /orders"))
    log_event(Event(kind="held", operation="POST /orders"))
    assert caplog.messages == ["held POST /orders record=- attempt=0"]


@pytest.mark.parametrize("scene", [scene for scene, _ in SCENES], ids=[scene.__name__ for scene, _ in SCENES])
async def test_no_secret_is_told(scene, caplog, monkeypatch):
    """Neither key, body, answer nor credential is in an event, or in any logger's line at DEBUG."""
    caplog.set_level(logging.DEBUG)
    done = await scene()
    for event in done.events:
        log_event(event)
    text = caplog.text + repr(done.events)
    assert all(event.kind in caplog.text for event in done.events)
    for secret in (KEY, "4111-b0dY", "answ3r", "a message"):
        assert secret not in text
    await settled()


async def test_a_credential_is_not_told(caplog):
    """The caller is known by a digest, and that is in no event either."""
    caplog.set_level(logging.DEBUG)
    app = Effects(status=503)
    protected = protect(app)
    headers = [(b"authorization", CREDENTIAL), (b"cookie", b"session=cr3dential")]
    await call(protected, key=KEY, headers=headers, query=b"token=cr3dential")
    assert "released POST /orders" in caplog.text
    assert "cr3dential" not in caplog.text
    assert app.operations[0].scope not in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        "/a\nWARNING forged",
        "/a\rforged",
        "/a\x1b[2Jforged",
        "/a\u2028forged",
        "/a\u0085forged",
        "/a\x00forged",
        "/\udcffforged",
    ],
)
async def test_a_path_cannot_forge_a_line(path, caplog):
    """Whatever a path holds once its escapes are undone, it stays on one printable line."""
    caplog.set_level(logging.DEBUG, "idempotency")
    await call(protect(Effects()), path=path, key=KEY)
    [message] = caplog.messages
    assert message.isprintable()
    assert message.encode("utf-8").splitlines() == [message.encode("utf-8")]
    assert "forged" in message


def test_what_a_server_says_cannot_forge_a_line(caplog):
    """Databases answer in several lines, in which they quote what they were sent."""
    log_event(Event(kind="unavailable", operation="POST /", detail="it is away\nWARNING forged"))
    [message] = caplog.messages
    assert message.isprintable()
    assert "it is away" in message


async def test_a_readable_path_stays_readable(caplog):
    """Letters of any script are no danger."""
    caplog.set_level(logging.DEBUG, "idempotency")
    await call(protect(Effects()), path="/commandes/été 1", key=KEY)
    assert caplog.messages == [f"stored POST /commandes/été 1 record={RECORD} attempt=1"]


async def test_a_broken_hook_changes_no_answer(caplog):
    """Its failure is logged, without what the request was about."""

    def broken(event: Event) -> None:
        raise ValueError("metrics")

    reply = Reply()
    protected = protect(Effects(), on_event=broken)
    await protected(http_scope(key=KEY), Client(BODY), reply.send)
    assert reply.status == 201
    assert "the event hook failed" in caplog.text
    assert KEY not in caplog.text
    assert (await call(protected, key=KEY, body=BODY)).replayed

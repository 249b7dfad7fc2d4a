"""The outcome of a response by a rule that reads it, and how long a refusal of an anonymous caller is stored."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import strawberry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.routing import Route
from strawberry.asgi import GraphQL

from idempotency import IdempotencyMiddleware, Policy
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.testing.clock import ManualClock
from tests.kit.asgi_calls import Effects, call, protect, respond
from tests.test_docs_code import HTTP, run

pytestmark = pytest.mark.fronts("asgi", "wsgi")

__all__ = ["run"]

KNOWN = [(b"authorization", b"Bearer 1")]
"""Credentials, so that the caller is not anonymous."""


def answering(status: int = 200, body: bytes = b"secret", headers: Any = (), before: Any = None) -> Effects:
    """Make an application that answers always the same, after ``before`` was called with the operation."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        if before is not None:
            before(scope["state"]["idempotency"])
        await respond(send, status, body, headers)

    return Effects(handler)


async def twice(app: Any, **request: Any) -> Any:
    """Send a request twice, and return the second answer."""
    await call(app, key="k", **request)
    return await call(app, key="k", **request)


@pytest.mark.parametrize(
    ("chosen", "replayed", "runs"), [("store", True, 1), ("release", False, 2), ("hold", False, 1), (None, False, 2)]
)
async def test_the_rule_chooses_the_outcome(chosen: Any, replayed: bool, runs: int) -> None:
    """Over ``outcomes``, which decides where the rule returns None."""
    app = answering()

    again = await twice(protect(app, policy=Policy(outcome=lambda *_: chosen, outcomes={200: "release"})))

    assert (again.replayed, app.runs) == (replayed, runs)
    if chosen == "hold":
        assert again.code == "outcome-unknown"


async def test_the_rule_is_given_the_whole_response() -> None:
    """The status, the headers by their names in lower case with repeats joined, and the body in one piece."""
    given = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Type", b"text/x"), (b"X-Warning", b"one"), (b"x-warning", b"tw\xf6")]
        await send({"type": "http.response.start", "status": 207, "headers": headers})
        for piece in (b"a", b"b", b""):
            await send({"type": "http.response.body", "body": piece, "more_body": bool(piece)})

    await call(protect(Effects(handler), policy=Policy(outcome=lambda *args: given.append(args))), key="k")

    assert given == [(207, {"content-type": "text/x", "x-warning": "one, tw\xf6"}, b"ab")]


@pytest.mark.parametrize(
    ("headers", "body"), [([], b"x" * 11), ([(b"content-type", b"text/event-stream")], b"data: 1\n\n")]
)
async def test_a_body_that_is_not_recorded_is_none(headers: Any, body: bytes) -> None:
    """The rule chooses an outcome all the same."""
    given = []

    def rule(status: int, headers: Any, body: bytes | None) -> Any:
        given.append(body)
        return "release"

    app = answering(200, body, headers)
    again = await twice(protect(app, policy=Policy(outcome=rule, max_response=10)))

    assert (given, again.status, again.body, app.runs) == ([None, None], 200, body, 2)


async def test_the_rule_is_not_asked_about_our_own_answers() -> None:
    """A replay, and a refusal of the library, are no responses of the application."""
    given: list[int] = []
    protected = protect(answering(201), policy=Policy(outcome=lambda status, *_: given.append(status)))

    for body, key in ((b"", "k"), (b"", "k"), (b"other", "k"), (b"", "not a key")):
        await call(protected, key=key, body=body)

    assert given == [201]


class MistakeError(Exception):
    """What a faulty rule raises."""


def raising(status: int, headers: Any, body: bytes | None) -> Any:
    """Fail, with the body in the message."""
    raise MistakeError(body)


async def awaiting(status: int, headers: Any, body: bytes | None) -> Any:
    """Choose, if it were awaited."""


class Incomparable:
    """A value like an array, which answers no question of equality."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise ValueError("secret")


@pytest.mark.parametrize(
    ("rule", "logged"),
    [
        (raising, "MistakeError"),
        (lambda status, headers, body: body.decode(), "str"),
        (lambda *_: True, "bool"),
        (lambda *_: ["store"], "list"),
        (lambda: "store", "TypeError"),
        (lambda *args: awaiting(*args), "coroutine"),
        (lambda *_: Incomparable(), "Incomparable"),
    ],
    ids=["raises", "text", "bool", "list", "parameters", "coroutine", "not comparable"],
)
async def test_a_rule_that_fails_does_not_change_the_answer(
    rule: Any, logged: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effect may exist: the default decides, and the log has the mistake without the body."""
    monkeypatch.setattr("idempotency._hooks._logged", set())  # each function is named once only
    app = answering()

    again = await twice(protect(app, policy=Policy(outcome=rule)))

    assert (again.status, again.body, again.replayed, app.runs) == (200, b"secret", True, 1)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("idempotency", logging.ERROR)
    assert logged in record.getMessage()
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("coding", "given"), [(b"gzip", b"secret"), (b"br", None)])
async def test_a_rule_reads_what_was_compressed(coding: bytes, given: bytes | None) -> None:
    """The body is decoded, or None where that is not possible; the response goes out as it is."""
    bodies: list[bytes | None] = []
    packed = gzip.compress(b"secret")
    app = answering(body=packed, headers=[(b"content-encoding", coding)])

    reply = await call(protect(app, policy=Policy(outcome=lambda *read: bodies.append(read[2]))), key="k")

    assert (reply.body, reply.header(b"content-encoding"), bodies) == (packed, coding, [given])


@pytest.mark.parametrize(
    ("declared", "chosen", "runs", "code"),
    [("hold", "release", 1, "outcome-unknown"), ("release", "store", 2, None), ("release", "hold", 2, None)],
)
async def test_what_the_handler_declares_wins_over_the_rule(declared: str, chosen: Any, runs: int, code: Any) -> None:
    """It knows whether the effect has happened."""
    app = answering(before=lambda operation: getattr(operation, declared)())

    again = await twice(protect(app, policy=Policy(outcome=lambda *_: chosen)))

    assert app.runs == runs
    assert code is None or again.code == code


async def test_a_rule_may_store_what_no_route_gave() -> None:
    """It decides before the framework is asked."""
    app = protect(Starlette(), policy=Policy(outcome=lambda *_: "store"))

    assert (await twice(app)).replayed


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """Make a database with a table of effects."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effects (what TEXT)"))
    await SQLStore(engine).create_schema()
    yield engine
    await engine.dispose()


async def effects(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return (await connection.execute(text("SELECT count(*) FROM effects"))).scalar_one()


def graphql_outcome(status: int, headers: Any, body: bytes | None) -> Any:
    """Release what has errors."""
    return "release" if body is not None and json.loads(body).get("errors") else None


@pytest.mark.fronts("asgi")
async def test_a_release_by_the_response_rolls_the_effect_back(engine: AsyncEngine) -> None:
    """With a session, the retry runs, and its effect is the only one."""
    answers = [b'{"errors": [{}], "data": null}', b'{"data": 1}']

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        session = scope["state"]["idempotency"].session
        await session.execute(text("INSERT INTO effects VALUES ('order')"))
        await respond(send, 200, answers.pop(0))

    app = Effects(handler)
    policy = Policy(outcome=graphql_outcome)
    protected = protect(app, SQLStore(engine), session=async_sessionmaker(engine), policy=policy)
    counts = []
    for _ in range(3):
        reply = await call(protected, key="k")
        counts.append(await effects(engine))

    assert (counts, app.runs, reply.body, reply.replayed) == ([0, 1, 1], 2, b'{"data": 1}', True)


@pytest.mark.fronts("asgi")
async def test_a_hold_by_the_response_rolls_the_effect_back(engine: AsyncEngine) -> None:
    """With a session, only a result that is stored commits its effect."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        session = scope["state"]["idempotency"].session
        await session.execute(text("INSERT INTO effects VALUES ('order')"))
        await respond(send, 200)

    policy = Policy(outcome=lambda *_: "hold")
    protected = protect(Effects(handler), SQLStore(engine), session=async_sessionmaker(engine), policy=policy)
    first, second = [await call(protected, key="k") for _ in range(2)]

    assert (first.status, second.code, await effects(engine)) == (200, "outcome-unknown", 0)


async def lives(seconds: float, app: Any, clock: ManualClock, **options: Any) -> list[bool]:
    """Say whether a response is replayed a second before, and a second after, that time."""
    headers = options.pop("headers", ())
    protected = protect(app, options.pop("store", None) or MemoryStore(clock=clock), **options)
    await call(protected, key="k", headers=headers)
    found = []
    for step in (seconds - 1, 2):
        clock.advance(step)
        found.append((await call(protected, key="k", headers=headers)).replayed)
    return found


@pytest.mark.parametrize(
    ("status", "seconds", "options"),
    [
        (404, 300, {}),
        (422, 300, {}),
        (400, 300, {"policy": Policy(outcomes={400: "store"})}),
        (400, 300, {"policy": Policy(outcome=lambda *_: "store")}),
        (422, 60, {"policy": Policy(ttl=60)}),
        (422, 300, {"scope": None}),
        (422, 300, {"scope": lambda request: None}),
        (201, 86400, {}),
        (303, 86400, {}),
        (500, 86400, {"policy": Policy(outcomes={500: "store"})}),
        (422, 86400, {"headers": KNOWN}),
        (422, 86400, {"scope": lambda request: "somebody"}),
    ],
)
async def test_a_refusal_of_an_anonymous_caller_is_stored_briefly(
    status: int, seconds: float, options: dict[str, Any]
) -> None:
    """For five minutes, or for its ttl if that is shorter; what has an effect, or a known caller, for its ttl."""
    assert await lives(seconds, answering(status), ManualClock(), **dict(options)) == [True, False]


async def test_a_large_refusal_is_forgotten_as_soon(caplog: pytest.LogCaptureFixture) -> None:
    """Also one that is recorded without its body."""
    clock = ManualClock()
    app = answering(422, b"x" * 20)
    protected = protect(app, MemoryStore(clock=clock), policy=Policy(max_response=10))

    assert (await twice(protected)).code == "completed-not-replayable"
    clock.advance(301)
    await call(protected, key="k")

    assert app.runs == 2


@pytest.mark.fronts("asgi")
async def test_a_refusal_that_may_have_an_effect_is_stored_for_its_ttl(engine: AsyncEngine) -> None:
    """Its handler has said that, or has used the session of its transaction."""
    held = answering(422, before=lambda operation: operation.hold())
    assert await lives(86400, held, ManualClock()) == [True, False]

    store = SQLStore(engine)
    for uses, seconds in ((True, 86400.0), (False, 300.0)):
        app = answering(422, before=lambda operation, uses=uses: uses and operation.session)
        await call(protect(app, store, session=async_sessionmaker(engine)), key=f"{uses}")
        [entry] = await store.find(key=f"{uses}")
        assert entry.expires_in == pytest.approx(seconds, abs=30)


@strawberry.type
class Mutation:
    """Mutations with and without an effect; the last two may be null."""

    @strawberry.mutation
    def charge(self, amount: int) -> int:
        CHARGED.append(amount)
        return amount

    @strawberry.mutation
    def fail(self) -> int:
        CHARGED.append(0)
        raise ValueError("no funds")

    @strawberry.mutation
    def try_to_fail(self) -> int | None:
        CHARGED.append(0)
        raise ValueError("no funds")


@strawberry.type
class Query:
    """What a schema needs."""

    @strawberry.field
    def version(self) -> int:
        return 1


CHARGED: list[int] = []


@pytest.mark.parametrize(
    ("document", "runs", "replayed"),
    [
        ("mutation { charge(amount: 3) }", [3], True),
        ("mutation { charge(amount: 0) }", [0], True),
        ("mutation { fail }", [0, 0], False),
        ("mutation { tryToFail }", [0, 0], False),
        ("mutation { charge(amount: 3) tryToFail }", [3, 0], True),
        ("mutation { unknown }", [], False),
    ],
)
async def test_the_rule_for_graphql_reads_what_strawberry_answers(
    document: str, runs: list[int], replayed: bool, run: Any
) -> None:
    """Errors without a result are released, and a retry runs; a part that has happened is stored."""
    CHARGED.clear()
    names = run("")
    names["app"] = Starlette(routes=[Route("/graphql", GraphQL(strawberry.Schema(Query, Mutation)))])
    app = run(*HTTP["GraphQL"])["app"]

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        request = client.build_request("POST", "/graphql", json={"query": document}, headers={"Idempotency-Key": "k"})
        answers = [await client.send(request) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert runs == CHARGED
    assert ("idempotent-replayed" in answers[1].headers) is replayed


async def test_graphql_errors_undo_what_one_transaction_has_done(engine: AsyncEngine) -> None:
    """With a session, a document of which a part has failed has no effect, and its retry runs whole."""
    fails = [True, False]

    @strawberry.type
    class Orders:
        @strawberry.mutation
        async def place(self, info: strawberry.Info) -> int:
            session = info.context["request"].state.idempotency.session
            await session.execute(text("INSERT INTO effects VALUES ('order')"))
            return 1

        @strawberry.mutation
        def pay(self) -> int:
            if fails.pop(0):
                raise ValueError("no funds")
            return 2

    app = IdempotencyMiddleware(
        Starlette(routes=[Route("/graphql", GraphQL(strawberry.Schema(Query, Orders)))]),
        store=SQLStore(engine),
        session=async_sessionmaker(engine),
        policy=Policy(outcome=graphql_outcome),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        request = client.build_request(
            "POST", "/graphql", json={"query": "mutation { place pay }"}, headers={"Idempotency-Key": "k"}
        )
        answers, counts = [], []
        for _ in range(3):
            answers.append((await client.send(request)).json())
            counts.append(await effects(engine))

    assert [answer["data"] for answer in answers] == [None, {"place": 1, "pay": 2}, {"place": 1, "pay": 2}]
    assert counts == [0, 1, 1]

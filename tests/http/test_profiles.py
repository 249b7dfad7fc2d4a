"""The profiles: what an API of a known kind expects of our own answers."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import stripe

from idempotency import IdempotencyMiddleware, Policy, Profile, drain
from idempotency.errors import ConfigurationError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, Reply, call, protect, read, respond
from tests.kit.served import served

JSON = [(b"content-type", b"application/json")]


async def own_answers(profile: Profile) -> dict[str, Reply]:
    """Meet each case that has an answer of the library, by the code of its error."""
    app, store = Effects(), FaultyStore()
    app.gate = asyncio.Event()
    policies = {
        "/small": replace(profile.policy, max_request=1),
        "/held": replace(profile.policy, outcomes={201: "hold"}),
        "/live": replace(profile.policy, max_response=0),
        "/required": replace(profile.policy, required=True),
    }
    protected = protect(app, store, profile=profile, policies=policies)
    replies = {
        "key-missing": await call(protected, path="/required"),
        "key-invalid": await call(protected, key='"'),
        "request-too-large": await call(protected, path="/small", key="k", body=b"12"),
    }
    first = asyncio.create_task(call(protected, key="k", body=b"1"))
    await app.running.wait()
    replies["in-progress"] = await call(protected, key="k", body=b"1")
    replies["key-reused"] = await call(protected, key="k", body=b"2")
    app.gate.set()
    await first
    for path, code in (("/held", "outcome-unknown"), ("/live", "completed-not-replayable")):
        await call(protected, path=path, key=path)
        replies[code] = await call(protected, path=path, key=path)
    store.down = True
    replies["store-unavailable"] = await call(protected, key="k")
    store.down = False
    await drain()
    return replies


async def test_acp_errors() -> None:
    """Flat objects with the types and codes of the protocol; Retry-After where a retry may help."""
    replies = await own_answers(Profile.acp)

    errors = {code: json.loads(reply.body) for code, reply in replies.items()}
    assert all(set(error) == {"type", "code", "message"} for error in errors.values())
    assert {reply.header(b"content-type") for reply in replies.values()} == {b"application/json"}
    assert {
        code: (replies[code].status, error["type"], error["code"], replies[code].header(b"retry-after"))
        for code, error in errors.items()
    } == {
        "key-missing": (400, "invalid_request", "idempotency_key_required", None),
        "key-invalid": (400, "invalid_request", "invalid", None),
        "request-too-large": (413, "invalid_request", "request_too_large", None),
        "in-progress": (409, "invalid_request", "idempotency_in_flight", b"1"),
        "key-reused": (422, "invalid_request", "idempotency_conflict", None),
        "outcome-unknown": (409, "invalid_request", "outcome_unknown", None),
        "completed-not-replayable": (409, "invalid_request", "completed_not_replayable", None),
        "store-unavailable": (503, "service_unavailable", "store_unavailable", b"1"),
    }


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b'{"a": 1, "b": 2}', b'{"b":2,"a":1}', True),
        (b'{"amount": 1.0}', b'{"amount": 1}', True),
        (b'{"amount": 1.50e2}', b'{"amount": 150}', True),
        (b'{"amount": 1.1}', b'{"amount": 1}', False),
        (b'{"a": null}', b"{}", False),
        (b'{"a": "1"}', b'{"a": 1}', False),
        (b"[1, 2]", b"[2, 1]", False),
        (b"{", b"{ ", False),
        (b'{"a": "%b", "n": 1}' % (b"x" * 70_000), b'{"n": 1.0, "a": "%b"}' % (b"x" * 70_000), True),
    ],
)
async def test_acp_compares_bodies_as_json_values(one: bytes, other: bytes, same: bool) -> None:
    """What is the same value is the same request; anything else under the key is a conflict."""
    app = Effects()
    protected = protect(app, profile=Profile.acp)

    await call(protected, key="k", body=one, headers=JSON)
    reply = await call(protected, key="k", body=other, headers=JSON)

    assert (reply.replayed, reply.status) == ((True, 201) if same else (False, 422))
    assert app.bodies == [one]


async def test_acp_keys_are_unique_for_a_path() -> None:
    """One key creates a session and completes it: two operations."""
    protected = protect(Effects(), profile=Profile.acp)

    create = await call(protected, path="/checkout_sessions", key="k", body=b"{}", headers=JSON)
    complete = await call(protected, path="/checkout_sessions/7/complete", key="k", body=b"{}", headers=JSON)

    assert (create.body, complete.body, complete.replayed) == (b'{"run":1}', b'{"run":2}', False)


async def test_acp_responses_have_the_key() -> None:
    """First response, replay and error alike."""
    protected = protect(Effects(), profile=Profile.acp)

    replies = [await call(protected, key="k", body=body, headers=JSON) for body in (b"1", b"1", b"2")]

    assert [(reply.status, reply.header(b"idempotency-key")) for reply in replies] == [
        (201, b"k"),
        (201, b"k"),
        (422, b"k"),
    ]


async def test_acp_runs_a_retry_after_a_5xx() -> None:
    """A failure of the server is not the result of the key."""
    app = Effects(status=500)
    protected = protect(app, profile=Profile.acp)

    for _ in range(2):
        assert (await call(protected, key="k", body=b"{}", headers=JSON)).status == 500
    assert app.runs == 2


async def test_stripe_errors() -> None:
    """One member, ``error``, with the type that clients look at."""
    replies = await own_answers(Profile.stripe)

    errors = {code: json.loads(reply.body)["error"] for code, reply in replies.items()}
    assert all(error["message"] for error in errors.values())
    assert {code: (replies[code].status, error["type"], error["code"]) for code, error in errors.items()} == {
        "key-missing": (400, "invalid_request_error", "idempotency_key_required"),
        "key-invalid": (400, "invalid_request_error", "idempotency_key_invalid"),
        "request-too-large": (413, "invalid_request_error", "request_too_large"),
        "in-progress": (409, "idempotency_error", "idempotency_key_in_use"),
        "key-reused": (400, "idempotency_error", "idempotency_key_reused"),
        "outcome-unknown": (409, "idempotency_error", "idempotency_outcome_unknown"),
        "completed-not-replayable": (409, "idempotency_error", "idempotency_result_not_recorded"),
        "store-unavailable": (503, "api_error", "store_unavailable"),
    }


def test_the_stripe_client_raises_its_error() -> None:
    """Over a real server: the client has its object, and for each of our answers the exception of its kind."""
    running, finish = threading.Event(), threading.Event()

    async def charge(scope: Any, receive: Any, send: Any) -> None:
        body = await read(receive)
        if b"slow" in body:
            running.set()
            await asyncio.to_thread(finish.wait)
        size = 2_000_000 if b"large" in body else 0
        await respond(send, 200, b'{"id": "pi_1", "object": "payment_intent", "pad": "%b"}' % (b"x" * size), JSON)

    store = FaultyStore(MemoryStore())
    app = IdempotencyMiddleware(charge, store=store, profile=Profile.stripe)
    with served(app) as url:
        client = stripe.StripeClient("sk_test_1", base_addresses={"api": url}, max_network_retries=0)

        def create(key: str, description: str = "") -> Any:
            params = {"amount": 1, "currency": "eur", "description": description or "one"}
            return client.v1.payment_intents.create(params, {"idempotency_key": key})  # type: ignore[arg-type]

        assert create("k").id == create("k").id == "pi_1"
        with pytest.raises(stripe.IdempotencyError, match="exactly as it was sent"):
            create("k", "another")
        slow = threading.Thread(target=create, args=("slow", "slow"))
        slow.start()
        assert running.wait(30)
        with pytest.raises(stripe.APIError, match="again later") as busy:
            create("slow", "slow")
        finish.set()
        slow.join()
        create("large", "large")
        with pytest.raises(stripe.APIError, match="is complete") as not_recorded:
            create("large", "large")
        with pytest.raises(stripe.InvalidRequestError, match="malformed|white space"):
            create("a b")
        store.down = True
        with pytest.raises(stripe.APIError, match="store failed") as unavailable:
            create("k")
        store.down = False

    assert (busy.value.http_status, busy.value.headers["retry-after"]) == (409, "1")
    assert (not_recorded.value.http_status, not_recorded.value.headers["stripe-should-retry"]) == (409, "false")
    assert (unavailable.value.http_status, "stripe-should-retry" in unavailable.value.headers) == (503, False)


async def test_what_the_middleware_is_given_wins_over_the_profile() -> None:
    """A profile gives defaults; a part of it is replaced by an option."""
    options: list[dict[str, Any]] = [
        {"policy": Policy(mismatch_status=418)},
        {"error": lambda _: {"own": True}},
        {"echo_key": False},
    ]

    answers = []
    for given in options:
        protected = protect(Effects(), profile=Profile.stripe, **given)
        await call(protected, key="k", body=b"one")
        reply = await call(protected, key="k", body=b"two")
        answers.append((reply.status, *json.loads(reply.body), reply.header(b"idempotency-key")))

    assert answers == [(418, "error", b"k"), (400, "own", b"k"), (400, "error", None)]


async def test_a_profile_of_ones_own() -> None:
    """Without options it is that of a middleware without a profile."""
    own = Profile(error=lambda problem: {"no": problem.code}, policy=Policy(required=True))

    reply = await call(protect(Effects(), profile=own))

    assert (reply.status, reply.body) == (400, b'{"no": "key-missing"}')
    assert Profile() == Profile(error=None, echo_key=False, policy=Policy())


def test_a_profile_is_not_changed() -> None:
    """It is shared by the middlewares of a process."""
    with pytest.raises(FrozenInstanceError):
        Profile.acp.echo_key = False  # type: ignore[misc]


@pytest.mark.parametrize("profile", ["acp", Policy(), Profile])
def test_what_is_no_profile_is_refused(profile: Any) -> None:
    """A name is not a profile."""
    with pytest.raises(ConfigurationError, match="profile must be a Profile"):
        protect(Effects(), profile=profile)

"""Which policy a request has, and what it makes of a status, an exception and a cancellation."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from idempotency import Policy
from idempotency._http.caller import ANONYMOUS
from idempotency._rules import record_id
from idempotency.stores.memory import MemoryStore
from tests.kit.asgi_calls import Effects, call, protect, respond

pytestmark = pytest.mark.fronts("asgi", "wsgi")

RECORD = record_id(ANONYMOUS, "k")


async def test_each_route_has_its_policy():
    """The most specific key decides; None takes a route out, and what no key matches has the default."""
    policies = {
        "POST /payments/{id}": Policy(required=True),
        "/webhooks/{rest:path}": None,
        "PUT /settings": Policy(),
    }
    app = Effects()
    protected = protect(app, policies=policies)
    assert (await call(protected, path="/payments/7")).code == "key-missing"
    assert (await call(protected, path="/payments/7/refund")).status == 201
    for path, method, replays in (
        ("/webhooks/a/b", "POST", False),
        ("/settings", "PUT", True),
        ("/settings", "GET", False),
        ("/payments/7", "POST", True),
        ("/anything", "PATCH", True),
    ):
        await call(protected, path=path, method=method, key=path)
        assert (await call(protected, path=path, method=method, key=path)).replayed is replays


async def test_routes_are_matched_below_root_path():
    """Behind a proxy that strips a prefix, or mounted, the application's own paths are meant."""
    app = Effects()
    protected = protect(app, policies={"/payments": Policy(required=True)})
    assert (await call(protected, path="/api/payments", root_path="/api")).code == "key-missing"
    assert (await call(protected, path="/payments", root_path="/api")).code == "key-missing"
    assert (await call(protected, path="/apiary/payments", root_path="/api")).status == 201


OUTCOMES = {
    404: "release",
    418: "hold",
    "5xx": "store",
    502: "hold",
    LookupError: "store",
    KeyError: "release",
    TimeoutError: "hold",
}


@pytest.mark.parametrize(
    ("status", "retry", "runs"),
    [
        (201, 201, 1),
        (404, 404, 2),
        (418, "outcome-unknown", 1),
        (503, 503, 1),
        (502, "outcome-unknown", 1),
        (429, 429, 2),
    ],
)
async def test_a_policy_rules_over_statuses(status, retry, runs):
    """An exact status wins over a class, a class over the defaults."""
    app = Effects(status=status)
    protected = protect(app, policy=Policy(outcomes=OUTCOMES))
    assert (await call(protected, key="k")).status == status
    again = await call(protected, key="k")
    assert (again.code if isinstance(retry, str) else again.status) == retry
    assert app.runs == runs


@pytest.mark.parametrize(
    ("error", "retry", "runs"),
    [
        (IndexError, 500, 1),
        (KeyError, None, 2),
        (TimeoutError, "outcome-unknown", 1),
        (ValueError, 500, 1),
    ],
)
async def test_a_policy_rules_over_exceptions(error, retry, runs):
    """The nearest class in its ancestry decides, else the rule for 500; a stored exception replays as a plain 500."""

    async def handler(scope, receive, send):
        raise error("hush")

    app = Effects(handler)
    protected = protect(app, policy=Policy(outcomes=OUTCOMES))
    with pytest.raises(error):
        await call(protected, key="k")
    if retry is None:
        with pytest.raises(error):
            await call(protected, key="k")
    else:
        again = await call(protected, key="k")
        assert (again.code if isinstance(retry, str) else again.status) == retry
        assert b"hush" not in again.body
    assert app.runs == runs


@pytest.mark.fronts("asgi")
@pytest.mark.parametrize(("on_crash", "retry"), [("rerun", 201), ("hold", 409)])
async def test_a_cancelled_request_counts_as_a_crash(on_crash, retry):
    """It follows ``on_crash``: free to run again, or unknown until resolved."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, policy=Policy(on_crash=on_crash))
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    first.cancel()
    await asyncio.wait([first])
    app.gate = None
    assert (await call(protected, key="k")).status == retry


@pytest.mark.parametrize(("on_crash", "kept"), [("rerun", "running"), ("hold", "held")])
async def test_on_crash_is_claimed_with_the_key(on_crash, kept):
    """The store knows from the start what is to become of a key whose owner vanishes."""
    app = Effects()
    app.gate = asyncio.Event()
    store = MemoryStore()
    first = asyncio.create_task(call(protect(app, store, policy=Policy(on_crash=on_crash)), key="k"))
    await app.running.wait()
    entry = await store.inspect(RECORD)
    assert entry.hold is (kept == "held")
    app.gate.set()
    assert (await first).status == 201
    assert (await store.inspect(RECORD)).hold is False


async def test_a_held_key_is_unknown_until_resolved():
    """``done`` with a result replays, ``release`` lets the next one run; between them nothing runs."""
    store = MemoryStore()
    app = Effects()
    protected = protect(app, store, policy=Policy(outcomes={201: "hold"}))
    for outcome, expected in (("done", "completed-not-replayable"), ("release", None)):
        await call(protected, key=outcome)
        assert (await call(protected, key=outcome)).code == "outcome-unknown"
        [entry] = await store.unresolved()
        assert await store.resolve(entry.id, outcome)
        after = await call(protected, key=outcome)
        assert after.status == (409 if expected else 201)
        assert expected is None or after.code == expected
    assert app.runs == 3


@pytest.mark.parametrize("ending", [500, 503, ValueError])
async def test_the_handler_may_hold(ending):
    """The effect has happened: what would have freed the key leaves it unknown."""

    async def handler(scope, receive, send):
        scope["state"]["idempotency"].hold()
        if isinstance(ending, int):
            await respond(send, ending)
        else:
            raise ending

    app = Effects(handler)
    protected = protect(app)
    with suppress(ValueError):
        await call(protected, key="k")
    assert (await call(protected, key="k")).code == "outcome-unknown"
    assert app.runs == 1


async def test_holding_does_not_hide_a_result():
    """What is stored is stored as before."""

    async def handler(scope, receive, send):
        scope["state"]["idempotency"].hold()
        await respond(send, 201, b"done")

    protected = protect(Effects(handler))
    await call(protected, key="k")
    assert (await call(protected, key="k")).body == b"done"


@pytest.mark.parametrize("status", [201, 422, 418])
async def test_the_handler_may_release(status):
    """The effect has not happened: the key is free, whatever the answer and the policy."""

    async def handler(scope, receive, send):
        scope["state"]["idempotency"].hold()
        scope["state"]["idempotency"].release()
        await respond(send, status)

    app = Effects(handler)
    protected = protect(app, policy=Policy(outcomes=OUTCOMES))
    await call(protected, key="k")
    assert not (await call(protected, key="k")).replayed
    assert app.runs == 2

"""The options of the middleware: who the caller is, and what cannot work."""

from __future__ import annotations

import asyncio

import pytest

from idempotency._http.caller import ANONYMOUS
from idempotency.errors import ConfigurationError
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, call, protect
from tests.kit.observed_store import ObservedStore


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_scope_names_the_caller(is_async):
    """Sync or async; text, bytes and numbers; None is the anonymous caller."""
    names = {b"1": "alice", b"2": b"bob", b"3": 42, b"4": None}

    def name(request):
        return names[request.headers["x-user"].encode()]

    async def name_async(request):
        await asyncio.sleep(0)
        return name(request)

    app = Effects()
    protected = protect(app, scope=name_async if is_async else name)
    for _ in range(2):
        for number, user in enumerate(names, start=1):
            reply = await call(protected, key="k", headers=[(b"x-user", user)])
            assert reply.body == b'{"run":%d}' % number
    assert app.operations[3].scope == ANONYMOUS


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_scope_that_raises_stops_the_request(is_async):
    """Nothing is claimed and nothing runs: a caller nobody knows is not everybody."""

    def refuse(request):
        raise PermissionError("who are you?")

    async def refuse_async(request):
        raise PermissionError("who are you?")

    store, app = FaultyStore(), Effects()
    protected = protect(app, store, scope=refuse_async if is_async else refuse)
    with pytest.raises(PermissionError):
        await call(protected, key="k")
    assert (store.calls, app.runs) == ([], 0)
    assert (await call(protected)).status == 201


async def test_a_scope_of_another_type_is_a_mistake():
    """It is not turned into text, which would differ from one retry to the next."""
    app = Effects()
    with pytest.raises(ConfigurationError):
        await call(protect(app, scope=lambda request: object()), key="k")
    assert app.runs == 0


async def test_no_scope_is_one_space_for_all():
    """The opt-out: another caller's key is given the first one's answer."""
    app = Effects()
    protected = protect(app, scope=None)
    await call(protected, key="k", headers=[(b"authorization", b"Bearer alice")])
    assert (await call(protected, key="k", headers=[(b"authorization", b"Bearer bob")])).replayed


async def test_a_secret_keys_what_is_stored():
    """Scope and fingerprint differ from those without it; text and bytes are one secret."""
    digests = []
    for secret in (None, "s3cret", b"s3cret", b"other"):
        store = ObservedStore()
        await call(protect(Effects(), store, secret=secret), key="k", headers=[(b"authorization", b"Bearer alice")])
        [claim] = store.claims
        digests.append((claim.scope, claim.fingerprint))
    none, text, same, other = digests
    assert text == same
    assert len({each[0] for each in (none, text, other)}) == 3
    assert len({each[1] for each in (none, text, other)}) == 3


@pytest.mark.parametrize(
    "options",
    [{"scope": "cookie"}, {"scope": []}, {"unknown_credentials": "drop"}, {"docs": "no url"}, {"docs": "https://x#y"}],
)
async def test_what_cannot_work_is_refused_at_construction(options):
    """A mistake shows when the application starts, not when a request comes."""
    with pytest.raises(ConfigurationError):
        protect(Effects(), **options)

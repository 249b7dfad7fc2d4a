"""The key in each response: ``echo_key=``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency import Policy, drain
from idempotency.errors import ConfigurationError
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Client, Effects, Reply, call, http_scope, protect, respond

pytestmark = pytest.mark.fronts("asgi", "wsgi")


def echoed(reply: Reply, name: bytes = b"idempotency-key") -> list[bytes]:
    """Return the values of the key header of a response."""
    return [value for field, value in reply.headers if field.lower() == name]


@pytest.mark.parametrize("key", ["k", '"k"', '"k";v=1', '"a \\"b\\""'])
async def test_the_key_comes_back_as_it_was_sent(key: str) -> None:
    """Quoted or bare, in the first response and in its replay."""
    protected = protect(Effects(), echo_key=True)

    first, replay = [await call(protected, key=key) for _ in range(2)]

    assert (echoed(first), echoed(replay), replay.replayed) == ([key.encode()], [key.encode()], True)


async def test_each_request_has_its_own_form_of_the_key() -> None:
    """The echo is not recorded: a retry that is quoted otherwise has its own."""
    store = MemoryStore()
    protected = protect(Effects(), store, echo_key=True)

    first, replay = await call(protected, key="k"), await call(protected, key='"k"')
    plain = await call(protect(Effects(), store), key="k")

    assert (echoed(first), echoed(replay), echoed(plain)) == ([b"k"], [b'"k"'], [])
    assert replay.replayed
    assert plain.replayed


async def test_what_the_application_sends_under_this_name_is_replaced() -> None:
    """There is one field, whatever the application or its record says."""

    async def handler(_: Any, __: Any, send: Any) -> None:
        await respond(send, 201, headers=[(b"Idempotency-Key", b"mine")])

    protected = protect(Effects(handler), echo_key=True)

    first, replay = [await call(protected, key="k") for _ in range(2)]

    assert (echoed(first), echoed(replay)) == ([b"k"], [b"k"])


async def test_our_own_answers_have_the_key() -> None:
    """In progress, mismatch, too large, and a failing store."""
    app = Effects()
    app.gate = asyncio.Event()
    store = FaultyStore()
    protected = protect(app, store, echo_key=True, policies={"/small": Policy(max_request=1)})
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()

    replies = [await call(protected, key="k"), await call(protected, key="k", body=b"x")]
    app.gate.set()
    await first
    replies.append(await call(protected, path="/small", key="k", body=b"12"))
    store.down = True
    replies.append(await call(protected, key="k"))
    store.down = False
    await drain()

    assert [(reply.status, echoed(reply)) for reply in replies] == [
        (409, [b"k"]),
        (422, [b"k"]),
        (413, [b"k"]),
        (503, [b"k"]),
    ]


async def test_a_request_that_runs_unprotected_has_its_key() -> None:
    """The store fails, and the policy lets the request run."""
    store = FaultyStore()
    store.down = True

    reply = await call(protect(Effects(), store, echo_key=True, policy=Policy(on_store_error="fail_open")), key="k")
    store.down = False
    await drain()

    assert (reply.status, echoed(reply)) == (201, [b"k"])


@pytest.mark.fronts("asgi")
async def test_the_answer_to_an_exception_of_a_callable_has_the_key() -> None:
    """The application answers what ``scope=`` raises, and this is a response to a keyed request too."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException

    def scope(_: Any) -> str:
        raise HTTPException(401)

    reply = await call(protect(Starlette(), echo_key=True, scope=scope), key="k")

    assert (reply.status, echoed(reply)) == (401, [b"k"])


@pytest.mark.parametrize("key", [None, "", '"', "a,b", "x" * 256, "\xff".encode("latin-1")])
async def test_a_key_that_cannot_be_read_does_not_come_back(key: Any) -> None:
    """What was not checked is not sent."""
    reply = await call(protect(Effects(), echo_key=True, policy=Policy(required=True)), key=key)

    assert (reply.status, echoed(reply)) == (400, [])


async def test_two_keys_do_not_come_back() -> None:
    """There is no key of which to say that it is the request's."""
    protected = protect(Effects(), echo_key=True)

    reply = await call(protected, key="a", headers=[(b"Idempotency-Key", b"b")])

    assert (reply.status, echoed(reply)) == (400, [])


async def test_the_header_has_the_name_of_the_option() -> None:
    """``header_name=`` names the header in both directions."""
    protected = protect(Effects(), echo_key=True, header_name="X-Request-Token")

    reply = await call(protected, headers=[(b"X-Request-Token", b" k ")], key="other")

    assert (echoed(reply, b"x-request-token"), echoed(reply)) == ([b"k"], [])


@pytest.mark.parametrize("request_", [{"key": None}, {"key": "k", "method": "GET"}, {"key": "k", "path": "/free"}])
async def test_no_other_response_is_changed(request_: dict[str, Any]) -> None:
    """Without a key, on a method or a route that is not protected, nothing is added."""
    protected = protect(Effects(), echo_key=True, policies={"/free": None})

    assert echoed(await call(protected, **request_)) == []


async def test_a_live_response_has_the_key() -> None:
    """A response that is not recorded is a response too; its pieces are not touched."""
    protected = protect(Effects(), echo_key=True, policy=Policy(max_response=0))

    reply = await call(protected, key="k")

    assert (reply.body, echoed(reply)) == (b'{"run":1}', [b"k"])


async def test_headers_of_a_request_that_can_be_read_once() -> None:
    """ASGI allows any iterable; the key is read from it, the echo too."""
    scope_headers = iter([(b"idempotency-key", b"k")])
    reply = Reply()
    await protect(Effects(), echo_key=True)({**http_scope(), "headers": scope_headers}, Client(), reply.send)

    assert (reply.status, echoed(reply)) == (201, [b"k"])


def test_echo_key_is_true_or_false() -> None:
    """A text is no switch."""
    with pytest.raises(ConfigurationError, match="echo_key must be True or False"):
        protect(Effects(), echo_key="yes")

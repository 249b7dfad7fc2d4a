"""Our own answers in the form of an API: ``error=``, and the statuses of a policy."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from typing import Any

import pytest

from idempotency import Policy, Problem, drain
from idempotency.errors import ConfigurationError
from idempotency.testing import FaultyStore
from tests.kit.asgi_calls import Effects, Reply, call, protect

pytestmark = pytest.mark.fronts("asgi", "wsgi")


async def reused(**options: Any) -> Reply:
    """Make the answer to a request whose key was used for another one."""
    protected = protect(Effects(), **options)
    await call(protected, key="k", body=b"one")
    return await call(protected, key="k", body=b"two")


async def running(**options: Any) -> Reply:
    """Make the answer to a request whose first one is still running."""
    app = Effects()
    app.gate = asyncio.Event()
    protected = protect(app, **options)
    first = asyncio.create_task(call(protected, key="k"))
    await app.running.wait()
    reply = await call(protected, key="k")
    app.gate.set()
    await first
    return reply


async def test_a_mapping_is_the_json_body_of_the_answer() -> None:
    """The status and the header fields are those of the problem; the body is what the hook returned."""
    reply = await running(error=lambda problem: {"error": {"code": problem.code, "retry": problem.retry_after}})

    assert (reply.status, json.loads(reply.body)) == (409, {"error": {"code": "in-progress", "retry": 1}})
    assert dict(reply.headers) == {
        b"content-type": b"application/json",
        b"cache-control": b"no-store",
        b"link": b"<https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-idempotency-key-header-07>; "
        b'rel="describedby"; type="text/html"',
        b"retry-after": b"1",
        b"content-length": b"%d" % len(reply.body),
    }


async def test_the_hook_is_given_what_is_known() -> None:
    """Numbers are whole seconds, and the key is the one that was sent, without quotes."""
    problems: list[Problem] = []

    def note(problem: Problem) -> dict[str, str]:
        problems.append(problem)
        return {}

    protected = protect(Effects(), error=note, docs="https://api.example/docs", policy=Policy(required=True))
    await call(protected)
    await call(protected, key='"k"', body=b"one")
    await call(protected, key='"k"', body=b"two")
    [missing, mismatch] = problems

    assert (missing.status, missing.code, missing.key) == (400, "key-missing", None)
    assert "idempotency-key" in missing.detail
    assert mismatch == Problem(
        status=422,
        code="key-reused",
        title="This Idempotency-Key was used for a different request",
        detail=mismatch.detail,
        retryable=False,
        safe_new_key=False,
        retry_after=None,
        lease_left=None,
        docs="https://api.example/docs",
        key="k",
    )
    assert "'k'" not in repr(mismatch)


async def test_a_request_that_is_too_large_has_its_key() -> None:
    """Nothing was claimed, and still the key was read."""
    protected = protect(Effects(), error=lambda problem: {"key": problem.key}, policy=Policy(max_request=1))

    reply = await call(protected, key="k", body=b"12")

    assert (reply.status, reply.body) == (413, b'{"key": "k"}')


async def test_a_tuple_is_the_whole_answer() -> None:
    """Another status, media type and body; what the answer does not say itself is added."""

    def render(problem: Problem) -> tuple[int, dict[str, str], str]:
        return 423, {"Content-Type": "application/xml", "Cache-Control": "private"}, f"<error>{problem.code}é</error>"

    reply = await running(error=render)

    assert (reply.status, reply.body) == (423, "<error>in-progressé</error>".encode())
    assert reply.header(b"content-type") == b"application/xml"
    assert reply.header(b"cache-control") == b"private"
    assert reply.header(b"retry-after") == b"1"
    assert reply.header(b"content-length") == b"28"


@pytest.mark.parametrize("error", [None, lambda _: {}, lambda _: (400, {}, b"")])
async def test_an_answer_in_any_form_says_that_a_retry_is_in_vain(error: Any) -> None:
    """The fields for clients that retry each 409 and 5xx do not depend on the body."""
    reply = await reused(error=error)

    assert reply.header(b"stripe-should-retry") == reply.header(b"x-should-retry") == b"false"
    assert reply.header(b"retry-after") is None


def _raises(problem: Problem) -> Any:
    raise KeyError(problem.key)


async def _coroutine() -> dict[str, str]:
    return {}


NONSENSE: dict[str, Any] = {
    "an exception": _raises,
    "nothing": lambda _: None,
    "text": lambda _: "no",
    "a list": lambda _: ["no"],
    "a coroutine": lambda _: _coroutine(),
    "no JSON": lambda _: {"at": object()},
    "not a number": lambda _: {"at": float("nan")},
    "a success": lambda _: (200, {}, b""),
    "a redirect": lambda _: (302, {"Location": "/"}, b""),
    "a truth": lambda _: (True, {}, b""),
    "a text as status": lambda _: ("400", {}, b""),
    "a short tuple": lambda _: (400, b""),
    "no body": lambda _: (400, {}, None),
    "a line break": lambda _: (400, {"X-A": "1\r\nSet-Cookie: a=b"}, b""),
    "a broken name": lambda _: (400, {"X A": "1"}, b""),
    "a header of bytes": lambda _: (400, {b"x-a": b"1"}, b""),
    "another alphabet": lambda _: (400, {"X-A": "\u20ac"}, b""),
    "a length": lambda _: (400, {"Content-Length": "1"}, b""),
    "a framing": lambda _: (400, {"Transfer-Encoding": "chunked"}, b""),
    "a connection": lambda _: (400, {"Keep-Alive": "timeout=5"}, b""),
    "half a character": lambda _: (400, {}, "\ud800"),
}


@pytest.mark.parametrize("hook", NONSENSE.values(), ids=NONSENSE.keys())
async def test_a_hook_that_fails_is_logged_and_the_problem_document_is_sent(
    hook: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A client gets its answer, and the log has no key."""
    protected = protect(Effects(), error=hook)
    await call(protected, key="a-secret-key", body=b"one")

    with caplog.at_level(logging.ERROR, "idempotency"):
        reply = await call(protected, key="a-secret-key", body=b"two")

    assert (reply.status, reply.code) == (422, "key-reused")
    [record] = caplog.records
    assert (record.name, record.levelname) == ("idempotency", "ERROR")
    assert "error=" in caplog.text
    assert "a-secret-key" not in caplog.text


async def test_the_log_says_where_a_hook_failed(caplog: pytest.LogCaptureFixture) -> None:
    """The class of the exception and the place, without its message."""
    with caplog.at_level(logging.ERROR, "idempotency"):
        await reused(error=_raises)

    assert "raised KeyError" in caplog.text
    assert "_raises" in caplog.text


async def test_the_answers_of_the_application_are_not_given_to_the_hook() -> None:
    """Neither the first response nor a replay."""
    protected = protect(Effects(status=422), error=lambda _: {"ours": True})

    for _ in range(2):
        assert (await call(protected, key="k")).body == b'{"run":1}'


async def test_a_failing_store_is_answered_by_the_hook_too() -> None:
    """Every answer of ours has the form of the API."""
    store = FaultyStore()
    store.down = True

    reply = await call(protect(Effects(), store, error=lambda problem: {"code": problem.code}), key="k")
    store.down = False
    await drain()

    assert (reply.status, reply.body, reply.header(b"retry-after")) == (503, b'{"code": "store-unavailable"}', b"1")


class _Asynchronous:
    async def __call__(self, problem: Problem) -> dict[str, str]:
        return {}


async def _asynchronous(problem: Problem, more: int = 0) -> dict[str, str]:
    return {}


@pytest.mark.parametrize(
    "hook", [_asynchronous, functools.partial(_asynchronous, more=1), _Asynchronous(), "json", 409]
)
def test_a_hook_that_cannot_work_is_refused_at_construction(hook: Any) -> None:
    """Nothing would await it, or it cannot be called."""
    with pytest.raises(ConfigurationError, match="error must"):
        protect(Effects(), error=hook)


async def test_the_statuses_of_a_policy() -> None:
    """In the status line and in the body, per route; what is in vain stays so."""
    policy = Policy(mismatch_status=409, in_progress_status=425)

    mismatch, progress = await reused(policy=policy), await running(policy=policy)

    assert (mismatch.status, json.loads(mismatch.body)["status"], mismatch.code) == (409, 409, "key-reused")
    assert mismatch.header(b"x-should-retry") == b"false"
    assert (progress.status, json.loads(progress.body)["status"], progress.code) == (425, 425, "in-progress")
    assert progress.header(b"retry-after") == b"1"


async def test_a_route_has_the_statuses_of_its_policy() -> None:
    """``policies=`` replaces the policy of a route, and with it the statuses."""
    protected = protect(Effects(), policies={"/refunds": Policy(mismatch_status=400)})

    statuses = []
    for path in ("/orders", "/refunds"):
        await call(protected, path=path, key=path, body=b"one")
        statuses.append((await call(protected, path=path, key=path, body=b"two")).status)

    assert statuses == [422, 400]


async def test_a_key_per_path() -> None:
    """One key on two paths is two operations, each with its replay; by default it is a mismatch."""
    app = Effects()
    protected = protect(app, policy=Policy(key_per_path=True))

    replies = [await call(protected, path=path, key="k") for path in ("/a", "/b", "/a", "/b")]
    default = protect(Effects())
    await call(default, path="/a", key="k")

    assert [(reply.status, reply.body, reply.replayed) for reply in replies] == [
        (201, b'{"run":1}', False),
        (201, b'{"run":2}', False),
        (201, b'{"run":1}', True),
        (201, b'{"run":2}', True),
    ]
    assert (await call(default, path="/b", key="k")).code == "key-reused"


async def test_callers_do_not_meet_on_a_path() -> None:
    """The path is added to the caller; it does not replace the caller."""
    app = Effects()
    protected = protect(app, policy=Policy(key_per_path=True))

    for caller in (b"Bearer alice", b"Bearer bob", b""):
        reply = await call(protected, key="k", headers=[(b"authorization", caller)] if caller else [])
        assert not reply.replayed
    assert app.runs == 3

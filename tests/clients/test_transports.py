"""What a client with one of our transports, or our adapter, sends: over real connections, to a scripted server."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
import requests
from httpx_retries import Retry as InnerRetry
from httpx_retries import RetryTransport
from requests.auth import HTTPDigestAuth

from idempotency import ConfigurationError
from idempotency.client import AsyncIdempotentTransport, Call, IdempotentAdapter, IdempotentTransport, Retry, call_of
from idempotency.client._call import origin_of
from tests.clients.senders import AT_ONCE, KINDS, REQUESTS, Answer, Scripted, Sender, scripted
from tests.kit.asgi_servers import until
from tests.kit.servers import Proxy

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
EACH = pytest.mark.parametrize("kind", KINDS)
PROBLEM = {"Content-Type": "application/problem+json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    """A server that answers as a test asks."""
    with scripted() as app:
        yield app


@pytest.fixture
def proxy(server: Scripted) -> Iterator[Proxy]:
    """A proxy to it."""
    with Proxy(int(server.url.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr("time.sleep", made.append)
    monkeypatch.setattr("anyio.sleep", sleep)
    return made


def url_of(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.port}/orders"


@EACH
def test_each_call_has_a_random_key_of_its_own(kind: str, server: Scripted) -> None:
    """It is a UUID, sent bare."""
    server.script()

    got = Sender(kind).post(server.url, server.url)

    first, second = server.keys
    assert UUID.fullmatch(first or "")
    assert UUID.fullmatch(second or "")
    assert first != second
    assert got.call is not None
    assert (got.call.key, got.call.attempts) == (second, 1)


@EACH
@pytest.mark.parametrize(("method", "keyed"), [("POST", True), ("PATCH", True), ("PUT", False), ("GET", False)])
def test_only_post_and_patch_have_a_key(kind: str, method: str, keyed: bool, server: Scripted) -> None:
    """A request with another method is passed on as it is, and not sent again."""
    server.script(503)

    got = Sender(kind).post(server.url, method=method)

    assert [key is not None for key in server.keys] == ([True, True] if keyed else [False])
    assert got.status == (201 if keyed else 503)


@EACH
def test_the_methods_the_header_and_its_form_are_options(kind: str, server: Scripted) -> None:
    """PUT is given a key too, in quotes, in a header with another name."""
    server.script()

    Sender(kind, methods={"put"}, header_name="X-Request-Key", quoted=True).post(server.url, method="PUT")

    [sent] = server.seen
    assert UUID.fullmatch(sent.headers["x-request-key"].strip('"'))
    assert sent.headers["x-request-key"].startswith('"')
    assert sent.key is None


@EACH
def test_the_key_of_the_caller_is_sent_with_each_attempt(kind: str, server: Scripted) -> None:
    """It is not changed, not even by quotes, and any method may have it."""
    server.script(503, 503)

    got = Sender(kind, quoted=True).post(server.url, method="PUT", headers={"idempotency-key": "invoice-7"})

    assert server.keys == ["invoice-7"] * 3
    assert (got.status, got.attempts) == (201, 3)


@EACH
@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_transient_answer_is_followed_by_a_retry_with_the_same_key(kind: str, status: int, server: Scripted) -> None:
    """And with the same body."""
    server.script(status)

    got = Sender(kind).post(server.url)

    assert len(server.seen) == 2
    assert len(set(server.keys)) == 1
    assert [each.body for each in server.seen] == [b"tea", b"tea"]
    assert (got.status, got.attempts) == (201, 2)


@EACH
@pytest.mark.parametrize("status", [200, 303, 400, 401, 404, 409, 422, 500])
def test_any_other_answer_is_returned(kind: str, status: int, server: Scripted) -> None:
    """One request was sent."""
    server.script(Answer(status, body=b"answer"))

    got = Sender(kind).post(server.url)

    assert (got.status, got.attempts, got.content) == (status, 1, b"answer")
    assert len(server.seen) == 1


@EACH
@pytest.mark.parametrize(
    ("status", "code", "retryable", "attempts"),
    [
        (409, "in-progress", True, 2),
        (503, "store-unavailable", True, 2),
        (500, "store-unavailable", True, 2),
        (409, "outcome-unknown", False, 1),
        (409, "completed-not-replayable", False, 1),
        (422, "key-reused", False, 1),
        (503, "store-refused", False, 1),
    ],
)
def test_a_problem_document_says_whether_a_retry_is_of_use(
    kind: str, status: int, code: str, retryable: bool, attempts: int, server: Scripted
) -> None:
    """Whatever the status is; and the document is not lost for the caller."""
    document = json.dumps({"code": code, "retryable": retryable}).encode()
    server.script(Answer(status, PROBLEM, document))

    got = Sender(kind).post(server.url)

    assert len(server.seen) == attempts
    assert got.content == (document if attempts == 1 else b"")


@EACH
@pytest.mark.parametrize("header", ["X-Should-Retry", "Stripe-Should-Retry"])
def test_a_server_that_advises_is_obeyed(kind: str, header: str, server: Scripted) -> None:
    """A 500 is followed by a retry where the server says so, and a 503 is not."""
    server.script(Answer(500, {header: "true"}), Answer(503, {header: "false"}))

    got = Sender(kind).post(server.url)

    assert (got.status, got.attempts) == (503, 2)


@EACH
def test_a_pause_is_as_long_as_the_server_asks(kind: str, server: Scripted, pauses: list[float]) -> None:
    """In seconds, or until a date, which is compared with the date of the answer."""
    date = "Sun, 06 Nov 1994 08:49:37 GMT"
    until = "Sun, 06 Nov 1994 08:49:44 GMT"
    server.script(Answer(409, {"Retry-After": "2"}), Answer(503, {"Retry-After": until, "Date": date}))

    got = Sender(kind).post(server.url)

    assert (got.status, got.attempts) == (201, 3)
    assert pauses == [2.0, 7.0]


@EACH
def test_a_pause_that_ends_after_the_deadline_is_not_made(kind: str, server: Scripted, pauses: list[float]) -> None:
    """The answer that asks for it is returned at once."""
    server.script(Answer(503, {"Retry-After": "5"}), Answer(429, {"Retry-After": "3600"}))

    got = Sender(kind, retry=Retry(first=0, deadline=30)).post(server.url)

    assert (got.status, got.attempts) == (429, 2)
    assert pauses == [5.0]


@EACH
def test_the_last_answer_is_returned(kind: str, server: Scripted) -> None:
    """After as many attempts as the options allow."""
    server.script(503, 503, Answer(502, body=b"last"), 503)

    got = Sender(kind, retry=Retry(3, first=0)).post(server.url)

    assert (got.status, got.attempts, got.content) == (502, 3, b"last")


@EACH
def test_the_last_error_is_raised(kind: str, server: Scripted, proxy: Proxy) -> None:
    """It says how many attempts there were, and with which key."""
    server.script()
    proxy.lose_replies(9)

    got = Sender(kind, retry=Retry(3, first=0)).post(url_of(proxy))

    assert isinstance(got.error, httpx.RemoteProtocolError | httpx.ReadError if kind != REQUESTS else OSError)
    assert got.attempts == 3
    assert got.call is not None
    assert server.keys == [got.call.key] * 3


@EACH
def test_a_lost_answer_is_followed_by_a_retry_with_the_same_key(kind: str, server: Scripted, proxy: Proxy) -> None:
    """The connection was cut before the first byte of the answer."""
    server.script()
    proxy.lose_replies(2)

    got = Sender(kind).post(url_of(proxy))

    assert (got.status, got.attempts) == (201, 3)
    assert len(set(server.keys)) == 1


@EACH
@pytest.mark.parametrize("status", [201, 422])
def test_an_answer_that_is_cut_in_its_body_is_lost_too(kind: str, status: int, server: Scripted, proxy: Proxy) -> None:
    """The connection was cut after most of the answer."""
    body = b"x" * 9000
    server.script(Answer(status, body=body), Answer(status, body=body))
    proxy.cut_after(8000, replies=True)

    got = Sender(kind).post(url_of(proxy))

    assert proxy.disarm()
    assert (got.status, got.attempts, got.content) == (status, 2, body)
    assert len(set(server.keys)) == 1


@EACH
def test_a_time_out_is_followed_by_a_retry_with_the_same_key(kind: str, server: Scripted) -> None:
    """The server may have done the work, which the key makes safe."""
    server.script(Answer(silent=True))

    got = Sender(kind, timeout=2).post(server.url)

    assert (got.status, got.attempts) == (201, 2)
    assert len(set(server.keys)) == 1


@EACH
def test_a_stream_is_sent_once(kind: str, server: Scripted) -> None:
    """It has a key, and is not sent again, since it is consumed."""
    server.script(503)

    got = Sender(kind).post(server.url, body=[b"te", b"a"])

    assert (got.status, got.attempts) == (503, 1)
    assert [each.body for each in server.seen] == [b"tea"]
    assert server.keys[0]


@EACH
@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_keeps_the_key(kind: str, status: int, server: Scripted) -> None:
    """Its target is retried with the same key."""
    server.script(Answer(status, {"Location": "/other"}), 503)

    got = Sender(kind).post(server.url, follow=True)

    assert [each.path for each in server.seen] == ["/", "/other", "/other"]
    assert len(set(server.keys)) == 1
    assert (got.status, got.attempts) == (201, 3)


@EACH
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "invoice-7"}])
def test_a_redirect_to_a_get_has_no_key(kind: str, headers: dict[str, str], server: Scripted) -> None:
    """Neither ours nor that of the caller."""
    server.script(Answer(303, {"Location": "/result"}))

    got = Sender(kind).post(server.url, follow=True, headers=headers)

    assert [(each.method, each.key is not None) for each in server.seen] == [("POST", True), ("GET", False)]
    assert got.status == 201


@EACH
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "invoice-7"}])
def test_another_origin_is_not_shown_the_key(
    kind: str, headers: dict[str, str], server: Scripted, proxy: Proxy
) -> None:
    """It gets a key that is derived from the first one, the same with each attempt; back home, the first is sent."""
    elsewhere = url_of(proxy)
    home = Answer(307, {"Location": server.url + "/home"})
    server.script(Answer(307, {"Location": elsewhere}), 503, home)

    Sender(kind).post(server.url, follow=True, headers={"Authorization": "Bearer secret", **headers})

    first, second, third, fourth = server.keys
    assert first == fourth == headers.get("Idempotency-Key", first)
    assert second == third != first
    assert [each.headers.get("authorization") for each in server.seen[:2]] == ["Bearer secret", None]


@EACH
def test_a_retry_leaks_no_connection(kind: str, server: Scripted) -> None:
    """A client with one connection makes all attempts, though none of the answers says how long it is."""
    unread = {"stream": True} if kind == REQUESTS else {}
    lengthy = [Answer(503, body=b"x" * 200_000, chunked=True) for _ in range(4)]
    server.script(*lengthy)

    got = Sender(kind, limit=1).post(server.url, server.url, **unread)

    assert got.status == 201
    assert len(server.seen) == 6


async def test_a_caller_that_gives_up_is_obeyed_at_once(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that is cancelled during the pause between two attempts ends, and nothing more is sent."""
    server.script(Answer(503, {"Retry-After": "30"}))
    sleep, paused = anyio.sleep, asyncio.Event()

    async def pause(seconds: float) -> None:
        paused.set()
        await sleep(seconds)

    monkeypatch.setattr("anyio.sleep", pause)
    async with httpx.AsyncClient(transport=AsyncIdempotentTransport()) as client:
        task = asyncio.create_task(client.post(server.url))
        await paused.wait()
        task.cancel()
        begin = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert time.monotonic() - begin < 10
    assert len(server.seen) == 1


async def test_a_call_that_is_cancelled_gives_its_connection_back(server: Scripted) -> None:
    """A client with one connection can make the next call."""
    server.script(Answer(silent=True), 503)
    limits = httpx.Limits(max_connections=1)
    transport = AsyncIdempotentTransport(httpx.AsyncHTTPTransport(limits=limits), retry=AT_ONCE)

    async with httpx.AsyncClient(transport=transport) as client:
        task = asyncio.create_task(client.post(server.url))
        await until(lambda: server.seen, "the request")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        response = await client.post(server.url)

    first, second, third = server.keys
    assert response.status_code == 201
    assert first != second == third


def test_a_request_that_is_sent_again_is_the_same_call(server: Scripted) -> None:
    """One object of httpx has one key."""
    server.script()

    with httpx.Client(transport=IdempotentTransport()) as client:
        request = client.build_request("POST", server.url)
        client.send(request)
        client.send(request)

    assert len(server.seen) == 2
    assert len(set(server.keys)) == 1
    assert request.extensions["idempotency"].attempts == 2


def test_a_request_that_is_authenticated_again_is_the_same_call(server: Scripted) -> None:
    """The second request of Digest authentication has the key of the first, and is retried too."""
    challenge = {"WWW-Authenticate": 'Digest realm="shop", nonce="1", qop="auth", algorithm=SHA-256'}

    server.script(Answer(401, challenge), 503)
    with httpx.Client(transport=IdempotentTransport(retry=AT_ONCE), auth=httpx.DigestAuth("me", "secret")) as client:
        assert client.post(server.url).status_code == 201
    keys = server.keys
    server.script(Answer(401, challenge), 503)
    with requests.Session() as session:
        session.mount(server.url, IdempotentAdapter(retry=AT_ONCE))
        response = session.post(server.url, auth=HTTPDigestAuth("me", "secret"), timeout=10)

    call = call_of(response)
    assert call is not None
    assert (response.status_code, call.attempts) == (201, 3)
    assert [len(keys), len(set(keys))] == [len(server.keys), len(set(server.keys))] == [3, 1]


def test_bytes_that_requests_is_given_as_a_key_are_a_key(server: Scripted) -> None:
    """They are sent as they are."""
    server.script(503)

    with requests.Session() as session:
        session.mount(server.url, IdempotentAdapter(retry=AT_ONCE))
        session.post(server.url, headers={"Idempotency-Key": b"invoice-7"}, timeout=10)

    assert server.keys == ["invoice-7"] * 2


def test_a_multipart_body_that_was_read_is_sent_again(server: Scripted) -> None:
    """In httpx it is a stream until then; in requests it is always bytes."""
    files = {"invoice": ("invoice.txt", b"tea")}

    server.script(503, 503, 503)
    with httpx.Client(transport=IdempotentTransport(retry=AT_ONCE)) as client:
        assert client.post(server.url, files=files).status_code == 503
        request = client.build_request("POST", server.url, files=files)
        request.read()
        assert client.send(request).status_code == 201
    _, first, *others = [each.body for each in server.seen]
    server.script(503)
    with requests.Session() as session:
        session.mount(server.url, IdempotentAdapter(retry=AT_ONCE))
        assert session.post(server.url, files=files, timeout=10).status_code == 201

    assert b"tea" in first
    assert others == [first, first]
    assert len({each.body for each in server.seen}) == 1


@pytest.mark.parametrize(
    ("to", "same"),
    [
        ("https://api.example/other", True),
        ("https://api.example:443/other", True),
        ("http://API.example:80/other", True),
        ("https://api.example:8443/other", False),
        ("https://other.example/", False),
        ("http://api.example:81/", False),
    ],
)
def test_https_on_the_same_host_is_shown_the_key(to: str, same: bool) -> None:
    """As it is shown the credentials."""
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        return httpx.Response(307 if len(keys) == 1 else 200, headers={"Location": to})

    transport = IdempotentTransport(httpx.MockTransport(answer))
    with httpx.Client(transport=transport, follow_redirects=True) as client:
        client.post("http://api.example/")

    assert (keys[0] == keys[1]) is same


def test_a_url_without_an_origin_is_one_of_its_own() -> None:
    """The client itself refuses it."""
    assert origin_of("http://api.example:99999/") == ("", "http://api.example:99999/", 0)


def test_the_retries_of_another_transport_have_the_key(server: Scripted) -> None:
    """httpx-retries is inside, and retries what it is asked to."""
    server.script(503, 503)
    inner = RetryTransport(retry=InnerRetry(3, allowed_methods={"POST"}, backoff_factor=0))

    with httpx.Client(transport=IdempotentTransport(inner, retry=Retry(1))) as client:
        response = client.post(server.url)

    assert response.status_code == 201
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1


def test_a_certificate_that_is_refused_is_not_tried_again() -> None:
    """The next attempt would be refused too."""
    sent = []

    def refuse(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        raise httpx.ConnectError("refused") from ssl.SSLCertVerificationError("self-signed")

    with (
        httpx.Client(transport=IdempotentTransport(httpx.MockTransport(refuse))) as client,
        pytest.raises(httpx.ConnectError),
    ):
        client.post("https://api.example/")

    assert len(sent) == 1


def test_a_call_does_not_show_its_key() -> None:
    """It may be logged."""
    assert "invoice-7" not in repr(Call("invoice-7"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": "POST"}, "methods must be names"),
        ({"methods": [1]}, "methods must be names"),
        ({"header_name": "Idempotency Key"}, "header_name must be the name of a header"),
        ({"retry": 3}, "retry must be a Retry"),
        ({"ttl": 0}, "ttl must be positive"),
        ({"store": "memory://"}, "store must be a Store"),
    ],
)
@EACH
def test_an_option_that_cannot_work_is_refused(kind: str, options: dict[str, Any], says: str) -> None:
    """When the transport is made."""
    with pytest.raises(ConfigurationError, match=says):
        Sender(kind, **options).post("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "options",
    [{"attempts": 0}, {"attempts": True}, {"first": -1}, {"most": "1"}, {"deadline": 0}, {"deadline": float("inf")}],
)
def test_a_retry_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    """When it is made."""
    with pytest.raises(ConfigurationError):
        Retry(**options)


def test_pauses_are_chosen_from_a_range_that_doubles() -> None:
    """From nothing up to half a second at first, and up to 8 at most."""
    chosen = {attempt: [Retry().pause(attempt) for _ in range(400)] for attempt in (1, 2, 9)}

    assert 0.4 < max(chosen[1]) <= 0.5
    assert 0.8 < max(chosen[2]) <= 1.0
    assert 6.4 < max(chosen[9]) <= 8.0
    assert min(chosen[9]) < 1.6

"""Which header fields are recorded and replayed (conformance rows 35 and 57)."""

from __future__ import annotations

import pytest

from idempotency._http.codec import decode_response, encode_response
from idempotency._http.recorded_headers import recorded_headers
from idempotency.stores.memory import MemoryStore
from tests.kit.asgi_calls import Effects, call, protect, respond

pytestmark = pytest.mark.fronts("asgi", "wsgi")


@pytest.mark.parametrize(
    "name",
    [
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Authentication-Info",
        "Proxy-Authorization",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
        "Date",
        "Set-Cookie",
        "Access-Control-Allow-Credentials",
        "Access-Control-Allow-Headers",
        "Access-Control-Allow-Methods",
        "Access-Control-Allow-Origin",
        "Access-Control-Allow-Private-Network",
        "Access-Control-Expose-Headers",
        "Access-Control-Max-Age",
        "Traceparent",
        "Traceresponse",
        "Tracestate",
        "Baggage",
        "Server-Timing",
        "X-Request-ID",
        "X-Correlation-ID",
        "RateLimit",
        "RateLimit-Policy",
        "RateLimit-Remaining",
        "X-RateLimit-Limit",
        "X-Rate-Limit-Reset",
        "X-Ratelimit-Reset-Requests",
        "Anthropic-RateLimit-Tokens-Remaining",
        "Age",
        "Via",
        "Cache-Status",
        "Proxy-Status",
        "CDN-Cache",
        "CF-Ray",
        "CF-Cache-Status",
        "X-Cache",
        "X-Cache-Hits",
        "X-Served-By",
        "X-Timer",
        "X-Varnish",
        "X-Amz-Cf-Id",
        "X-Envoy-Upstream-Service-Time",
        "X-Amzn-Trace-Id",
        "X-Amzn-RequestId",
        "X-Amz-Request-Id",
        "X-B3-TraceId",
        "X-B3-Sampled",
        "b3",
        "Uber-Trace-Id",
        "X-Cloud-Trace-Context",
        "X-Datadog-Trace-Id",
        "Sentry-Trace",
        "Request-Id",
        "X-GitHub-Request-Id",
        "X-Runtime",
        "X-Process-Time",
        "X-Response-Time",
        "NEL",
        "Report-To",
        "Reporting-Endpoints",
        "Alt-Svc",
        "Authentication-Info",
        "DPoP-Nonce",
        "Replay-Nonce",
        "Idempotent-Replayed",
        "Idempotency-Replayed",
        "X-Idempotent-Replayed",
        "X-Idempotency-Replay",
    ],
)
def test_what_belongs_to_one_exchange_is_not_recorded(name):
    """Row 57: fields of the connection, its caches, traces, quotas and times are dropped in any case."""
    headers = [(b"etag", b"1"), (name.encode(), b"a"), (name.lower().encode(), b"b"), (b"etag", b"2")]

    assert recorded_headers(headers) == [(b"etag", b"1"), (b"etag", b"2")]
    assert decode_response(encode_response(200, headers, b"")).headers == ((b"etag", b"1"), (b"etag", b"2"))


@pytest.mark.parametrize(
    "name",
    [
        b"Content-Type",
        b"Content-Length",
        b"Content-Encoding",
        b"Location",
        b"ETag",
        b"Vary",
        b"Retry-After",
        b"Cache-Control",
        b"Link",
        b"Set-Cookies",
        b"X-Date",
        b"X-Migrate-Limit",
        b"X-Rate",
        b"X-Limit-Rate",
        b"Stage",
        b"Agent",
        b"X-Transaction-Id",
        b"Idempotency-Key",
        b"Server",
        b"WWW-Authenticate",
    ],
)
def test_everything_else_is_recorded(name):
    """Row 35: what says something about the result stays, bytes and repeats included."""
    headers = [(name, b"a"), (name, b"a")]

    assert recorded_headers(headers) == headers


def test_what_connection_lists_is_not_recorded():
    """RFC 9110 section 7.6.1: the fields a Connection field names are of the connection too."""
    headers = [(b"x-hop", b"1"), (b"Connection", b"close, X-Hop"), (b"x-end", b"2"), (b"connection", b"\tx-other ,")]

    assert recorded_headers([*headers, (b"X-Other", b"3")]) == [(b"x-end", b"2")]


async def test_the_first_answer_goes_out_unchanged_and_its_replay_without_what_was_of_one_exchange():
    """The live response has all fields of the application; the replay has those of the result, and one marker."""
    result = [(b"content-type", b"text/plain"), (b"location", b"/o1")]
    exchange = [
        (b"ratelimit-remaining", b"4"),
        (b"via", b"1.1 edge"),
        (b"idempotent-replayed", b"true"),
        (b"age", b"9"),
    ]

    async def handler(scope, receive, send):
        await respond(send, headers=[*exchange, *result])

    app = protect(Effects(handler))

    assert (await call(app, key="k")).headers == [*exchange, *result]
    assert (await call(app, key="k")).headers == [*result, (b"idempotent-replayed", b"true")]


async def test_a_record_with_fields_of_one_exchange_is_replayed_without_them():
    """A record of an earlier release has them, or has the present name of the marker; neither is sent."""
    store = MemoryStore()

    async def handler(scope, receive, send):
        await respond(send, headers=[(b"x-again", b"no"), (b"location", b"/o1")])

    app = Effects(handler)
    await call(protect(app, store), key="k")
    retry = await call(protect(app, store, replayed_header="X-Again"), key="k")

    assert (retry.headers, app.runs) == ([(b"location", b"/o1"), (b"x-again", b"true")], 1)

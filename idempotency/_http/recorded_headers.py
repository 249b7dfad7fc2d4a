"""Which header fields of a response are part of its recorded result.

A field is not recorded if it says something about one exchange: its connection, its caches, its trace, its time. A
duplicate is another exchange. Nothing here concerns the first answer: it goes out as the application sent it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from idempotency.policy import Headers

_NOT_RECORDED: dict[str, str] = {
    "the connection and its proxies (RFC 9110 section 7.6.1, RFC 7838)": """
        connection keep-alive proxy-authenticate proxy-authentication-info proxy-authorization proxy-connection te
        trailer transfer-encoding upgrade alt-svc
    """,
    "the time at which the message was made: the server dates the replay itself (RFC 9110 section 6.6.1)": "date",
    "the way of the message through caches and proxies (RFC 9110 section 7.6.3, RFC 9111, RFC 9209, RFC 9211)": """
        via age cache-status proxy-status cdn-* cf-* x-cache* x-proxy-cache x-served-by x-timer x-varnish* x-cdn x-cdn-*
        x-edge-* x-envoy-* x-kong-* x-fastly-* fastly-* x-akamai-* akamai-* x-azure-ref* x-vercel-* x-amz-cf-* x-iinfo
        x-backend-server
    """,
    "the session of the first caller: a replay, perhaps after a logout, must not restore it (RFC 6265)": """
        set-cookie set-cookie2
    """,
    "one authentication or signed request (RFC 7615, RFC 8555 section 6.5, RFC 9449 section 8)": """
        authentication-info replay-nonce dpop-nonce
    """,
    # The outer CORS middleware answers the present Origin.
    "the Origin of the first request (Fetch standard, section 3.2)": """
        access-control-allow-credentials access-control-allow-headers access-control-allow-methods
        access-control-allow-origin access-control-allow-private-network access-control-expose-headers
        access-control-max-age
    """,
    "one trace (W3C Trace Context, Baggage, Zipkin B3, Jaeger, Datadog, X-Ray and other tracers)": """
        baggage traceparent traceresponse tracestate b3 x-b3-* uber-trace-id uberctx-* jaeger-* ot-tracer-* ot-baggage-*
        x-ot-span-context x-datadog-* x-cloud-trace-context x-amzn-trace-id x-trace x-trace-* trace-id x-span-id
        sentry-trace sw8 sw8-* x-instana-* newrelic x-newrelic-* elastic-apm-traceparent x-dynatrace* x-honeycomb-trace
        grpc-trace-bin
    """,
    "the name that a server or provider gave one request": """
        request-id x-request-id correlation-id x-correlation-id x-correlationid x-amzn-requestid x-amzn-request-id
        x-amz-request-id x-amz-id-2 x-amz-apigw-id x-ms-request-id x-ms-client-request-id x-ms-correlation-request-id
        x-github-request-id x-nf-request-id x-railway-request-id fly-request-id x-guploader-uploadid rndr-id
        x-debug-token x-debug-token-link original-request
    """,
    "how long one run took (W3C Server Timing)": """
        server-timing x-runtime x-process-time x-process-time-* x-response-time x-request-duration x-execution-time
        x-elapsed-time openai-processing-ms
    """,
    "the quota of the caller at one moment (draft-ietf-httpapi-ratelimit-headers; see also _is_rate_limit)": """
        x-quota-* x-shopify-shop-api-call-limit
    """,
    "where a browser reports errors of this connection (W3C Network Error Logging, Reporting API)": """
        nel report-to reporting-endpoints
    """,
    "the replay of another idempotency layer, such as one that an upstream has": """
        idempotent-replay* idempotency-replay* x-idempotent-replay* x-idempotency-replay*
    """,
}
"""Lower-case names by the reason for which they are not recorded. ``*`` at the end: whatever begins so."""

TRACE = b"traceparent"
"""The name under which a record has the trace context of its run. Every version drops a field of this name at a replay,
because it is in the table above."""

_PATTERNS = [name.encode("ascii") for names in _NOT_RECORDED.values() for name in names.split()]
_NAMES = frozenset(each for each in _PATTERNS if not each.endswith(b"*"))
_PREFIXES = tuple(each[:-1] for each in _PATTERNS if each.endswith(b"*"))


@lru_cache(maxsize=1024)
def _is_recorded(name: bytes) -> bool:
    """Return whether a field is part of the result. An application has few names, so the answers are cached."""
    lower = name.lower()
    return not (lower in _NAMES or lower.startswith(_PREFIXES) or _is_rate_limit(lower))


def _is_rate_limit(name: bytes) -> bool:
    """Return whether a field is a rate limit, such as RateLimit-Policy, X-Rate-Limit-Reset or Anthropic-RateLimit-*."""
    words = name.split(b"-")
    return b"ratelimit" in words or (b"rate", b"limit") in pairwise(words)


def recorded_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Select the header pairs that are part of the result, without the fields that a Connection field lists."""
    listed: set[bytes] = set()
    pairs: list[tuple[bytes, bytes]] = []
    for field, content in headers:
        name, value = bytes(field), bytes(content)
        if _is_recorded(name):
            pairs.append((name, value))
        elif name.lower() == b"connection":
            listed.update(option.strip(b" \t").lower() for option in value.split(b","))
    return [pair for pair in pairs if pair[0].lower() not in listed] if listed else pairs


def trace_of(headers: Headers) -> str:
    """Return the trace context in which a response was recorded; empty if there is none."""
    # It is the last one, and no header of an application has this name in a record.
    return headers[-1][1].decode("ascii") if headers and headers[-1][0] == TRACE else ""


def replayed_headers(headers: Headers, marker: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a replay: those recorded, and ``marker``, which says that it is one, once.

    A record may be older than a name in the table above, or than the present name of the marker.
    """
    if headers and headers[-1][0] == TRACE:
        headers = headers[:-1]  # sooner than by the table, so that the names are those of every other such replay
    if _are_replayed(tuple([name for name, _ in headers]), marker[0]):
        return [*headers, marker]
    return [*(pair for pair in recorded_headers(headers) if pair[0].lower() != marker[0]), marker]


@lru_cache(maxsize=1024)
def _are_replayed(names: tuple[bytes, ...], marker: bytes) -> bool:
    """Return whether all fields with these names are replayed. An application has few lists of names."""
    return all(_is_recorded(name) and name.lower() != marker for name in names)

"""A compressed response, replayed to a client that does not accept its coding (RFC 9110 sections 8.4 and 12.5.3)."""

from __future__ import annotations

import gzip
import itertools
import zlib

import pytest

from idempotency import Policy
from tests.kit.asgi_calls import Effects, Reply, call, protect, respond

pytestmark = pytest.mark.fronts("asgi", "wsgi")

TEXT = b"to be or not to be, " * 100


def raw_deflate(data):
    """Compress without the zlib header, as some applications do under the name deflate."""
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(data) + deflater.flush()


async def replay(body, headers, accept, *, status=201, **options):
    """Record a response, and return its replay to a client that sends this Accept-Encoding (None: it sends none)."""

    async def handler(scope, receive, send):
        await respond(send, status, body, headers)

    effects = Effects(handler)
    app = protect(effects, **options)
    first = await call(app, key="k", headers=[(b"accept-encoding", b"gzip, deflate, br")])
    assert (first.body, first.headers) == (body, headers)
    fields = [accept] if isinstance(accept, bytes) else accept or []
    retry = await call(app, key="k", headers=[(b"accept-encoding", field) for field in fields])
    assert effects.runs == 1
    return retry


def coded(body, coding, *more):
    return [(b"content-encoding", coding), (b"content-length", b"%d" % len(body)), *more]


def was_decoded(retry: Reply) -> bool:
    """Return whether the replay is the text without a coding; everything about its length must fit."""
    if retry.header(b"content-encoding") is not None:
        return False
    assert (retry.replayed, retry.body) == (True, TEXT)
    assert retry.header(b"content-length") == b"%d" % len(TEXT)
    return True


@pytest.mark.parametrize(
    ("accept", "decodes"),
    [
        (None, True),
        (b"", True),
        (b"identity", True),
        (b"br", True),
        (b"gzip;q=0", True),
        (b"gzip; q=0.000, br", True),
        (b"*, gzip;q=0", True),
        (b"*;q=0, identity", True),
        (b"gzip;q=x", True),
        (b"gzip", False),
        (b"GZIP;Q=0.5", False),
        (b"x-gzip", False),
        (b"deflate , gzip ;q=1.0", False),
        (b"*", False),
        (b"*;q=0, gzip", False),
        (b"identity;q=0, gzip", False),
        ([b"br", b"gzip"], False),
    ],
)
async def test_a_response_is_decoded_where_its_coding_is_not_accepted(accept, decodes):
    """The Accept-Encoding of the retry decides; a client that names no coding gets the body without one."""
    body = gzip.compress(TEXT)

    retry = await replay(body, coded(body, b"gzip"), accept)

    assert was_decoded(retry) == decodes
    assert decodes or retry.body == body


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        (b"gzip", gzip.compress(TEXT)),
        (b"X-GZip", gzip.compress(TEXT)),
        (b"gzip", gzip.compress(TEXT[:7]) + gzip.compress(TEXT[7:])),
        (b"deflate", zlib.compress(TEXT)),
        (b"deflate", raw_deflate(TEXT)),
        (b"deflate, gzip", gzip.compress(zlib.compress(TEXT))),
        (b"identity, gzip", gzip.compress(TEXT)),
    ],
    ids=itertools.count(),
)
async def test_what_the_standard_library_knows_is_decoded(coding, body):
    """Gzip, also of several members, and deflate, with its header and without; one inside another."""
    assert was_decoded(await replay(body, coded(body, coding), b"identity"))


async def test_codings_that_are_accepted_stay():
    """The outermost coding is removed first, and no more than the client needs."""
    inner = zlib.compress(TEXT)
    body = gzip.compress(inner)

    retry = await replay(body, [(b"content-encoding", b"deflate"), (b"content-encoding", b"gzip")], b"deflate")

    assert (retry.body, retry.header(b"content-encoding")) == (inner, b"deflate")


@pytest.mark.parametrize(
    ("coding", "body", "accept"),
    [
        (b"br", b"\x0b\x02\x80brotli\x03", b"gzip"),
        (b"zstd", b"\x28\xb5\x2f\xfd", None),
        (b"compress", b"\x1f\x9d", b"identity"),
        (b"gzip, br", b"\x0b\x02\x80brotli\x03", b"gzip"),
        (b"gzip", TEXT, b"identity"),
        (b"gzip", gzip.compress(TEXT)[:-4], b"identity"),
        (b"gzip", gzip.compress(TEXT) + b"more", b"identity"),
        (b"deflate", zlib.compress(TEXT)[:-4], b"identity"),
        (b"deflate", TEXT, b"identity"),
        (b"gzip", gzip.compress(TEXT), b"identity;q=0, br"),
        (b"gzip", gzip.compress(TEXT), b"*;q=0"),
        (b"gzip", gzip.compress(bytes(16 * 2000 + 1)), b"identity"),
        (b"deflate", zlib.compress(bytes(16 * 2000 + 1)), b"identity"),
    ],
    ids=itertools.count(),
)
async def test_what_cannot_be_sent_in_an_accepted_coding_is_completed_and_not_replayable(coding, body, accept):
    """The coding is unknown, the body is not in it or grows over its bound, or the client accepts no other."""
    retry = await replay(body, coded(body, coding), accept, policy=Policy(max_response=2000))

    assert (retry.status, retry.code) == (409, "completed-not-replayable")


async def test_a_body_may_grow_to_its_bound():
    """Sixteen times max_response is decoded."""
    body = gzip.compress(bytes(16 * 2000))

    retry = await replay(body, coded(body, b"gzip"), b"identity", policy=Policy(max_response=2000))

    assert retry.body == bytes(16 * 2000)


async def test_a_part_of_a_compressed_body_is_not_replayable():
    """A 206 has a range of the coded bytes."""
    body = gzip.compress(TEXT)

    retry = await replay(body, coded(body, b"gzip", (b"content-range", b"bytes 0-9/90")), b"identity", status=206)

    assert retry.code == "completed-not-replayable"


@pytest.mark.fronts("asgi")
async def test_fields_over_the_coded_bytes_are_not_sent_with_others():
    """Digests and signatures go, a strong tag becomes weak, and everything else, Vary included, stays."""
    body = gzip.compress(TEXT)
    of_bytes = [
        (b"content-digest", b"sha-256=:AA==:"),
        (b"Repr-Digest", b"sha-256=:AA==:"),
        (b"digest", b"sha-256=AA=="),
        (b"content-md5", b"AA=="),
        (b"signature", b"a=:AA==:"),
        (b"signature-input", b'a=("content-digest")'),
        (b"accept-ranges", b"bytes"),
    ]
    rest = [(b"vary", b"Accept-Encoding"), (b"content-type", b"text/plain")]

    strong = await replay(body, coded(body, b"gzip", (b"ETag", b'"a"'), *of_bytes, *rest), None)
    weak = await replay(body, coded(body, b"gzip", (b"etag", b'W/"a"')), None)

    assert strong.headers == [
        (b"content-length", b"%d" % len(TEXT)),
        (b"ETag", b'W/"a"'),
        *rest,
        (b"idempotent-replayed", b"true"),
    ]
    assert weak.header(b"etag") == b'W/"a"'


@pytest.mark.parametrize(
    ("status", "coding", "length"), [(204, b"gzip", None), (200, b"br", b"512"), (200, b"gzip", b"0")]
)
async def test_a_response_without_a_body_needs_no_decoding(status, coding, length):
    """A 204, or a response to HEAD, whose Content-Length is that of another response."""
    headers = [(b"content-encoding", coding), (b"x-total", b"3")] + ([(b"content-length", length)] if length else [])

    retry = await replay(b"", headers, b"identity", status=status)

    assert (retry.status, retry.replayed, retry.body) == (status, True, b"")
    assert (retry.header(b"content-encoding"), retry.header(b"x-total")) == (None, b"3")
    assert retry.header(b"content-length") == (b"0" if length == b"0" else None)


@pytest.mark.parametrize("accept", [None, b"gzip", b"identity;q=0, gzip"])
async def test_a_response_without_a_coding_is_replayed_to_everybody(accept):
    """The application chose to answer without a coding; every client can read that."""
    retry = await replay(TEXT, [(b"content-length", b"%d" % len(TEXT))], accept)

    assert was_decoded(retry)


@pytest.mark.parametrize("name", [b"identity", b"none", b"UTF-8"])
async def test_a_name_of_no_coding_does_not_prevent_a_replay(name):
    """Applications send such values by mistake, and clients ignore them."""
    retry = await replay(TEXT, [(b"content-encoding", name), (b"content-length", b"%d" % len(TEXT))], b"gzip")

    assert (retry.replayed, retry.body, retry.header(b"content-encoding")) == (True, TEXT, name)

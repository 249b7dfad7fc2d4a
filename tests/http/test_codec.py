"""The bytes of a recorded response (conformance row 35)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotency._http.codec import StoredResponse, decode_response, encode_response
from idempotency.errors import UnreadableError

GOLDEN = (
    b"\x01"  # version
    b"\x00\xc9"  # status 201
    b"\x00\x00\x00\x02"  # two header pairs
    b"\x00\x00\x00\x05"  # five bytes of body
    b"\x00\x00\x00\x08\x00\x00\x00\x03"  # lengths of the first pair
    b"\x00\x00\x00\x01\x00\x00\x00\x00"  # lengths of the second pair
    b"Location/o1"
    b"x"
    b"\x00\xffabc"
)


def test_the_bytes_of_version_1_are_fixed():
    """Golden bytes: what this version wrote must be read by every later one."""
    headers = [(b"Location", b"/o1"), (b"x", b"")]

    assert encode_response(201, headers, b"\x00\xffabc") == GOLDEN
    assert decode_response(GOLDEN) == StoredResponse(201, tuple(headers), b"\x00\xffabc")


def test_the_smallest_response_is_eleven_bytes():
    """A 204 without headers is its prefix."""
    data = encode_response(204, [], b"")

    assert data == b"\x01\x00\xcc" + bytes(8)
    assert decode_response(data) == StoredResponse(204, (), b"")


def test_repeated_headers_keep_their_order_and_bytes():
    """Row 35: pairs are neither folded nor decoded, nor is the case of a name changed."""
    headers = ((b"Link", b"<a>"), (b"X-B", b"\xff"), (b"link", b"<b>"), (b"Link", b"<a>"))

    assert decode_response(encode_response(200, headers, b"")).headers == headers


def test_pairs_of_any_byte_sequence_are_taken():
    """Applications send lists and bytearrays too."""
    data = encode_response(200, [[bytearray(b"a"), memoryview(b"b")]], bytearray(b"c"))

    assert decode_response(data) == StoredResponse(200, ((b"a", b"b"),), b"c")


# A rate limit, such as X-RateLimit, is not recorded.
NAME = st.binary(max_size=12).filter(lambda name: b"limit" not in name.lower()).map(lambda name: b"x-" + name)


@settings(max_examples=300, deadline=None)
@given(st.integers(100, 999), st.lists(st.tuples(NAME, st.binary(max_size=20)), max_size=6), st.binary(max_size=50))
def test_every_response_comes_back(status, headers, body):
    """What was recorded is replayed byte for byte."""
    expected = StoredResponse(status, tuple(headers), body)

    assert decode_response(encode_response(status, headers, body)) == expected


@pytest.mark.parametrize("length", range(len(GOLDEN)))
def test_a_record_that_was_cut_is_unreadable(length):
    """No prefix of a record is a record."""
    with pytest.raises(UnreadableError):
        decode_response(GOLDEN[:length])


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_unreadable_and_named(version):
    """A reader never guesses at what a newer writer meant."""
    with pytest.raises(UnreadableError, match=f"format {version}, not 1"):
        decode_response(bytes([version]) + GOLDEN[1:])


@pytest.mark.parametrize(
    "data",
    [
        GOLDEN + b"\x00",
        b"\x01\x00\x63" + bytes(8),  # status 99
        b"\x01\x03\xe8" + bytes(8),  # status 1000
        b"\x01\x00\xc8\xff\xff\xff\xff" + bytes(4),  # four billion headers
        b"\x01\x00\xc8" + bytes(4) + b"\xff\xff\xff\xff",  # a body of four gigabytes
        GOLDEN[:14] + b"\x09" + GOLDEN[15:],  # a name of nine bytes
        b'{"status": 200}',
    ],
)
def test_a_damaged_record_is_unreadable(data):
    """Lengths that do not account for every byte are refused without anything being allocated for them."""
    with pytest.raises(UnreadableError):
        decode_response(data)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda tail: b"\x01\x00\xc8\x00\x00\x00" + tail)))
def test_any_bytes_are_a_response_or_unreadable(data):
    """Garbage raises UnreadableError and nothing else; what is read is written again as it was."""
    try:
        response = decode_response(data)
    except UnreadableError:
        return
    lengths = sum(len(name) + len(value) + 8 for name, value in response.headers)
    assert 11 + lengths + len(response.body) == len(data)

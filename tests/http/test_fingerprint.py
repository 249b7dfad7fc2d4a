"""What makes two requests the same, and two callers (conformance rows 21-24, 52-54)."""

from __future__ import annotations

import hashlib
import hmac
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotency._http.fingerprint import (
    BodyHash,
    fingerprint,
    json_digest,
    value_digest,
)

REQUEST = {
    "method": "POST",
    "path": "/orders",
    "query": b"a=1",
    "content_type": b"application/json",
    "body_digest": b"d" * 32,
    "secret": None,
}


def body(data: bytes, content_type: bytes | None = None, cut: int = 1 << 30) -> bytes:
    hashed = BodyHash(content_type)
    for start in range(0, len(data), cut):
        hashed.update(data[start : start + cut])
    return hashed.digest()


def test_the_format_of_version_1_is_fixed():
    """Row 24: the stored formats, written out by hand; a change of one makes every recorded key mismatch."""
    text = b"request:1:4:POST7:/orders3:a=116:application/json32:" + b"d" * 32

    assert fingerprint(**REQUEST) == hashlib.sha256(text).digest()
    assert fingerprint(**{**REQUEST, "secret": b"s"}) == hmac.new(b"s", text, hashlib.sha256).digest()
    assert body(b"abc") == hashlib.sha256(b"raw:1:abc").digest()
    assert value_digest("abc") == value_digest(b"abc") == hashlib.sha256(b"value:1:3:abc").digest()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PATCH"},
        {"path": "/orders/"},
        {"path": "/Orders"},
        {"query": b"a=2"},
        {"query": b""},
        {"content_type": b"text/plain"},
        {"content_type": None},
        {"body_digest": b"e" * 32},
        {"secret": b"s"},
        {"path": "/ordersa", "query": b"=1"},
        {"path": "/orders3:a=1", "query": b""},
    ],
)
def test_every_part_counts_and_none_imitates_another(change):
    """Rows 24 and 54: a change of any part, and a move of bytes from one part to the next, is another request."""
    assert fingerprint(**{**REQUEST, **change}) != fingerprint(**REQUEST)


@pytest.mark.parametrize(
    "content_type",
    [b"application/json; charset=utf-8", b"Application/JSON", b" application/json ;x=y", b"application/json;"],
)
def test_parameters_and_case_of_the_content_type_do_not_count(content_type):
    """Row 24: only the essence of the content type is compared."""
    assert fingerprint(**{**REQUEST, "content_type": content_type}) == fingerprint(**REQUEST)


def test_a_path_of_undecodable_text_has_a_fingerprint():
    """Lone surrogates in a path are no reason to fail."""
    assert len(fingerprint(**{**REQUEST, "path": "/\udcff"})) == 32


def test_an_empty_body_has_a_stable_digest():
    """Row 24: no piece, and empty pieces, are the same empty body; a newline is another."""
    pieces = BodyHash()
    pieces.update(b"")
    pieces.update(b"")

    assert pieces.digest() == BodyHash().digest() == BodyHash(b"text/plain").digest()
    assert body(b"\n") != body(b"")


def form(boundary: bytes, *parts: bytes) -> bytes:
    head = b'\r\nContent-Disposition: form-data; name="f"\r\n\r\n'
    return b"".join(b"--" + boundary + head + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def multipart(boundary: bytes) -> bytes:
    return b"multipart/form-data; boundary=" + boundary


def test_the_boundary_of_a_multipart_body_does_not_count():
    """Row 24: a form that a client builds again, with a new boundary, is the same form."""
    first = body(form(b"aaa", b"one", b"two"), multipart(b"aaa"))

    assert body(form(b"bbbbbb", b"one", b"two"), multipart(b"bbbbbb")) == first
    assert body(form(b"c c", b"one", b"two"), b'Multipart/Form-Data; charset=x; Boundary="c c"') == first
    assert body(form(b"ddd", b"one", b"two"), b'multipart/form-data; a="; boundary=z";boundary=ddd') == first


@pytest.mark.parametrize(
    "parts",
    [(b"one", b"twO"), (b"two", b"one"), (b"one",), (b"one", b"two", b""), (b"onet", b"wo"), (b"one\r\n--bbb", b"two")],
)
def test_everything_else_of_a_multipart_body_counts(parts):
    """Row 24: the parts' bytes, number, order and limits are compared."""
    first = body(form(b"aaa", b"one", b"two"), multipart(b"aaa"))

    assert body(form(b"aaa", *parts), multipart(b"aaa")) != first
    assert body(form(b"bbb", *parts), multipart(b"bbb")) != first


def test_other_boundaries_of_a_cut_are_told_apart():
    """Two bodies with the same bytes between delimiters in other places differ."""
    assert body(b"--x1\r\n--x23", multipart(b"x")) != body(b"--x12\r\n--x3", multipart(b"x"))
    assert body(b"--x\r\n--x", multipart(b"x")) != body(b"--x", multipart(b"x"))


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary=""',
        b"multipart/form-data; boundary=" + b"a" * 71,
        b'multipart/form-data; boundary="a "',
        b'multipart/form-data; boundary="a',
        "multipart/form-data; boundary=é".encode(),
        b"text/plain; boundary=aaa",
        b'multipart/form-data; x="; boundary=aaa"',
    ],
)
def test_without_a_usable_boundary_every_byte_counts(content_type):
    """Row 24: a body that cannot be read as parts is compared as it is."""
    data = form(b"aaa", b"one")

    assert body(data, content_type) == body(data)


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("content_type", [None, multipart(b"aaa")])
def test_where_a_body_is_cut_does_not_count(cut, content_type):
    """The digest of a body does not depend on how the server hands it over."""
    data = form(b"aaa", b"one", b"\r\n--aa\r\n--a", b"")

    assert body(data, content_type, cut) == body(data, content_type)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"\r\n--b", b"--b", b"\r\n", b"-", b"b", b"x" * 9])), st.integers(1, 9))
def test_any_multipart_body_is_cut_safely(pieces, cut):
    """No way to cut a body changes the digest, and a body that differs after it does."""
    data = b"".join(pieces)

    assert body(data, multipart(b"b"), cut) == body(data, multipart(b"b"))
    assert body(data + b"y", multipart(b"b"), cut) != body(data, multipart(b"b"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a":1,"b":[1,2]}', b' {\n"b" : [1, 2],\t"a":1 }\r\n'),
        (b'{"a":{"x":1,"y":2}}', b'{"a":{"y":2,"x":1}}'),
        (b'"\\u0041\\/"', b'"A/"'),
        ('"é"'.encode(), b'"\\u00e9"'),
        (b'"\\ud83d\\ude00"', '"\U0001f600"'.encode()),
    ],
)
def test_white_space_member_order_and_escapes_do_not_count_in_json(one, other):
    """Row 24: what JSON readers cannot tell apart is the same request."""
    assert json_digest(one) is not None
    assert json_digest(one) == json_digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"9007199254740993", b"9007199254740992"),
        (b"0.1", b"0.10000000000000000001"),
        (b"1", b"1.0"),
        (b"1e2", b"100"),
        (b"0", b"-0"),
        (b"1", b'"1"'),
        (b"1", b"true"),
        (b"null", b'"null"'),
        (b"[1,2]", b"[2,1]"),
        (b"[1,2]", b"[12]"),
        (b"{}", b"[]"),
        (b'{"a":1}', b'{"a":2}'),
        (b'{"a":1}', b'{"A":1}'),
        (b'{"a":null}', b"{}"),
        (b"1", b'{"number":"1"}'),
        (b'{"a":1}', b'{"object":{"a":1}}'),
        (b'"a "', b'"a"'),
        (b'"\\ud800"', b'"\\ud801"'),
    ],
)
def test_everything_else_counts_in_json(one, other):
    """Row 24: numbers are compared as they are written, arrays in order, and no value imitates another."""
    assert json_digest(one) is not None
    assert json_digest(other) is not None
    assert json_digest(one) != json_digest(other)


@pytest.mark.parametrize("number", [b"1e400", b"-1e-400", b"9" * 10_000, b"0." + b"1" * 10_000])
def test_no_number_is_too_large(number):
    """Numbers are never converted, so none overflows or is refused for its length."""
    assert json_digest(b'{"a": %b}' % number) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{",
        b'{"a":1',
        b'{"a":1}x',
        b"{'a':1}",
        b"[1,]",
        b"01",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'[{"b":{"a":1,"a":2}}]',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        b'"a\nb"',
        b"\xc2\xa01",
    ],
)
def test_what_is_not_one_clear_json_text_has_no_digest(data):
    """Row 24: invalid JSON, invalid UTF-8 and repeated member names are left to a comparison of bytes."""
    assert json_digest(data) is None


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("closed", [False, True])
def test_deep_nesting_neither_crashes_nor_has_a_digest(opening, closed):
    """A hundred thousand levels are refused before a parser sees them."""
    closing = opening.replace(b'"a":', b"").translate(bytes.maketrans(b"[{", b"]}"))[::-1] if closed else b""

    assert json_digest(opening * 100_000 + b"1" + closing * 100_000) is None


def nested(levels: int) -> bytes:
    return b'{"]":' * levels + b'"[[[["' + b"}" * levels


def test_the_limit_of_nesting_is_64_wherever_it_is_called_from():
    """The answer for one body must not depend on how much of the stack is in use; brackets in strings do not count."""
    deep = []

    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            deep.append((json_digest(nested(64)), json_digest(nested(65))))

    descend(0)
    descend(sys.getrecursionlimit() // 2)

    assert deep[0][0] is not None
    assert deep[0][1] is None
    assert deep[0] == deep[1]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_however_a_value_is_written_it_has_one_digest(value):
    """White space, escapes and the order of members make no difference to any value."""
    plain = json.dumps(value).encode()
    pretty = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True).encode()

    assert json_digest(plain) is not None
    assert json_digest(plain) == json_digest(pretty)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text('{}[]",:\\u0123eE+-. ntf', max_size=40).map(str.encode)))
def test_any_bytes_have_a_json_digest_or_none(data):
    """No body makes the digest raise."""
    digest = json_digest(data)

    assert digest is None or len(digest) == 32


def test_the_kinds_of_digest_do_not_imitate_each_other():
    """Row 54: the text that is hashed for one kind is not the same body in another."""
    assert json_digest(b"true") == hashlib.sha256(b"json:1:4:true").digest()
    assert body(b"json:1:4:true") != json_digest(b"true")
    assert value_digest(b"true") not in (body(b"true"), json_digest(b"true"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"1", b"1.0"),
        (b"1", b"10e-1"),
        (b"1e2", b"100"),
        (b"1E+2", b"0.1e3"),
        (b"0", b"-0.00e7"),
        (b"-1.50", b"-1.5"),
        (b"0.001", b"1e-3"),
        (b"[1.0, 2]", b"[1, 2.0]"),
        (b"1" + b"0" * 10_000, b"1e10000"),
        (b"1e99999999999999999999", b"10e99999999999999999998"),
    ],
)
def test_by_value_one_number_has_one_digest(one, other):
    """However it is written, and however large it is."""
    assert json_digest(one, by_value=True) is not None
    assert json_digest(one, by_value=True) == json_digest(other, by_value=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"9007199254740993", b"9007199254740992"),
        (b"0.1", b"0.10000000000000000001"),
        (b"1", b"-1"),
        (b"10", b"1"),
        (b"0.01", b"0.1"),
        (b"1", b'"1"'),
        (b"1", b"true"),
        (b"null", b"0"),
        (b"1", b'{"number":"1e0"}'),
        (b'{"a":null}', b"{}"),
    ],
)
def test_by_value_nothing_is_rounded(one, other):
    """Different numbers differ, in the last digit too, and no value imitates another."""
    assert json_digest(one, by_value=True) is not None
    assert json_digest(one, by_value=True) != json_digest(other, by_value=True)


def test_an_exponent_of_ten_thousand_digits_has_no_digest():
    """It is compared as it is written, like what is not JSON."""
    assert json_digest(b"1e" + b"9" * 10_000, by_value=True) is None

"""The Idempotency-Key and Prefer fields (conformance rows 1-12)."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from idempotency._http.fields import values_of
from idempotency._http.key import read_key, read_prefer_wait
from idempotency.errors import KeyInvalidError

UUID = "8e03978e-40d5-43e8-bc93-6894a57f9324"


def key(*values: bytes, **options):
    return read_key(values, **options)


def key_in(headers: list[tuple[bytes, bytes]], name: bytes = b"idempotency-key"):
    return read_key(values_of(headers, name))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b'"abc"', "abc"),
        (b'"8e03978e-40d5-43e8-bc93-6894a57f9324"', UUID),
        (b'"a b, c; d=e"', "a b, c; d=e"),
        (b'" a "', " a "),
        (b'"!#~[]{}"', "!#~[]{}"),
        (rb'"a\"b\\c"', r'a"b\c'),
        (rb'"\\\\"', "\\\\"),
    ],
)
def test_a_string_yields_its_unescaped_text(value, expected, strict):
    """Rows 1 and 2: the quotes are not part of the key, and the two escapes are undone."""
    assert key(value, strict=strict) == expected


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("value", [rb'"a\b"', rb'"\n"', rb'"\u0041"', rb'"a\ b"', rb'"abc\"', b'"\\'])
def test_other_backslash_sequences_are_invalid(value, strict):
    """Row 2: a backslash escapes a quote or a backslash and nothing else."""
    with pytest.raises(KeyInvalidError):
        key(value, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("byte", [b"\x00", b"\t", b"\n", b"\r", b"\x1f", b"\x7f", b"\x80", "é".encode(), b"\xff"])
def test_bytes_outside_printable_ascii_are_invalid(byte, strict):
    """Row 3: control and non-ASCII bytes are refused, quoted or not."""
    with pytest.raises(KeyInvalidError):
        key(b'"a' + byte + b'b"', strict=strict)
    with pytest.raises(KeyInvalidError):
        key(b"a" + byte + b"b", strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("value", [b'"abc', b'"', b'abc"', b'"abc"d', b'"abc" d', b'"abc""d"', b'"abc" ;v=1', b'a"b"'])
def test_a_damaged_string_is_invalid(value, strict):
    """Row 4: a missing quote, or anything but parameters after the closing one, is refused."""
    with pytest.raises(KeyInvalidError):
        key(value, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "parameters",
    [
        b";v=1",
        b";  v",
        b";v;w=?0;*x=-999999999999.999",
        b";v=999999999999999",
        b";a_b-c.d*=*tok:en/x",
        b';v="a;\\"b\\\\"',
        b";v=:aGVsbG8=:",
        b";v=:aGVsbG8:",
        b";v=@-1659578233",
        b';v=%"f%c3%bc %25"',
    ],
)
def test_well_formed_parameters_are_ignored(parameters, strict):
    """Row 5: parameters of every type of bare item leave the key as it is."""
    assert key(b'"abc"' + parameters, strict=strict) == "abc"


@pytest.mark.parametrize(
    "parameters",
    [
        b";",
        b";;v",
        b";V=1",
        b";1v",
        b";v=",
        b";v =1",
        b";v= 1",
        b";\tv",
        b";v=1.",
        b";v=1.2345",
        b";v=1234567890123456",
        b";v=1234567890123.1",
        b";v=--1",
        b";v=?2",
        b";v=:a*b:",
        b";v=:=aa:",
        b";v=:aa",
        b";v=@1.5",
        b';v="a',
        b";v=%x",
        b';v=%"%C3%BC"',
        b';v=%"%c3"',
        b';v=%"%"',
        b";v=(1 2)",
        b";v=1 w",
    ],
)
def test_malformed_parameters_are_invalid(parameters):
    """Row 5: parameters are held to the grammar, though their values do not matter."""
    with pytest.raises(KeyInvalidError):
        key(b'"abc"' + parameters)


@pytest.mark.parametrize(
    "value",
    [
        b"abc",
        b"42",
        b"1.5",
        b"?1",
        b":aGVsbG8=:",
        b"@1659578233",
        b'%"abc"',
        b'("abc")',
        b'("abc" "def")',
        b"8e03978e-40d5-43e8-bc93-6894a57f9324",
    ],
)
def test_strict_mode_takes_no_other_type(value):
    """Row 6: tokens, numbers, booleans, bytes, dates, display strings, lists and bare text are refused."""
    with pytest.raises(KeyInvalidError):
        key(value, strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        (b'"abc"', b'"def"'),
        (b'"abc"', b'"abc"'),
        (b'"abc"', b""),
        (b"abc", b"abc"),
        (b'"abc", "def"',),
        (b'"abc","abc"',),
        (b'"abc";v=1, "def"',),
        (b'"abc",',),
        (b"abc, def",),
        (b"abc,def",),
        (b",abc",),
    ],
)
def test_more_than_one_key_is_invalid(values, strict):
    """Row 7: two field lines, or a list, are never joined and never cut to the first."""
    with pytest.raises(KeyInvalidError):
        key(*values, strict=strict)


def test_long_strings_are_parsed_and_judged_by_their_length():
    """Row 8: the parser takes 1024 characters and more; the limit counts the characters of the key."""
    with pytest.raises(KeyInvalidError, match="1024 characters; at most 255"):
        key(b'"' + b"a" * 1024 + b'"')
    assert key(b'"' + b'\\"' * 255 + b'"') == '"' * 255
    with pytest.raises(KeyInvalidError, match="256 characters; at most 255"):
        key(b'"' + b"a" * 256 + b'"')
    with pytest.raises(KeyInvalidError, match="256 characters; at most 255"):
        key(b"a" * 256)


@pytest.mark.parametrize("field", [b"idempotency-key", b"Idempotency-Key", b"IDEMPOTENCY-KEY"])
def test_surrounding_space_and_the_case_of_the_name_do_not_count(field):
    """Row 9: white space around the value is no part of it; the field name is case-insensitive."""
    assert key_in([(b"host", b"x"), (field, b'  "abc" \t')]) == "abc"
    assert key_in([(field, b"\t abc ")]) == "abc"


def test_only_an_absent_field_is_no_key():
    """Row 10: None means that there is no such field; a field that says nothing is refused."""
    assert key() is None
    assert key_in([(b"idempotency-kez", b"abc"), (b"x-idempotency-key", b"abc")]) is None
    assert key_in([(b"X-Request-Key", b"abc")], b"x-request-key") == "abc"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("value", [b'""', b'"";v=1', b"", b"  "])
def test_an_empty_key_is_invalid(value, strict):
    """Row 11: an empty String, and an empty field, are refused."""
    with pytest.raises(KeyInvalidError, match="empty"):
        key(value, strict=strict)


@pytest.mark.parametrize(
    "value", [b"abc", UUID.encode(), b"01ARZ3NDEKTSV4RRFFQ69G5FAV", b"a/b:c=d@e", rb"a\b", b"k;v=1", b"'k'", b"42"]
)
def test_bare_text_is_taken_as_it_is(value):
    """Row 12: visible ASCII without quotes is a key, whatever it would be as a structured field."""
    assert key(value) == value.decode()


def test_bare_and_quoted_text_are_one_key():
    """Row 12: ``abc`` and ``"abc"`` are the same key."""
    assert key(b"abc") == key(b'"abc"') == "abc"


@pytest.mark.parametrize("value", [b"a b", b"a\tb", b"Bearer abc", b"(a b)"])
def test_bare_text_holds_no_white_space(value):
    """Row 12: bare text with white space inside is refused."""
    with pytest.raises(KeyInvalidError):
        key(value)


@pytest.mark.parametrize(
    "values",
    [
        (b'"s3cret',),
        (b"s3cret, s3cret",),
        (b"s3cret s3cret",),
        (b"s3cret", b"s3cret"),
        (b'"s3cret" s3cret',),
        (b'"s3cret";v=%"s3cret%ff"',),
        (b"s3cret" * 100,),
        (b's3cret"',),
        ("s3cret\N{SNOWMAN}".encode(),),
    ],
)
def test_the_message_never_contains_the_key(values):
    """Row 54: nothing of a refused value reaches the message or the chain of causes."""
    with pytest.raises(KeyInvalidError) as caught:
        key(*values)

    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


SYNTAX = st.text('"\\;,=:?@%*() \tab0-9.é\x00\x7f', max_size=40).map(lambda text: text.encode("latin-1"))


@settings(max_examples=1500, deadline=None)
@given(st.one_of(SYNTAX, st.binary(max_size=60), SYNTAX.map(lambda tail: b'"k";' + tail)), st.booleans())
@example(b'"k";v=%"%ff"', False)
def test_any_value_is_a_key_or_refused(value, strict):
    """Rows 1-12: no value makes anything but a key of at most 255 printable characters, or a refusal."""
    try:
        found = key(value, strict=strict)
    except KeyInvalidError:
        return
    assert isinstance(found, str)
    assert 0 < len(found) <= 255
    assert found.isascii()
    assert found.isprintable()


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=80))
def test_every_string_is_read_back(text):
    """Rows 1-3: what a conforming client serialises comes back in both modes."""
    value = b'"' + text.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'

    assert key(value) == key(value, strict=True) == text


HOSTILE = [
    b'"' + b"a" * 1_000_000,
    b'"' + b'\\"' * 500_000,
    b'"k"' + b";a" * 300_000 + b",",
    b'"k";a=' + b"9" * 1_000_000,
    b'"k";a=%"' + b"%c3" * 300_000,
    b'"k";a=:' + b"=" * 1_000_000,
    b'"k";a=' + b"a" * 1_000_000 + b"\x00",
    b"a" * 1_000_000 + b" ",
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_values_are_refused_in_linear_time(value):
    """Row 8: a megabyte that nearly parses costs milliseconds of processor time, not minutes."""
    started = time.process_time()
    with pytest.raises(KeyInvalidError):
        key(value)

    assert time.process_time() - started < 2


def wait(*values: bytes):
    return read_prefer_wait([(b"prefer", value) for value in values])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((b"wait=10",), 10.0),
        ((b"WAIT = 10",), 10.0),
        ((b'wait="10"',), 10.0),
        ((b"wait=0",), 0.0),
        ((b"wait=010",), 10.0),
        ((b"respond-async, wait=5",), 5.0),
        ((b"return=minimal; foo=bar, wait=5; x",), 5.0),
        ((b"return=minimal", b"wait=7"), 7.0),
        ((b"wait=3", b"wait=7"), 3.0),
        ((b"wait=3, wait=7",), 3.0),
        ((b'foo="a, wait=9", wait=4',), 4.0),
        ((b'foo="a\\", wait=9", wait=4',), 4.0),
        ((b",, ,wait=4,",), 4.0),
        ((b"=garbage, (\x00\xff), wait=4",), 4.0),
        ((b'"unclosed, wait=9', b"wait=4"), 4.0),
        ((b"wait=" + b"9" * 5000,), 2147483648.0),
    ],
)
def test_prefer_wait_is_read(values, expected):
    """RFC 7240: wait is found among other preferences and lines; the first one counts."""
    assert wait(*values) == expected


@pytest.mark.parametrize(
    "values",
    [
        (),
        (b"",),
        (b"respond-async",),
        (b"wait",),
        (b"wait=",),
        (b'wait=""',),
        (b"wait=soon",),
        (b"wait=-1",),
        (b"wait=1.5",),
        (b"wait=1 2",),
        (b"wait=soon, wait=5",),
        (b"await=5",),
        (b"wait-5",),
        (b"foo; wait=5",),
        (b'foo="a, wait=5"',),
        (b"wait='5'",),
        ("wait=\u0665".encode(),),
    ],
)
def test_what_does_not_ask_to_wait_is_ignored(values):
    """RFC 7240 section 2: what cannot be understood is ignored, as if it were not there."""
    assert wait(*values) is None


def test_the_prefer_field_name_is_case_insensitive():
    """Other fields are not looked at."""
    assert read_prefer_wait([(b"x-prefer", b"wait=1"), (b"Prefer", b"wait=2")]) == 2.0


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.text('wait=09", ;\\x').map(str.encode), st.binary()), max_size=3))
def test_any_prefer_field_is_seconds_or_ignored(values):
    """No value raises, and no number is negative, infinite or not a number."""
    seconds = wait(*values)

    assert seconds is None or 0 <= seconds <= 2**31


@pytest.mark.parametrize("value", [b'"\\' * 300_000, b"wait=" + b"1" * 500_000 + b"x", b'"",' * 200_000])
def test_hostile_preferences_are_read_in_linear_time(value):
    """A megabyte of almost quoted strings costs milliseconds of processor time, not minutes."""
    started = time.process_time()

    assert wait(value) is None
    assert time.process_time() - started < 2

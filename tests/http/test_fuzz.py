"""Thousands of odd requests: none is answered 5xx, none raises, and none with a key runs unprotected."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idempotency import Operation, Policy
from idempotency._http.fields import values_of
from idempotency._http.key import read_key
from idempotency.errors import KeyInvalidError
from idempotency.stores.memory import MemoryStore
from tests.kit.asgi_calls import Client, Effects, Reply, http_scope, protect


def steady(examples: int) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=quiet)


POLICIES = {
    "/raw": Policy(),
    "/json": Policy(fingerprint="json"),
    "/{rest:path}": Policy(fingerprint="json", max_request=1 << 20),
}
KEY = b"idempotency-key"


def exchange(runner: asyncio.Runner, scope: dict[str, Any], chunks: tuple[bytes, ...], **options: Any) -> None:
    """Make one request twice, and check what must hold for any."""
    runner.run(_twice(scope, chunks, options))


async def _twice(scope: dict[str, Any], chunks: tuple[bytes, ...], options: dict[str, Any]) -> None:
    app = Effects()
    protected = protect(app, MemoryStore(), policies=POLICIES, **options)
    fields = [value for name, value in scope["headers"] if name.lower() == KEY]
    statuses = []
    for _ in range(2):
        reply = Reply()
        async with asyncio.timeout(20):
            await protected({**scope, "state": {}}, Client(*chunks), reply.send)
        assert reply.complete
        statuses.append(reply.status)
    if not fields:
        assert statuses == [201, 201]
        assert app.operations == [None, None]
        return
    # A key that can be read runs once, under its operation; any other is refused, and nothing runs.
    assert statuses in ([201, 201], [400, 400], [413, 413])
    assert [type(operation) for operation in app.operations] == ([Operation] if statuses[0] == 201 else [])
    assert statuses[0] == 400 or _readable(scope, **options)
    assert app.bodies == ([b"".join(chunks)] if statuses[0] == 201 else [])


def _readable(scope: dict[str, Any], strict: bool = False) -> bool:
    try:
        return read_key(values_of(scope["headers"], KEY), strict=strict) is not None
    except KeyInvalidError:
        return False


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as one:
        yield one


def _near_misses() -> st.SearchStrategy[bytes]:
    pieces = [
        b'"',
        b"\\",
        b'\\"',
        b"\\\\",
        b";",
        b"=",
        b",",
        b" ",
        b"\t",
        b"a",
        b"k=1",
        b"?1",
        b":YQ==:",
        b"@1",
        b'%"%c3%bc"',
    ]
    pieces += [b"(", b")", b"\x00", b"\x7f", b"\xff", b"1.5", b"*", b"\r\n", b"%zz", b"abc"]
    return st.lists(st.sampled_from(pieces), max_size=12).map(b"".join)


values = st.one_of(st.binary(max_size=64), _near_misses(), st.binary(max_size=24).map(lambda text: b'"%b"' % text))
key_fields = st.lists(st.tuples(st.sampled_from([KEY, b"Idempotency-Key"]), values), min_size=1, max_size=3)


@steady(800)
@given(fields=key_fields, strict=st.booleans(), repeat=st.sampled_from([1, 1, 1, 300, 20_000]))
def test_any_key_runs_protected_or_is_refused(runner, fields, strict, repeat):
    """Every byte, repeated lines, huge values, and what is nearly a structured field."""
    name, value = fields[0]
    fields[0] = name, value * repeat
    exchange(runner, http_scope(path="/raw", headers=fields), (b"{}",), strict=strict)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_in_a_key(runner, byte):
    """Alone, quoted, first, last and in the middle, strict or not."""
    for form in (b"%c", b'"%c"', b"%cab", b"ab%c", b"a%cb", b'"a%cb"', b'"ab"%c', b'"ab";a=%c'):
        for strict in (True, False):
            exchange(runner, http_scope(path="/raw", key=form % byte), (b"",), strict=strict)


bombs = [
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"9" * 100_000,
    b"1e999999999",
    b"-" * 1000,
    b'"' + b"\\" * 99_999,
    b'"' + b"\\u0000" * 10_000 + b'"',
    b'"\\ud800"',
    b'{"\\udfff":1}',
    b"\xef\xbb\xbf{}",
    b"NaN",
    b"[1,]",
    b'{"a":1,"a":2}',
    b"\xff\xfe[\x00]\x00",
    b"nul",
    b"\x00",
    b"{" + b",".join(b'"%d":%d' % (each, each) for each in range(5000)) + b"}",
    b'{"__class__":"x","number":"1","object":{}}',
    b'"' + b"x" * 200_000,
    b" " * 100_000 + b"1",
]


@pytest.mark.parametrize("bomb", bombs, ids=range(len(bombs)))
@pytest.mark.parametrize("path", ["/raw", "/json"])
def test_bodies_that_hurt_parsers(runner, bomb, path):
    """Deep, long, damaged or ambiguous JSON is compared somehow, and handed on as it is."""
    exchange(runner, http_scope(path=path, key="k", headers=[(b"content-type", b"application/json")]), (bomb,))


json_texts = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())
delimiters = st.sampled_from([b"--b", b"\r\n--b", b"\r\n--b--", b"\r\n", b"--", b"b", b"x", b"\r\n--b\r\n", b""])
bodies = st.one_of(
    st.lists(st.binary(max_size=40), min_size=1, max_size=5),
    st.lists(delimiters, min_size=1, max_size=12),
    json_texts.map(lambda text: [text[:5], text[5:]]),
).map(tuple)
media = st.sampled_from(
    [b"multipart/form-data", b"multipart/", b"MULTIPART/mixed", b"application/json", b"", b"/", b";;"]
)
boundaries = st.one_of(
    st.sampled_from(
        [b"b", b'"b"', b'"b', b'""', b"", b"b" * 70, b"b" * 71, b"b" * 5000, b'"a\\"b"', b"\xff", b"(.*)+", b"--"]
    ),
    st.binary(max_size=8),
)
content_types = st.one_of(
    st.none(),
    st.binary(max_size=30),
    st.tuples(media, boundaries).map(lambda pair: b"%b; boundary=%b" % pair),
    st.tuples(media, boundaries, boundaries).map(lambda three: b"%b;charset=x; BOUNDARY=%b;boundary=%b" % three),
)


@steady(400)
@given(chunks=bodies, content_type=content_types, path=st.sampled_from(["/raw", "/json"]))
def test_any_body_of_any_type(runner, chunks, content_type, path):
    """Cut anywhere, of no or several types, with boundaries that are none."""
    headers = [] if content_type is None else [(b"content-type", content_type)]
    exchange(runner, http_scope(path=path, key="k", headers=headers), chunks)


paths = st.one_of(
    st.text(max_size=20).map(lambda text: "/" + text),
    st.binary(max_size=20).map(lambda raw: "/" + raw.decode("utf-8", "surrogateescape")),
    st.binary(max_size=20).map(lambda raw: "/" + raw.decode("latin-1")),
    st.sampled_from(
        ["", "*", "//", "/" * 3000, "/../../etc", "/raw/", "/RAW", "/json\n", "/\x00", "/{rest}", "http://x/y"]
    ),
)


@steady(250)
@given(
    path=paths,
    query=st.binary(max_size=40),
    root_path=st.one_of(st.just(""), st.just("/raw"), st.text(max_size=5)),
    method=st.sampled_from(["POST", "PATCH"]),
    odd=st.lists(st.tuples(st.binary(max_size=10), st.binary(max_size=20)), max_size=4),
)
def test_any_path_query_and_other_headers(runner, path, query, root_path, method, odd):
    """Undecodable, empty, absolute, or with what patterns are made of."""
    scope = http_scope(path=path, query=query, root_path=root_path, method=method, key="k", headers=odd)
    exchange(runner, scope, (b"{}",))


@steady(200)
@given(
    length=st.one_of(st.binary(max_size=12), st.integers(-5, 10**30).map(lambda number: b"%d" % number)),
    prefer=st.one_of(st.binary(max_size=30), _near_misses(), st.just(b"wait=" + b"9" * 5000)),
    authorization=st.lists(st.binary(max_size=20), max_size=3),
)
def test_any_length_preference_and_credential(runner, length, prefer, authorization):
    """The other fields that are read hold anything, too."""
    headers = [(b"content-length", length), (b"prefer", prefer)]
    headers += [(b"authorization", value) for value in authorization]
    exchange(runner, http_scope(path="/raw", key="k", headers=headers), (b"{}",))


def test_two_thousand_requests_of_every_kind_at_once(runner):
    """One application under a mixed load of good and bad requests answers each, and runs each good key once."""
    dice = random.Random(8)
    app = Effects()
    protected = protect(app, MemoryStore(), policies=POLICIES)
    good = {f"key-{number}" for number in range(200)}

    async def one(key: bytes, body: bytes) -> int:
        reply = Reply()
        await protected(http_scope(path="/json", key=key), Client(body), reply.send)
        return reply.status

    async def load() -> list[int]:
        keys = [key.encode() for key in good for _ in range(5)] + [
            dice.randbytes(dice.randrange(40)) for _ in range(1000)
        ]
        dice.shuffle(keys)
        return await asyncio.gather(
            *(one(key, b'{"a": 1}' if key in _ascii(good) else dice.randbytes(9)) for key in keys)
        )

    statuses = runner.run(load())
    assert len(statuses) == 2000
    assert set(statuses) <= {201, 400, 409, 422}
    assert None not in app.operations
    assert sorted(operation.key for operation in app.operations if operation.key in good) == sorted(good)


def _ascii(keys: set[str]) -> set[bytes]:
    return {key.encode() for key in keys}

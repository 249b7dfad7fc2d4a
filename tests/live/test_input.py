"""Bad input, byte for byte, at a real server."""

from __future__ import annotations

import asyncio
import random
import string

import pytest

from tests.kit.asgi_servers import Live, new_key, over

COUNT = 600
PIECES = [
    *(b'"', b"\\", b";", b",", b"=", b" ", b"\t", b":", b"?1", b"@", b'%"', b"%41", b"a", b"KEY", b'"k"', b'"k";a=1'),
    *(b"\x80", b"\xff", b"\xc3\xa9", b"\xe2\x82\xac", b"\x01", b"\x1f", b"\x7f", b"\x0b", b"null", b"()", b"{}"),
    *(b"a" * 254, b"b" * 256, b"c" * 1500, b"1", b"-1.5", b"*", b"/", b"'", b"\xc2\xa0", b"\xef\xbb\xbf"),
]
BODIES = [b"", b"{}", b"{", b"null", b"\x00", b"\xff\xfe", b'{"a":1e999}', b"[" * 500, b'{"a":1,"a":2}', b"x" * 3000]
TYPES = [
    *(b"application/json", b"text/plain", b"", b";", b"multipart/form-data", b"multipart/form-data; boundary="),
    *(b"multipart/form-data; boundary=\xff", b"\xff/\xff", b"application/json; charset=\xff", b"a" * 1000),
]


def fields(rng: random.Random) -> list[tuple[bytes, bytes]]:
    """Generate the header fields of one request; at least one of them names a key."""
    found = [(b"Idempotency-Key", key(rng)) for _ in range(rng.choice((1, 1, 1, 1, 2)))]
    if rng.random() < 0.5:
        found.append((b"Content-Type", rng.choice(TYPES)))
    if rng.random() < 0.3:
        found.append((b"Authorization", key(rng)))
    if rng.random() < 0.3:
        found.append((b"Prefer", b"wait=" + key(rng)))
    rng.shuffle(found)
    return found


def key(rng: random.Random) -> bytes:
    """Generate the value of a field: nothing in it ends a line."""
    if rng.random() < 0.3:
        alphabet = string.ascii_letters.encode() + string.punctuation.encode() + b" \t\xe9"
        return bytes(rng.choice(alphabet) for _ in range(rng.randrange(40)))
    return b"".join(rng.choice(PIECES) for _ in range(rng.randrange(5)))


async def ask(live: Live, case: str, rng: random.Random) -> tuple[int, bytes]:
    """Send one generated request; return the status and all bytes of the answer."""
    body = rng.choice(BODIES)
    lines = [b"POST /order HTTP/1.1", b"Host: live", b"Connection: close", b"X-Case: " + case.encode()]
    lines += [b"%b: %b" % field for field in fields(rng)]
    framing = b"Content-Length: %d" % len(body)
    if rng.random() < 0.3:
        framing = b"Transfer-Encoding: chunked"
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        body = chunk + b"0\r\n\r\n"
    reader, writer = await live.connect()
    try:
        writer.write(b"\r\n".join([*lines, framing]) + b"\r\n\r\n" + body)
        answer = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
    return int(answer.split(b" ", 2)[1]), answer


@over([("uvicorn-h11", 1, "redis"), ("uvicorn-httptools", 1, "redis")])
@pytest.mark.parametrize("seed", [1, 2])
async def test_generated_input_is_answered_and_never_runs_unprotected(live: Live, seed: int) -> None:
    """Whatever a request with a key looks like: it runs under the key, or is refused as malformed; never a 500."""
    rng = random.Random(seed)
    prefix = new_key()

    statuses = []
    for number in range(COUNT // 2):
        status, answer = await ask(live, f"{prefix}-{number}", rng)
        assert status in (201, 400, 422), answer[:300]
        assert status == 201 or b"problem+json" in answer or b"Invalid HTTP request" in answer, answer[:300]
        statuses.append(status)

    effects = [line for line in live.bench.lines() if line.get("effect", "").startswith(f"{prefix}-")]
    assert all(line["attempt"] == 1 for line in effects)
    assert len({line["effect"] for line in effects}) == len(effects)
    assert len(effects) <= statuses.count(201)
    assert min(statuses.count(201), statuses.count(400)) > COUNT // 20

"""Responses of every shape on real servers: streams, event streams, files, compressed ones, background tasks."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from idempotency._http.capture import PATIENCE
from tests.kit.asgi_servers import EACH, EVERY, Live, headers_of, new_key, over, post, problem, same, until

REDIS = [each for each in EVERY if each[1:] == (1, "redis")]


def expected(count: int, size: int) -> bytes:
    """Make the body of ``/stream``."""
    return b"".join(number.to_bytes(4) * (size // 4) for number in range(count))


@over(REDIS)
@pytest.mark.parametrize("prefix", ["", "/wrapped", "/gzip", "/outside"])
async def test_a_stream_is_complete_and_replayed(live: Live, prefix: str) -> None:
    """A response in pieces arrives whole, without a key and with one, and is replayed if it is small."""
    path, key = f"{prefix}/stream?count=50&size=4000", new_key()

    async with live.client() as client:
        unkeyed = await post(client, path, None)
        first = await post(client, path, key)
        retry = await post(client, path, key)

    assert unkeyed.status_code == 201
    assert first.content == unkeyed.content == expected(50, 4000)
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1


@over(REDIS)
@pytest.mark.parametrize("prefix", ["", "/wrapped", "/gzip"])
async def test_a_large_response_is_complete_and_not_replayed(live: Live, prefix: str) -> None:
    """A response over max_response arrives whole; its retry is told that it is completed and runs nothing."""
    path, key = f"{prefix}/stream?count=50&size=100000", new_key()

    async with live.client() as client:
        unkeyed = await post(client, path, None, accept_encoding="identity")
        first = await client.post(path, content=b"body", headers={**headers_of(key), "accept-encoding": "identity"})
        retry = await post(client, path, key)

    assert first.content == unkeyed.content == expected(50, 100000)
    problem(retry, 409, "completed-not-replayable")
    assert len(live.bench.lines(effect=key)) == 1


@over(REDIS)
@pytest.mark.parametrize("keyed", [True, False], ids=["keyed", "unkeyed"])
async def test_an_event_stream_arrives_as_it_is_sent(live: Live, keyed: bool) -> None:
    """The first event arrives while the stream is open, the last one too, and a retry runs nothing."""
    key = new_key()
    headers = headers_of(key if keyed else None, case=key, gate=key)

    start = time.monotonic()
    async with live.client() as client, client.stream("POST", "/events", content=b"", headers=headers) as response:
        received = b""
        async for chunk in response.aiter_raw():
            received += chunk
            if received == b"data: first\n\n":
                assert time.monotonic() - start < PATIENCE
                live.bench.open_gate(key)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert received == b"data: first\n\ndata: last\n\n"
    if keyed:
        async with live.client() as client:
            problem(await client.post("/events", content=b"", headers=headers), 409, "completed-not-replayable")
        assert len(live.bench.lines(effect=key)) == 1


@over(REDIS)
async def test_a_file_is_complete(live: Live) -> None:
    """A file arrives whole, sent by path where the server offers that, and counts as completed."""
    key = new_key()

    async with live.client() as client:
        unkeyed = await post(client, "/file", None)
        first = await post(client, "/file", key)
        retry = await post(client, "/file", key)
        by_path = (await client.get("/process")).json()["pathsend"]

    assert first.content == unkeyed.content == (live.bench.directory / "file").read_bytes()
    assert by_path == (live.kind == "granian")
    problem(retry, 409, "completed-not-replayable")
    assert len(live.bench.lines(effect=key)) == 1


@over(REDIS)
@pytest.mark.parametrize("prefix", ["", "/wrapped", "/gzip", "/outside"])
async def test_middleware_inside_and_outside(live: Live, prefix: str) -> None:
    """What middleware inside made of a response is replayed byte for byte; compression outside works as well."""
    key = new_key()

    async with live.client() as client:
        first, first_bytes = await raw_post(client, f"{prefix}/document", key)
        retry, retry_bytes = await raw_post(client, f"{prefix}/document", key)

    same(first, retry)
    assert retry_bytes == first_bytes
    assert first.headers.get("content-encoding") == ("gzip" if prefix in ("/gzip", "/outside") else None)
    assert first.headers.get("x-passed") == ("on" if prefix == "/wrapped" else None)
    assert first.json()["text"] == "abc " * 2000
    assert len(live.bench.lines(effect=key)) == 1


@over([("uvicorn-h11", 1, "redis"), ("uvicorn-httptools", 1, "redis")])
@pytest.mark.parametrize("codings", [("gzip", "identity"), ("identity", "gzip")], ids=" then ".join)
async def test_a_client_that_accepts_no_compression_gets_none_replayed(live: Live, codings: tuple[str, str]) -> None:
    """Of one operation a client that accepts gzip gets a gzip body, or a plain one, and any other a plain one."""
    key = new_key()

    async with live.client() as client:
        first, _ = await raw_post(client, "/gzip/document", key, codings[0])
        retry, retry_bytes = await raw_post(client, "/gzip/document", key, codings[1])

    assert first.headers.get("content-encoding") == ("gzip" if codings[0] == "gzip" else None)
    assert "content-encoding" not in retry.headers
    assert (retry.headers["idempotent-replayed"], retry.headers["vary"]) == ("true", "Accept-Encoding")
    assert first.json() == retry.json()
    assert int(retry.headers["content-length"]) == len(retry_bytes) > 8000
    assert len(live.bench.lines(effect=key)) == 1


async def raw_post(
    client: httpx.AsyncClient, path: str, key: str, accept: str = "gzip"
) -> tuple[httpx.Response, bytes]:
    """Send a request and return the response, and its body as it was on the wire."""
    headers = {**headers_of(key), "accept-encoding": accept}
    async with client.stream("POST", path, content=b"", headers=headers) as streamed:
        body = b"".join([chunk async for chunk in streamed.aiter_raw()])
    response: Any = httpx.Response(streamed.status_code, headers=streamed.headers, content=body)
    return response, body


@over(EACH)
async def test_a_background_task_does_not_delay_the_answer(live: Live) -> None:
    """The answer, and the replay to a retry, arrive before the background task ends; it runs once."""
    key = new_key()

    async with live.client() as client:
        first = await post(client, "/background", key, gate=key)
        retry = await post(client, "/background", key, gate=key)
        assert not live.bench.lines(background=key)
        live.bench.open_gate(key)
        await live.bench.noted(background=key)
        same(first, await post(client, "/background", key, gate=key))

    same(first, retry)
    assert len(live.bench.lines(effect=key)) == len(live.bench.lines(background=key)) == 1


@over(EACH)
async def test_a_failing_background_task_undoes_nothing(live: Live) -> None:
    """A background task that raises after the answer leaves the record as it is."""
    key = new_key()

    async with live.client() as client:
        first = await post(client, "/background?raises=1", key)
    await live.bench.noted(background=key)
    await until(lambda: "RuntimeError: background task" in live.log.read_text(), "the error in the server's log")
    # Another connection: a server closes the one whose application raised, perhaps while the next request is sent.
    async with live.client() as client:
        same(first, await post(client, "/background?raises=1", key))

    assert first.status_code == 201
    assert len(live.bench.lines(effect=key)) == len(live.bench.lines(background=key)) == 1

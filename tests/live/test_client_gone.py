"""Clients that vanish while their request runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.asgi_servers import EACH, EVERY, Bench, Live, headers_of, new_key, over, post, problem, same, settled
from tests.kit.targets import Target


async def send_and_vanish(live: Live, path: str, key: str) -> None:
    """Send a request whose handler waits at the gate, and close the connection after the effect."""
    _, writer = await live.connect()
    headers = {"host": "live", "content-length": "4", **headers_of(key, gate=key)}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\nbody")
    await live.bench.effects(key)
    writer.close()
    await writer.wait_closed()


@over([each for each in EVERY if each[1:] == (1, "redis") or each in EACH])
@pytest.mark.parametrize("prefix", ["", "/wrapped"])
async def test_the_handler_finishes_and_the_retry_replays(live: Live, prefix: str) -> None:
    """A client that is gone does not end the handler, also behind @app.middleware("http")."""
    key = new_key()

    await send_and_vanish(live, f"{prefix}/order", key)
    async with live.client() as client:
        problem(await post(client, f"{prefix}/order", key), 409, "in-progress")
        live.bench.open_gate(key)
        await settled(live, key)
        replay = await post(client, f"{prefix}/order", key)
        same(replay, await post(client, f"{prefix}/order", key))

    assert replay.status_code == 201
    assert replay.headers["idempotent-replayed"] == "true"
    assert len(live.bench.lines(effect=key)) == 1


@over(EACH)
@pytest.mark.parametrize("prefix", ["", "/wrapped"])
async def test_a_stream_nobody_reads_has_one_effect(live: Live, prefix: str) -> None:
    """A streamed response whose reader is gone counts as completed: it is replayed if it was all collected."""
    key = new_key()
    path = f"{prefix}/stream?count=3&size=4000"

    await send_and_vanish(live, path, key)
    live.bench.open_gate(key)
    await settled(live, key)
    async with live.client() as client:
        retry = await post(client, path, key)

    if retry.status_code == 201:
        assert retry.headers["idempotent-replayed"] == "true"
        assert len(retry.content) == 12000
    else:
        problem(retry, 409, "completed-not-replayable")
    assert len(live.bench.lines(effect=key)) == 1


@pytest.mark.parametrize(
    ("framework", "server", "path"),
    [
        ("django", "uvicorn-h11", "/slow"),
        ("django", "uvicorn-httptools", "/slow-threaded"),
        ("django", "hypercorn", "/slow"),
        ("django", "granian", "/slow-threaded"),
        ("fastapi", "uvicorn-h11", "/slow"),
        ("quart", "hypercorn", "/slow"),
        ("quart", "uvicorn-h11", "/slow"),
    ],
)
async def test_a_framework_that_hears_of_it_stops_no_handler(
    framework: str, server: str, path: str, redis_url: str, tmp_path: Path
) -> None:
    """Where a framework cancels a handler whose client has left, it does not hear of that before the record."""
    target = Target("redis", redis_url)
    key = new_key()

    with Live(server, 1, Bench(tmp_path, target), "tests.live.apps.frameworks:app", framework=framework) as live:
        await send_and_vanish(live, path, key)
        await live.bench.noted(left=key)
        async with live.client() as client:
            problem(await post(client, path, key, gate=key), 409, "in-progress")
            live.bench.open_gate(key)
            await settled(live, key)
            replay = await post(client, path, key)
            same(replay, await post(client, path, key))
        effects = live.bench.lines(effect=key)

    assert replay.status_code == 201
    assert len(effects) == 1
    assert not live.complaints()
    target.forget()

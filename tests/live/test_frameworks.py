"""Other frameworks than Starlette, each under a real server."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.asgi_servers import Bench, Live, headers_of, new_key, post, problem, same
from tests.kit.targets import Target


async def order(client: httpx.AsyncClient, path: str, key: str, body: Any) -> httpx.Response:
    """Send an order."""
    return await client.post(path, json=body, headers=headers_of(key))


async def twice(client: httpx.AsyncClient, path: str, body: Any) -> tuple[httpx.Response, str]:
    """Send a request twice and assert that the second answer is the first one, replayed."""
    key = new_key()
    first = await order(client, path, key, body)
    same(first, await order(client, path, key, body))
    return first, key


@pytest.fixture
def bench(redis_url: str, tmp_path: Path) -> Any:
    """What the servers of a test share."""
    bench = Bench(tmp_path, Target("redis", redis_url))
    yield bench
    bench.target.forget()


async def test_fastapi(bench: Bench) -> None:
    """Models, errors, validation and threaded handlers of FastAPI are stored and replayed, each run once."""
    with Live("uvicorn-httptools", 1, bench, "tests.live.apps.frameworks:app", framework="fastapi") as live:
        async with live.client() as client:
            placed, placed_key = await twice(client, "/order", {"amount": 3})
            threaded, threaded_key = await twice(client, "/threaded", {"amount": 3})
            missing, missing_key = await twice(client, "/missing", {})
            invalid, _ = await twice(client, "/order", {"amount": "three"})
            other = await order(client, "/order", placed_key, {"amount": 4})

    assert placed.status_code == threaded.status_code == 201
    assert set(placed.json()) == {"amount", "number"}
    assert missing.status_code == 404
    assert invalid.status_code == 422
    assert invalid.headers["content-type"] == "application/json"
    problem(other, 422, "key-reused")
    for key in (placed_key, threaded_key, missing_key):
        assert len(bench.lines(effect=key)) == 1


@pytest.mark.parametrize(("framework", "server"), [("litestar", "uvicorn-h11"), ("quart", "hypercorn")])
async def test_other_frameworks(bench: Bench, framework: str, server: str) -> None:
    """Litestar and Quart applications run each key once, also under concurrent duplicates."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")

    with Live(server, 1, bench, "tests.live.apps.frameworks:app", framework=framework) as live:
        async with live.client() as client:
            placed, placed_key = await twice(client, "/order", {"amount": 3})
            many_key = new_key()
            many = await asyncio.gather(*(order(client, "/order", many_key, {"amount": 3}) for _ in range(20)))

    assert placed.status_code == 201
    assert placed.json()["amount"] == 3
    assert {answer.status_code for answer in many} <= {201, 409}
    assert len({answer.content for answer in many if answer.status_code == 201}) == 1
    assert len(bench.lines(effect=placed_key)) == len(bench.lines(effect=many_key)) == 1


@pytest.mark.parametrize("server", ["uvicorn-h11", "hypercorn"])
async def test_fastapi_dies_before_a_dependency_commits(bench: Bench, server: str) -> None:
    """Killed in its commit behind the response: the client has no success, and the retry has the effect."""
    key = new_key()

    with Live(server, 1, bench, "tests.live.apps.frameworks:app", framework="fastapi") as live:
        async with live.client() as client:
            first = asyncio.create_task(post(client, "/behind", key, gate=key))
            await bench.noted(committing=key)
            assert not first.done()
            live.kill()
            with pytest.raises(httpx.TransportError):
                await first
        live.start()
        bench.open_gate(key)
        async with live.client() as client:
            retry = await post(client, "/behind", key, gate=key)
            same(retry, await post(client, "/behind", key, gate=key))

    assert retry.status_code == 201
    assert "idempotent-replayed" not in retry.headers
    assert len(bench.lines(effect=key)) == 1

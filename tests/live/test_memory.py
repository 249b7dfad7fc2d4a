"""What a large upload and a large response cost in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kit.asgi_servers import Bench, Live, headers_of, new_key
from tests.kit.targets import Target

SIZE = 200 * 1024 * 1024
PIECE = 256 * 1024
ALLOWED = 32 * 1024 * 1024


async def pieces() -> AsyncIterator[bytes]:
    """Make the body of an upload, piece by piece."""
    for number in range(SIZE // PIECE):
        yield number.to_bytes(4) * (PIECE // 4)


async def peak(bench: Bench, path: str, key: str | None) -> int:
    """Measure the peak resident memory of a fresh server that serves one request, in bytes."""
    body = pieces() if path == "/upload" else b"body"
    with Live("uvicorn-httptools", 1, bench) as live:
        async with live.client() as client:
            pid = (await client.get("/process")).json()["pid"]
            async with client.stream("POST", path, content=body, headers=headers_of(key)) as response:
                answer, received = b"", 0
                async for chunk in response.aiter_raw():
                    received += len(chunk)
                    answer = chunk
            high_water = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert response.is_success
    assert received == SIZE if path != "/upload" else answer == b'{"size":%d}' % SIZE
    assert high_water is not None
    return int(high_water[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("path", ["/upload", f"/stream?count={SIZE // PIECE}&size={PIECE}"], ids=["upload", "stream"])
async def test_a_key_costs_little_memory(path: str, redis_url: str, tmp_path: Path) -> None:
    """200 MB up or down with a key peak within 32 MB of the same without one."""
    bench = Bench(tmp_path, Target("redis", redis_url))
    key = new_key()

    unkeyed = await peak(bench, path, None)
    keyed = await peak(bench, path, key)

    bench.target.forget()
    assert keyed - unkeyed < ALLOWED, f"{keyed / 2**20:.0f} MB against {unkeyed / 2**20:.0f} MB"
    assert len(bench.lines(effect=key)) == 1

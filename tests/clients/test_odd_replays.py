"""Odd and hostile answers through Hypercorn, over HTTP/1.1 and HTTP/2: the retry gets the bytes that were lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.clients.odd_answers import ANSWERS
from tests.kit.asgi_servers import Bench, Live, new_key
from tests.kit.servers import LOOPBACK, Proxy
from tests.kit.targets import Target

pytestmark = [pytest.mark.alone, pytest.mark.processes]

BY_THE_SERVER = (b"date", b"server", b"transfer-encoding", b"connection")


@pytest.fixture(scope="module")
def live(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Hypercorn, with records in Redis."""
    target = Target("redis", redis_url)
    bench = Bench(tmp_path_factory.mktemp("odd"), target)
    with Live("hypercorn", 1, bench, "tests.clients.application:app") as live:
        yield live
    target.forget()
    assert not live.complaints()


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_retry_gets_the_bytes_of_an_odd_answer_that_was_lost(answer: str, protocol: str, live: Live) -> None:
    """The answer is lost on its way; the retry has its status, its fields in their order, and its bytes."""
    key = new_key()
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": key}
    status, fields, pieces = ANSWERS[answer]

    with Proxy(live.port) as proxy:
        url = f"http://{LOOPBACK}:{proxy.port}/odd/{answer}"
        client = httpx.AsyncClient(http1=protocol == "HTTP/1.1", http2=protocol == "HTTP/2", trust_env=False)
        async with client:
            proxy.swallow_replies()
            first = asyncio.create_task(client.post(url, content=b"body", headers=headers))
            await live.bench.noted(answered=key)
            proxy.cut()
            with pytest.raises(httpx.TransportError):
                await first
            async with client.stream("POST", url, content=b"body", headers=headers) as retry:
                body = b"".join([chunk async for chunk in retry.aiter_raw()])

    assert retry.http_version == protocol
    assert retry.status_code == status
    received = [field for field in retry.headers.raw if field[0].lower() not in BY_THE_SERVER]
    assert received == [*fields, (b"idempotent-replayed", b"true")]
    assert body == b"".join(pieces)
    assert len(live.bench.lines(effect=key)) == 1

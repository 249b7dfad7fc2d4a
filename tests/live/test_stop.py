"""Servers that are asked to end while the store is away, and a record is still to be written."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest

from idempotency._rules import State
from tests.kit.asgi_servers import PATIENCE, SERVERS, STORE_TIMEOUT, Bench, Live, new_key, post, record_of, until
from tests.kit.servers import LOOPBACK, Proxy, listening
from tests.kit.targets import Target

LEASE = 8.0
"""Long enough for the store to come back in it."""

AT_ONCE = 1.0
"""Seconds in which a server ends that has begun to, where nothing holds it up."""

ENDS = {
    "uvicorn": ("uvicorn-h11", "tests.live.apps.stopping:protected", []),
    "uvicorn-uvloop": ("uvicorn-httptools", "tests.live.apps.stopping:protected", []),
    "uvicorn-lifespan-off": ("uvicorn-h11", "tests.live.apps.stopping:protected", ["--lifespan", "off"]),
    "uvicorn-mounted": ("uvicorn-httptools", "tests.live.apps.stopping:mounted", []),
    "hypercorn": ("hypercorn", "tests.live.apps.stopping:protected", []),
    "hypercorn-mounted": ("hypercorn", "tests.live.apps.stopping:mounted", []),
    "granian": ("granian", "tests.live.apps.stopping:protected", []),
}
"""Servers that tell the middleware when they end, and servers that do not."""


def at_each(*ends: str) -> pytest.MarkDecorator:
    """Run a test with each of these servers on Redis, and with the first one on PostgreSQL: none knows the store."""
    pairs = [*(("redis", end) for end in ends), ("postgres", ends[0])]
    return pytest.mark.parametrize(("bench", "end"), pairs, indirect=["bench"])


class Ending(Live):
    """A server that a test asks to end."""

    def _command(self) -> list[str]:
        module, *options = SERVERS[self.kind]
        address = ["--bind", f"{LOOPBACK}:{self.port}"] if module == "hypercorn" else ["--port", str(self.port)]
        more = self._extra["arguments"]
        return [sys.executable, "-m", module, *options, *more, *address, "--workers", "1", self._application]

    async def asked_to_end(self) -> None:
        """Send SIGTERM, and wait until the server has begun to end, and would have ended with nothing to wait for."""
        before = len(self.bench.lines(stopping=True))
        self._process.send_signal(signal.SIGTERM)

        def begun() -> bool:
            return self.ended() or not listening(self.port) or len(self.bench.lines(stopping=True)) > before

        await until(begun, "the end to begin")
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, AT_ONCE)

    def ended(self) -> bool:
        return self._process.poll() is not None


@pytest.fixture(scope="module", params=["redis", "postgres"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    target = Target(request.param, request.getfixturevalue(f"{request.param}_url"))
    asyncio.run(target.create())
    yield Bench(tmp_path_factory.mktemp("stop"), target, {"timeout": STORE_TIMEOUT})
    target.forget()


@contextmanager
def serving(bench: Bench, end: str, lease: float = LEASE) -> Iterator[tuple[Proxy, Ending]]:
    """Run a server whose store is behind a proxy."""
    kind, application, arguments = ENDS[end]
    with (
        bench.proxied() as (proxy, proxied),
        Ending(kind, 1, proxied, application, arguments=arguments, lease=lease) as server,
    ):
        yield proxy, server


@asynccontextmanager
async def unrecorded(server: Ending, proxy: Proxy, path: str, key: str) -> AsyncIterator[int]:
    """Have a request answered while the store does not answer; gives the status."""
    async with server.client() as client:
        running = asyncio.create_task(post(client, path, key, gate=key))
        await server.bench.effects(key)
        proxy.pause()
        server.bench.open_gate(key)
        yield (await running).status_code


def come_back(proxy: Proxy) -> None:
    """Have the store answer again; what was sent to it meanwhile is lost."""
    proxy.cut()
    proxy.resume()


async def state_of(bench: Bench, record: bytes) -> State | None:
    async with bench.target.opened() as store:
        entry = await store.inspect(record)
    return None if entry is None else State(entry.state)


async def stopped_while_away(bench: Bench, end: str, path: str) -> tuple[int, State | None]:
    """Ask a server to end while the store is away, and have the store come back; gives the answer and the record."""
    key = new_key()
    with serving(bench, end) as (proxy, server):
        async with unrecorded(server, proxy, path, key) as status:
            pass
        await server.asked_to_end()
        come_back(proxy)
        await until(server.ended, "the end of the server")
        assert not server.complaints()
    assert len(bench.lines(effect=key)) == 1
    return status, await state_of(bench, record_of(key))


@at_each(*ENDS)
async def test_a_stop_waits_for_a_record_that_is_repeated(bench: Bench, end: str) -> None:
    """A server that is asked to end while the store is away ends when the answer it gave is recorded."""
    assert await stopped_while_away(bench, end, "/order") == (201, State.DONE)


@at_each("uvicorn", "uvicorn-lifespan-off", "hypercorn")
async def test_a_stop_waits_for_a_key_to_be_held(bench: Bench, end: str) -> None:
    """What is to be unknown is no less written than what is stored."""
    assert await stopped_while_away(bench, end, "/held") == (500, State.UNKNOWN)


async def test_a_stop_waits_for_the_record_of_a_function(bench: Bench) -> None:
    """The middleware also waits for what functions have to record that are called in its application."""
    key = new_key()
    with serving(bench, "uvicorn") as (proxy, server):
        async with unrecorded(server, proxy, "/called", key) as status:
            assert status == 201
        await server.asked_to_end()
        come_back(proxy)
        await until(server.ended, "the end of the server")
        lines = server.bench.lines(event="stored")

    assert [line["operation"] for line in lines][-1].endswith("charge")


@at_each(*ENDS)
async def test_a_stop_does_not_wait_longer_than_a_lease(bench: Bench, end: str) -> None:
    """While the store stays away, the server ends when the lease is over."""
    key = new_key()
    with serving(bench, end, lease=1.0) as (proxy, server):
        async with unrecorded(server, proxy, "/order", key):
            began = time.monotonic()
        await server.asked_to_end()
        await until(server.ended, "the end of the server")
        assert time.monotonic() - began < 1.0 + 3 * STORE_TIMEOUT + AT_ONCE + 5


async def test_a_server_that_has_nothing_to_record_ends_at_once(bench: Bench) -> None:
    """A stop costs nothing where every record is written."""
    key = new_key()
    with serving(bench, "uvicorn", lease=PATIENCE) as (_, server):
        async with server.client() as client:
            server.bench.open_gate(key)
            assert (await post(client, "/order", key)).status_code == 201
        began = time.monotonic()
        await server.asked_to_end()
        await until(server.ended, "the end of the server")
        assert time.monotonic() - began < PATIENCE / 2

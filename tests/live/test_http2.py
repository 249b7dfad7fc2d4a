"""Requests that share a connection, over HTTP/2."""

from __future__ import annotations

import asyncio
from pathlib import Path

from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded

from tests.kit.asgi_servers import PATIENCE, Bench, Live, headers_of, new_key
from tests.kit.targets import Target


class Connection:
    """One connection with prior knowledge of HTTP/2, and the requests on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._wire = H2Connection()
        self._wire.initiate_connection()
        self.statuses: dict[int, int] = {}
        self.bodies: dict[int, bytes] = {}
        self._ended: set[int] = set()

    def post(self, path: str, headers: dict[str, str]) -> int:
        """Send a request and return the number of its stream."""
        stream = self._wire.get_next_available_stream_id()
        pseudo = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "live")]
        self._wire.send_headers(stream, [*pseudo, *headers.items()])
        self._wire.send_data(stream, b"body", end_stream=True)
        self._writer.write(self._wire.data_to_send())
        return stream

    async def answer(self, stream: int) -> tuple[int, bytes]:
        """Wait for the answer to a request."""
        async with asyncio.timeout(PATIENCE):
            while stream not in self._ended:
                for event in self._wire.receive_data(await self._reader.read(65536)):
                    if isinstance(event, ResponseReceived):
                        self.statuses[event.stream_id] = int(dict(event.headers)[b":status"])
                    elif isinstance(event, DataReceived):
                        self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
                    elif isinstance(event, StreamEnded):
                        self._ended.add(event.stream_id)
                self._writer.write(self._wire.data_to_send())
        return self.statuses[stream], self.bodies[stream]


async def test_requests_on_one_connection_and_one_state_are_each_protected(redis_url: str, tmp_path: Path) -> None:
    """A duplicate beside its first is told that it runs, another key runs, and each has its own answer."""
    target = Target("redis", redis_url)
    first_key, other_key = new_key(), new_key()

    with Live("hypercorn", 1, Bench(tmp_path, target), "tests.live.apps.frameworks:app", framework="shared") as live:
        reader, writer = await live.connect()
        connection = Connection(reader, writer)
        first = connection.post("/order", headers_of(first_key, gate=first_key))
        await live.bench.effects(first_key)
        duplicate = await connection.answer(connection.post("/order", headers_of(first_key, gate=first_key)))
        other = await connection.answer(connection.post("/order", headers_of(other_key)))
        live.bench.open_gate(first_key)
        answer = await connection.answer(first)
        replay = await connection.answer(connection.post("/order", headers_of(first_key)))
        writer.close()
        effects = [live.bench.lines(effect=key) for key in (first_key, other_key)]

    assert duplicate[0] == 409
    assert other[0] == answer[0] == 201
    assert other != answer == replay
    assert [len(each) for each in effects] == [1, 1]
    target.forget()

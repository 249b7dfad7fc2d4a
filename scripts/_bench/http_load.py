"""Send requests over connections that stay open: for each line of JSON on standard input one burst, and one answer.

Of the kind "prepare" it sends once what requests of the kind "replay" repeat.
"""

from __future__ import annotations

import gc
import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count, cycle, repeat
from selectors import EVENT_READ, DefaultSelector
from statistics import quantiles
from time import perf_counter, process_time
from typing import Any

from exchange import ANSWER, BODY, Exchange
from http_child import LOAD_CORE, pin, say

_DONE = range(10**11, 10**11 + 512)
"""The keys of replays: more than connections, so that two requests at a time rarely have the same."""

_KEY = "00000000-0000-4000-8000-{}"
_ENOUGH = 2
"""Answers on each connection: with fewer, a burst shows how its first requests queue, and not a rate."""

_PATIENCE = 30.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STATUS = b"HTTP/1.1 201 "
_REPLAYED = b"\r\nidempotent-replayed: true"


def _request(key: str | None) -> bytes:
    headers = (b"%b: %b" % each for each in Exchange("POST", key).scope["headers"])
    return b"\r\n".join((b"POST /orders HTTP/1.1", *headers, b"", BODY))


def _new_requests() -> Iterator[bytes]:
    start, end = _request(_KEY).split(b"{}")
    return (b"%b%012d%b" % (start, number, end) for number in count())


_PREPARED = [_request(_KEY.format(f"{number:012d}")) for number in _DONE]
_REQUESTS = {"no key": repeat(_request(None)), "first": _new_requests(), "replay": cycle(_PREPARED)}


class _Connection:
    __slots__ = ("_received", "sent", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), _PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self.sent = 0.0

    def send(self, request: bytes) -> None:
        self.sent = perf_counter()
        self.socket.sendall(request)

    def receive(self) -> tuple[bytes, bytes] | None:
        """Return head and body of the answer, or None while a part of it is missing."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed a connection")
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return None
        length = _LENGTH.search(head)
        if length is None:
            raise ValueError(f"an answer has no content-length: {head!r}")
        if len(body) < int(length[1]):
            return None
        self._received = b""
        return head, body


class _Burst:
    """What has come back: how many answers in how many seconds, the latencies, and an answer that is wrong."""

    def __init__(self, seconds: float, enough: int) -> None:
        self._started = perf_counter()
        self._seconds = seconds
        self._enough = enough
        self._ended = False
        self.rate = 0.0
        self.latencies: list[float] = []
        self.wrong = 0
        self.sample = ""

    def goes_on(self, sent: float, answered: float) -> bool:
        """Note an answer; return whether another request follows it."""
        self.latencies.append(answered - sent)
        if not self._ended:
            took = answered - self._started
            self.rate = len(self.latencies) / took
            self._ended = took >= self._seconds and len(self.latencies) >= self._enough
        return not self._ended

    def check(self, answer: tuple[bytes, bytes], replayed: bool) -> None:
        """Compare head and body of an answer to what the application sends."""
        head, body = answer
        if not head.startswith(_STATUS) or (_REPLAYED in head.lower()) is not replayed or body != ANSWER:
            self.wrong += 1
            self.sample = f"{head!r} {body!r}"


def _drive(
    connections: list[_Connection], requests: Iterator[bytes], replayed: bool, seconds: float, enough: int = 0
) -> _Burst:
    """Send the next request wherever an answer has come, until the burst has ended or there are no more requests."""
    burst = _Burst(seconds, enough)
    with DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection.socket, EVENT_READ, connection)
            connection.send(next(requests))
        waiting = len(connections)
        while waiting:
            ready = selector.select(_PATIENCE)
            if not ready:
                raise TimeoutError(f"no answer came within {_PATIENCE:.0f} s")
            for event, _ in ready:
                connection = event.data
                answer: tuple[bytes, bytes] | None = connection.receive()
                if answer is None:
                    continue
                goes_on = burst.goes_on(connection.sent, perf_counter())
                burst.check(answer, replayed)
                request = next(requests, None) if goes_on else None
                if request is None:
                    waiting -= 1
                else:
                    connection.send(request)
    return burst


def _answer(port: int, kind: str, connections: int, seconds: float) -> dict[str, Any]:
    """Send one burst, after one request on each connection, for which a server opens what it needs."""
    with ExitStack() as stack:
        opened = [_Connection(port) for _ in range(connections)]
        for connection in opened:
            stack.enter_context(connection.socket)
        requests, replayed = iter(_PREPARED) if kind == "prepare" else _REQUESTS[kind], kind == "replay"
        before = _drive(opened, requests, replayed, 0.0)
        used, started = process_time(), perf_counter()
        burst = _drive(opened, requests, replayed, seconds, _ENOUGH * connections)
        busy = (process_time() - used) / (perf_counter() - started)
    percentiles = quantiles(burst.latencies, n=100, method="inclusive")
    return {
        "answers": len(before.latencies) + len(burst.latencies),
        "rate": burst.rate,
        "p50": percentiles[49] * 1000,
        "p99": percentiles[98] * 1000,
        "busy": busy,
        "wrong": before.wrong + burst.wrong,
        "sample": burst.sample or before.sample,
    }


def main() -> int:
    """Answer until standard input is closed."""
    pin(LOAD_CORE)
    gc.disable()
    for line in sys.stdin:
        try:
            say(_answer(**json.loads(line)))
        except (OSError, ValueError) as error:
            say({"error": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The clients: each sends its operations, and sends each again until it has a final answer."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from _soak.plan import LEASE, Operation

AGAIN_AFTER = 0.15
AT_ONCE = 8
RETRYABLE = frozenset(
    {"in-progress", "store-unavailable", "retry: in-progress", "retry: unavailable", "own", "no answer"}
)
"""Answers that are not final; ``own`` is the error that the handler raised on purpose."""


@dataclass(frozen=True)
class Answer:
    """One answer to a client. ``run``: which run of the handler a success is the result of."""

    asked: float
    at: float
    worker: int
    status: int
    code: str
    run: str = ""
    words: str = ""

    @property
    def final(self) -> bool:
        return self.code not in RETRYABLE


def allowance(operation: Operation) -> float:
    """Return how many seconds after two leases an answer may come: two runs of the handler, and one request."""
    return 2 * operation.seconds + 1.0


@dataclass
class Book:
    """The operations of the clients, and their answers."""

    operations: dict[str, Operation] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)


async def ask(port: int, path: str, body: dict[str, Any], patience: float) -> tuple[int, dict[str, Any]]:
    """Post one request over a new connection; the status is 0 where there is no complete answer in time."""
    payload = json.dumps(body).encode()
    head = f"POST /{path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-type: application/json\r\n"
    key = f"idempotency-key: {body['key']}\r\n" if "key" in body else ""
    writer = None
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{head}{key}content-length: {len(payload)}\r\n\r\n".encode() + payload)
            raw = await reader.read()
        first, _, rest = raw.partition(b"\r\n\r\n")
        return int(first.split()[1]), json.loads(rest)
    except (OSError, TimeoutError, IndexError, ValueError):
        return 0, {}
    finally:
        if writer is not None:
            writer.transport.abort()


class Clients:
    """All clients of a run on one store."""

    def __init__(self, ports: list[int], seed: int) -> None:
        self.book = Book()
        self.open = True
        self.deadline = math.inf
        self._ports = ports
        self._draw = Random(seed)

    async def run(self, operations: Iterator[Operation]) -> None:
        """Send one operation after another until the run is closed."""
        for operation in operations:
            if not self.open:
                return
            self.book.operations[operation.key] = operation
            self.book.answers[operation.key] = []
            leaving = [operation.leaves, *[None] * (operation.clients - 1)]
            await asyncio.gather(*(self.settle(operation, leaves) for leaves in leaving))

    async def settle(self, operation: Operation, leaves: float | None = None, within: float = math.inf) -> None:
        """Send an operation until its answer is final, or until the time of the run or ``within`` seconds are over."""
        patience, begin = operation.patience if leaves is None else leaves, time.monotonic()
        while time.monotonic() < min(begin + within, self.deadline) + allowance(operation):
            answer = await self._ask(operation, patience)
            self.book.answers[operation.key].append(answer)
            if answer.final:
                return
            patience = operation.patience
            await asyncio.sleep(AGAIN_AFTER)

    async def settle_again(self) -> None:
        """Send everything once more, a few at a time: each must be answered as before."""
        waiting = list(self.book.operations.values())

        async def one_after_another() -> None:
            while waiting:
                await self.settle(waiting.pop(), within=2 * LEASE)

        await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))

    async def _ask(self, operation: Operation, patience: float) -> Answer:
        worker = self._draw.randrange(len(self._ports))
        body = {name: getattr(operation, name) for name in ("key", "shape", "fails", "seconds")}
        asked = time.monotonic()
        status, answer = await ask(self._ports[worker], operation.mode, body, patience)
        run = str(answer.get("run", ""))
        code = str(answer.get("code") or ("ok" if run or status == 200 else "no answer" if not status else "none"))
        return Answer(asked, time.monotonic(), worker, status, code, run, str(answer.get("error", ""))[:150])

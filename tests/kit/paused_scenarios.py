"""Operations that tell what they saw: an owner that is stopped for longer than its lease, and its duplicates."""

from __future__ import annotations

import json
from typing import Any

import scenarios

from idempotency import IdempotencyMiddleware, Operation, Policy
from idempotency.events import Event
from idempotency.testing import crash_point


class _Seen:
    """Every delivery writes a line into the file ``seen``: its attempt, its events, its signal and its answer."""

    seen: str
    store: Any
    sessions: Any = None

    def watch(self, seen: str) -> None:
        self.seen = seen
        self.events: list[str] = []
        self.operation: Operation | None = None
        self.app = IdempotencyMiddleware(
            self.handle,
            store=self.store,
            session=self.sessions,
            policy=Policy(lease=scenarios.LEASE, ttl=scenarios.TTL),
            on_event=self.note,
        )

    def note(self, event: Event, /) -> None:
        self.events.append(event.kind)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        self.operation = operation = scope["state"]["idempotency"]
        await self.act(operation)
        crash_point("effect")
        body = f"attempt {operation.attempt}".encode()
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def deliver(self, key: str) -> None:
        self.events.clear()
        self.operation = None
        answer = await scenarios.post(self.app, key)
        line = {
            "key": key,
            "attempt": 0 if self.operation is None else self.operation.attempt,
            "lost": self.operation is not None and bool(self.operation.lost),
            "events": [kind for kind in self.events if kind != "lease-lost"],
            "answer": answer.decode(),
        }
        with open(self.seen, "a") as lines:
            lines.write(json.dumps(line) + "\n")

    async def act(self, operation: Operation) -> None:
        raise NotImplementedError


class Transactional(_Seen, scenarios.OnSQL):
    def __init__(self, url: str, seen: str) -> None:
        scenarios.OnSQL.__init__(self, url)
        self.watch(seen)

    async def act(self, operation: Operation) -> None:
        await self.add(operation.session, operation.key)


class LeasedSQL(_Seen, scenarios.OnSQL):
    def __init__(self, url: str, seen: str) -> None:
        scenarios.OnSQL.__init__(self, url)
        self.sessions, self.own = None, self.sessions
        self.watch(seen)

    async def act(self, operation: Operation) -> None:
        async with self.own.begin() as session:
            await self.add(session, operation.key)


class LeasedRedis(_Seen, scenarios.LeasedRedis):
    def __init__(self, url: str, seen: str) -> None:
        scenarios.LeasedRedis.__init__(self, url)
        self.watch(seen)

    async def act(self, operation: Operation) -> None:
        await self.effect(operation.key)

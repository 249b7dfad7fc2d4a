"""The page as a user's type checker sees it: checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import assert_type

from starlette.requests import Request

from idempotency import open_store
from idempotency.outbox import OutboxOperations
from idempotency.stores.base import Action, Auditing
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore
from idempotency.web import Console, Operator, console

memory, redis = MemoryStore(), RedisStore.from_url("redis://localhost")
sql = SQLStore.from_url("postgresql+asyncpg://localhost/shop")
audits: list[Auditing] = [memory, redis, sql]


async def operator(request: Request) -> Operator | None:
    return Operator(name="ada", read_only=request.method == "GET")


def named(request: Request) -> str | None:
    return request.headers.get("x-user")


assert_type(console(memory, allow=operator), Console)
console(open_store("memory://"), allow=named, outbox=OutboxOperations("sqlite://"), refusal=401, show_keys=True)


async def look(audit: Auditing) -> None:
    assert_type(await audit.actions(5), list[Action])

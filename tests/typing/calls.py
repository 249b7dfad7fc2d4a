"""Decorated functions and consumers as a user's type checker sees them: checked by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, assert_type

from fastapi import FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import HTTPConnection

from idempotency import IdempotencyMiddleware, Policy, current, idempotent, idempotent_consumer, open_store, wsgi
from idempotency.adapters.fastapi import session_of
from idempotency.consumer import DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import InProgressError
from idempotency.stores.sql import SQLStore

store = open_store("memory://")
engine = create_engine("postgresql+psycopg://localhost/shop")
async_engine = create_async_engine("postgresql+asyncpg://localhost/shop")


class Latin:
    def encode(self, value: Any, /) -> bytes:
        return str(value).encode("latin-1")

    def decode(self, data: bytes, /) -> str:
        return data.decode("latin-1")


@idempotent(store, key=lambda order_id, amount: f"charge:{order_id}", policy=Policy(wait=5))
def charge(order_id: int, amount: int) -> dict[str, int]:
    return {"order": order_id, "amount": amount}


@idempotent(store, key=lambda name: name, name="greetings", codec=Latin(), fingerprint=lambda name: name)
async def greet(name: str) -> str:
    return f"hello {name}"


@idempotent(SQLStore(engine), key=lambda order_id: f"ship:{order_id}", session=sessionmaker(engine))
def ship(order_id: int) -> None:
    operation = current()
    if operation is not None:
        session: Session = operation.session
        session.flush()


@idempotent_consumer(
    SQLStore(async_engine),
    consumer="billing",
    key=lambda message: message["id"],
    session=async_sessionmaker(async_engine),
    policy=Policy(ttl=timedelta(days=30)),
    max_attempts=5,
    attempt=lambda message: message["attempt"],
)
async def on_order(message: dict[str, Any], session: AsyncSession | None = None) -> int:
    return 1


@idempotent_consumer(store, consumer="mail", key=str, on_refused="stop")
def on_mail(message: str) -> None: ...


assert_type(charge(1, amount=5), dict[str, int])
as_callable: Callable[[int, int], dict[str, int]] = charge
as_coroutine: Callable[[str], Coroutine[Any, Any, str]] = greet


def settle(outcome: Delivered) -> str:
    match outcome:
        case Done(result) | Replayed(result):
            return f"ack {result}"
        case Retry(after):
            return f"later, in {after} s"
        case Failed(error):
            return f"nack {error}"
        case DeadLetter(reason, error):
            return f"dead {reason} {error}"


async def consume() -> None:
    try:
        assert_type(await greet("you"), str)
        assert_type(await on_order({"id": "1"}), int)
    except InProgressError as error:
        assert_type(error.retry_after, float)
    settle(await on_order.deliver({"id": "1"}, attempt=2))
    assert_type(await on_order.forget("1"), bool)
    settle(on_mail.deliver("1"))
    assert_type(on_mail.forget("1"), bool)
    on_mail("1")


assert_type(wsgi.session_of(sessionmaker(engine)), Callable[[], AbstractContextManager[Session]])
assert_type(session_of(sessionmaker(engine)), Callable[[HTTPConnection], AsyncIterator[Session]])
assert_type(session_of(async_sessionmaker(async_engine)), Callable[[HTTPConnection], AsyncIterator[AsyncSession]])
IdempotencyMiddleware(FastAPI(), store=SQLStore(engine), session=sessionmaker(engine))

"""One process of a proof of contracts: it does all the work that others do too, and prints what it was answered.

It runs with the library of an earlier commit as with this one, and uses what both have. An effect is a line that is
appended to the ledger.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx

from idempotency import IdempotencyMiddleware, Policy, idempotent, idempotent_consumer, open_store
from idempotency.errors import RecordedFailureError

WAITS = Policy(wait=30, lease=30, outcomes={ValueError: "store"})
CONCURRENCY = 8


@dataclass(frozen=True)
class Receipt:
    """A result of several types."""

    number: int
    price: Decimal
    at: datetime
    paid: int | str | None
    lines: list[tuple[str, bytes]]


class Work:
    """What a process does on one store, and the ledger of effects."""

    def __init__(self, store: Any, ledger: str) -> None:
        self.store = store
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.function = idempotent(store, key=lambda number: f"f{number}", name="charge", policy=WAITS)(self._charge)
        self.failure = idempotent(store, key=lambda number: f"r{number}", name="refuse", policy=WAITS)(self._refuse)
        consumer: Any = idempotent_consumer(
            store, consumer="billing", key=lambda message: message["id"], fingerprint=None, policy=WAITS
        )
        self.consumer = consumer(self._bill)
        app = IdempotencyMiddleware(self._app, store=store, policy=WAITS)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")

    async def effect(self, name: str, number: int) -> None:
        os.write(self._ledger, f"{name} {number}\n".encode())
        await asyncio.sleep(0.002)

    async def _charge(self, number: int) -> Receipt:
        await self.effect("function", number)
        at = datetime(2026, 1, 1, 12, number % 60, tzinfo=UTC)
        return Receipt(number, Decimal(f"{number}.10"), at, [number, str(number), None][number % 3], [("a", b"\0\xff")])

    async def _refuse(self, number: int) -> None:
        await self.effect("failure", number)
        raise ValueError(f"no {number}")

    async def _bill(self, message: Any) -> int:
        await self.effect("consumer", message["number"])
        return int(message["number"])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        await self.effect("response", int(body))
        headers = [(b"content-type", b"text/plain"), (b"x-number", body)]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": b"order " + body})

    async def answer_function(self, number: int) -> Any:
        return {key: str(value) for key, value in asdict(await self.function(number)).items()}

    async def answer_failure(self, number: int) -> Any:
        try:
            return await self.failure(number)
        except ValueError:
            return "ValueError"
        except RecordedFailureError as error:
            return error.type

    async def answer_consumer(self, number: int) -> Any:
        return await self.consumer({"id": f"m{number}", "number": number})

    async def answer_response(self, number: int) -> Any:
        headers = {"idempotency-key": f"k{number}"}
        answer = await self._client.post("/orders", content=str(number), headers=headers)
        return [answer.status_code, answer.text, answer.headers["x-number"]]

    def kinds(self) -> dict[str, Callable[[int], Awaitable[Any]]]:
        """Return what is done, by the name of its effect."""
        return {
            "function": self.answer_function,
            "failure": self.answer_failure,
            "consumer": self.answer_consumer,
            "response": self.answer_response,
        }


def with_sagas(work: Work) -> dict[str, Callable[[int], Awaitable[Any]]]:
    """Return a saga as one more kind; it is another process's turn where it is pending."""
    from idempotency.saga import SagaPendingError, saga, step

    async def book(number: int) -> str:
        await work.effect("saga", number)
        return f"seat {number}"

    async def pay(number: int, seat: str) -> Decimal:
        await work.effect("pay", number)
        return Decimal(f"{number}.50")

    async def trip(number: int, to: str = "Rome") -> Receipt:
        seat = await step("book", book, number)
        price = await step("pay", pay, number, seat)
        return Receipt(number, price, datetime(2026, 1, 1, tzinfo=UTC), seat, [])

    declared = saga(work.store, name="trip")(trip)

    async def answer(number: int) -> Any:
        while True:
            try:
                found: Receipt = await declared(number, key=f"s{number}")
            except SagaPendingError:
                await asyncio.sleep(0.02)
            else:
                return {key: str(value) for key, value in asdict(found).items()}

    return {"saga": answer}


def with_tools(work: Work) -> dict[str, Callable[[int], Awaitable[Any]]]:
    """Return a tool as one more kind: its calls are one by their intent."""
    from idempotency.tool import idempotent_tool

    async def refund(number: int, lines: Any) -> str:
        await work.effect("tool", number)
        return f"refunded {number}"

    tool = idempotent_tool(work.store, name="refund", intent=("number",), policy=WAITS)(refund)

    async def answer(number: int) -> Any:
        return await tool(number, lines={"price": 1.5, "names": ["ä", None, number]})

    return {"tool": answer}


async def main(url: str, options: dict[str, Any], ledger: str, count: int, sagas: bool, key: str) -> None:
    """Do everything once, in an order of its own, and print the answers by kind and number."""
    if key:
        from idempotency.stores.encryption import Encryption

        options["encryption"] = Encryption(key)
    store = open_store(url, **options)
    work = Work(store, ledger)
    kinds = work.kinds() | (with_sagas(work) | with_tools(work) if sagas else {})
    todo = [(kind, number) for kind in kinds for number in range(count)]
    random.Random(os.getpid()).shuffle(todo)
    free = asyncio.Semaphore(CONCURRENCY)
    answers: dict[str, Any] = {}

    async def do(kind: str, number: int) -> None:
        async with free:
            try:
                answers[f"{kind} {number}"] = await kinds[kind](number)
            except Exception as error:
                answers[f"{kind} {number}"] = f"error: {type(error).__name__}: {error}"

    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(do(kind, number) for kind, number in todo))
    await store.aclose()
    print(json.dumps(answers))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    asyncio.run(main(**given))

"""The play: customers and an agent order while each process is killed and started again; then the books are read."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import httpx
from shop import inventory, marketing, orders
from shop.customer import client_of, order

from _shop import books
from _shop.brokers import Nats, RabbitMQ
from _shop.processes import Process
from idempotency.outbox import OutboxOperations
from idempotency.saga import SagaOperations

SETTLE = 120.0
"""Seconds after which it is reported what has not settled."""
UNCHANGED = 5.0
"""Seconds without a message or a saga on its way, after which the books stay as they are."""
WISHES = (("tea", None), ("tea", "SPRING"), ("cake", None), ("tea", "WINTER"), ("cake", "SPRING"), ("milk", None))
"""What customers order, with which coupon. Nobody has milk, and there is no coupon WINTER."""
OCCASIONS = ("a birthday", "a wedding", "a jubilee", "a new year", "a farewell")
SERVICES = (orders.service, inventory.service, marketing.service)


@dataclass
class Play:
    """The shop while it runs. ``stock``, ``coupons``: what there is at first. ``pause``: seconds between two kills."""

    processes: list[Process]
    agent: Process
    broker: Nats | RabbitMQ
    stock: dict[str, int]
    coupons: dict[str, int]
    customers: int
    pause: float
    wanted: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Run the shop until everything is ordered, killed, started again and settled; then stop it."""
        self.wanted += [("agent", f"tea for {occasion}") for occasion in OCCASIONS]
        await self.broker.repeat()
        try:
            for process in self.processes:
                process.start()
            async with client_of("customer-0") as client:
                if not await self._order(client, "customer-0", 0):
                    return
            self._say("the shop is open")
            self.agent.start()
            await asyncio.gather(self._kill_each(), *(self._buy(number) for number in range(1, self.customers + 1)))
            self._say(f"{len(self.wanted)} orders are placed, and those of customers decided")
            await self._agent_ends()
            await self._settle()
            self._say("nothing is on its way any more")
        finally:
            await self._stop()

    async def _buy(self, number: int) -> None:
        """Order every wish at once, again and again, until each process was killed."""
        name = f"customer-{number}"
        async with client_of(name) as client:
            for first in count(0, len(WISHES)):
                wishes = range(first, first + len(WISHES))
                decided = await asyncio.gather(*(self._order(client, name, wish) for wish in wishes))
                if self.killed.is_set() or not all(decided):
                    return

    async def _order(self, client: httpx.AsyncClient, name: str, wish: int) -> bool:
        """Place an order and wait until it is decided; return False where that takes too long."""
        item, coupon = WISHES[wish % len(WISHES)]
        self.wanted.append((name, f"order {wish}"))
        try:
            async with asyncio.timeout(SETTLE):
                await order(client, f"order {wish}", item, coupon)
        except (AssertionError, TimeoutError, httpx.HTTPError) as error:
            self.problems.append(f"{name}, order {wish}: {error!r}")
            return isinstance(error, AssertionError)
        return True

    async def _kill_each(self) -> None:
        for process in (self.agent, *self.processes):
            await asyncio.sleep(self.pause)
            self._check(process)
            process.kill()
            process.start()
            self._say(f"kill -9 and start again: {process.name}")
        self.killed.set()

    def _say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:5.1f} s  {what}", flush=True)

    def _check(self, process: Process) -> None:
        if process.status is not None and (process is not self.agent or process.status):
            self.problems.append(f"{process.name} ended by itself: {process.last_line}")

    async def _agent_ends(self) -> None:
        deadline = time.monotonic() + SETTLE
        while self.agent.status is None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        said = [line for line in self.agent.said.splitlines() if line.startswith(OCCASIONS)]
        # It was killed and began anew: it says some occasions twice, with the same order.
        if self.agent.status != 0 or len(set(said)) != len(OCCASIONS):
            self.problems.append(f"the agent has not ended, or has two orders for one occasion: {self.agent.last_line}")

    async def _settle(self) -> None:
        """Wait until nothing is on its way, and the books agree or stay as they are."""
        deadline, since = time.monotonic() + SETTLE, time.monotonic()
        while time.monotonic() < deadline:
            if moving := await self._moving():
                since = time.monotonic()
            quiet = time.monotonic() - since
            if quiet > UNCHANGED or (quiet > 1 and not self.disagreements(await books.read())):
                return
            await asyncio.sleep(0.25)
        self.problems.append(f"after {SETTLE:.0f} s there are still {', '.join(moving)}")

    async def _moving(self) -> list[str]:
        stats = [await OutboxOperations(service.engine, service.outbox).stats() for service in SERVICES]
        counts = {
            "messages in an outbox": sum(each.due + each.scheduled + each.blocked for each in stats),
            "messages at the broker": await self.broker.unhandled(),
            "sagas": len(await SagaOperations(orders.service.store).sagas()),
        }
        return [f"{number} {what}" for what, number in counts.items() if number]

    async def _stop(self) -> None:
        for process in self.processes:
            self._check(process)
        running = (*self.processes, self.agent)
        for process in running:
            process.terminate()
        await asyncio.gather(*(asyncio.to_thread(process.wait) for process in running))

    def disagreements(self, found: books.Books) -> list[str]:
        return list(books.disagreements(found, self.wanted, self.stock, self.coupons))

    async def report(self) -> bool:
        """Print the books; return whether they agree, and nothing else went wrong."""
        found = await books.read()
        states = Counter(found.states.values())
        dead = await self.broker.dead()
        for service in SERVICES:
            dead += (await OutboxOperations(service.engine, service.outbox).stats()).dead
        for process in self.processes:
            if "Traceback" in process.said:
                print(f"{process.name} has logged an error: {process.last_line}")
        wrong = self.problems + self.disagreements(found) + ([f"{dead} dead messages"] if dead else [])
        print(f"orders   {len(self.wanted)} wanted, {', '.join(f'{n} {state}' for state, n in sorted(states.items()))}")
        print(f"stock    {change(self.stock, found.stock)}")
        print(f"coupons  {change(self.coupons, found.coupons)}")
        print(f"mails    {sum(map(len, found.mails.values()))}, two for each order")
        for line in wrong:
            print(f"WRONG: {line}")
        print("every number agrees" if not wrong else f"{len(wrong)} things do not agree")
        return not wrong


def change(before: dict[str, int], now: dict[str, int]) -> str:
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in before)

"""An agent that books a trip over MCP: the third tool fails, the first two are refunded, and it is killed in each gap.

    pip install 'asgi-idempotency[mcp,sqlite]' uvicorn
    python examples/book_trip_agent.py

The travel agency is an MCP server whose tools take effect once. The agent is a saga: what the model decides is a step,
and so is each call of a tool, with the tool that refunds it as its undo. So a killed agent goes on where it was: the
model is not asked again, and nothing is booked twice. Here the agent is killed before and after each of its steps, and
started again until it has ended. The books of the agency are read at the end.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import tempfile
from typing import Any

from mcp.client.client import Client
from mcp.server.mcpserver import MCPServer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from uvicorn import Config, Server

from idempotency import current
from idempotency.adapters.mcp import KEY, IdempotentTools
from idempotency.saga import SagaFailedError, SagaLostError, SagaPendingError, saga, step
from idempotency.stores.sql import SQLStore
from idempotency.tool import idempotent_tool

# The travel agency.


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    trip: Mapped[str]
    refunded: Mapped[bool] = mapped_column(default=False)


class Agency:
    def __init__(self, directory: str) -> None:
        self.engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/agency.db")
        self.sessions = async_sessionmaker(self.engine)
        tools, store = IdempotentTools(), SQLStore(self.engine)

        @tools.tool()
        @idempotent_tool(store, name="book", session=self.sessions)
        async def book(what: str, trip: str, session: AsyncSession) -> str:
            if what == "car":
                raise ValueError("there are no cars left")
            session.add(Booking(what=what, trip=trip))
            return f"booked a {what}"

        @tools.tool()
        @idempotent_tool(store, name="refund", session=self.sessions)
        async def refund(what: str, trip: str, session: AsyncSession) -> str:
            of_trip = select(Booking).where(Booking.what == what, Booking.trip == trip)
            for booking in await session.scalars(of_trip):
                booking.refunded = True
            return f"refunded the {what}"

        self.server = MCPServer("travel agency", extensions=[tools], log_level="CRITICAL")

    async def open(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def bookings(self, trip: str) -> list[tuple[str, bool]]:
        async with self.sessions() as session:
            found = await session.scalars(select(Booking).where(Booking.trip == trip))
            return [(each.what, each.refunded) for each in found]


# The agent, in a process of its own.

_killed_at = ""
"""The gap in which this process is killed."""

_agency = ""
"""The URL of the agency."""


def gap(label: str) -> None:
    if label == _killed_at:
        os.kill(os.getpid(), signal.SIGKILL)


async def ask_model(done: list[str]) -> str:
    """Decide what to book next. A real model would be asked here, and might answer otherwise each time."""
    return ["flight", "hotel", "car"][len(done)]


async def call_tool(name: str, what: str, trip: str) -> str:
    operation = current()
    assert operation is not None
    gap(f"before {name} {what}")
    async with Client(_agency) as client:
        meta: Any = {KEY: operation.derive(name)}  # the same at each attempt of this step
        result = await client.call_tool(name, {"what": what, "trip": trip}, meta=meta)
    gap(f"after {name} {what}")
    text = " ".join(getattr(each, "text", "") for each in result.content)
    if result.is_error:
        raise RuntimeError(text)
    return text


async def book(what: str, trip: str) -> str:
    return await call_tool("book", what, trip)


async def refund(what: str, trip: str) -> None:
    await call_tool("refund", what, trip)


async def book_trip(trip: str) -> list[str]:
    done: list[str] = []
    while len(done) < 3:
        what = await step("decide", ask_model, done)
        gap(f"decided {what}")
        done.append(await step("book", book, what, trip, undo=refund))
    return done


async def run_agent(directory: str, trip: str) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{directory}/agent.db")
    store = SQLStore(engine)
    await store.create_saga_schema()
    agent = saga(store, name="book-trip", lease=1.0, on_event=lambda _: None)(book_trip)
    ended = False
    while not ended:
        try:
            await agent(trip, key=trip)
        except SagaFailedError:
            ended = True
        except SagaPendingError as pending:
            # Its owner was killed, and has a lease for this long.
            await asyncio.sleep(pending.retry_after)
        except SagaLostError:
            pass  # This process was paused for longer than its lease: go on where the journal is.
    await engine.dispose()


def agent_process(directory: str, trip: str, agency: str, killed_at: str) -> None:
    global _agency, _killed_at
    _agency, _killed_at = agency, killed_at
    asyncio.run(run_agent(directory, trip))


# The agency is served, and agents are killed.

LABELS = (
    "decided flight",
    "before book flight",
    "after book flight",
    "decided hotel",
    "before book hotel",
    "after book hotel",
    "decided car",
    "before book car",
    "after book car",
    "before refund hotel",
    "after refund hotel",
    "before refund flight",
    "after refund flight",
)


def run_killed(label: str, directory: str, agency: str) -> None:
    """Run an agent that is killed in a gap, and another one that ends its trip."""
    processes = multiprocessing.get_context("forkserver")
    # Imported once, for all agents.
    processes.set_forkserver_preload(["idempotency.adapters.mcp", "idempotency.stores.sql", "mcp.client.client"])
    for killed_at, status in ((label, -signal.SIGKILL), ("", 0)):
        process = processes.Process(target=agent_process, args=(directory, label, agency, killed_at))
        process.start()
        process.join()
        assert process.exitcode == status, (label, process.exitcode)


async def main(directory: str) -> None:
    agency = Agency(directory)
    await agency.open()
    server = Server(Config(agency.server.streamable_http_app(), log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve([listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
    print(f"{'killed':<22} booked and refunded")
    for label in LABELS:
        await asyncio.to_thread(run_killed, label, directory, url)
        bookings = await agency.bookings(label)
        shown = ", ".join(f"{what}{'' if refunded else ' NOT REFUNDED'}" for what, refunded in bookings)
        print(f"{label:<22} {shown}", flush=True)
    server.should_exit = True
    await serving
    await agency.engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(temporary))

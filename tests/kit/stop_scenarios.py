"""Programs that end while a record is still to be written.

Each notes its steps as files of the directory, and waits for the test by files there.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from idempotency import Policy, idempotent, idempotent_consumer, open_store
from idempotency.consumer import Done
from idempotency.events import Event

DIRECTORY = Path(sys.argv[2])
URL, PREFIX, LEASE = sys.argv[3], sys.argv[4], float(sys.argv[5])


def note(step: str) -> None:
    (DIRECTORY / step).touch()


def wait_for(step: str) -> None:
    while not (DIRECTORY / step).exists():
        time.sleep(0.01)


def hear(event: Event, /) -> None:
    note(event.kind)


def sync_work() -> str:
    note("effect")
    wait_for("go")
    return "done"


async def async_work() -> str:
    await asyncio.to_thread(sync_work)
    return "done"


store = open_store(URL, prefix=PREFIX, timeout=2)
policy = Policy(lease=LEASE)
call = idempotent(store, key=lambda: "k", policy=policy, on_event=hear)
charge = call(sync_work)
charge_async = call(async_work)


@idempotent_consumer(store, consumer="billing", key=lambda _: "k", policy=policy, on_event=hear)
async def on_message(_: str) -> str:
    return await async_work()


def function() -> None:
    """Return from the program's last call."""
    charge()
    note("ending")


def worker() -> None:
    """End by a handler of SIGTERM, as workers of threads do."""
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    charge()
    note("ready")
    while not ended:
        time.sleep(0.01)
    note("ending")


def interrupted() -> None:
    """Be interrupted a second time while the record is waited for."""
    charge()
    note("ending")


def forked() -> None:
    """Run in a child that was forked from a process which has a write of its own."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()


def forks_while_writing() -> None:
    """Fork a child while a record is still to be written: the child ends at once, the parent writes."""
    charge()
    child = os.fork()
    if not child:
        sys.exit(0)
    os.waitpid(child, 0)
    note("child ended")
    note("ending")


async def _until_terminated() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    note("ready")
    await stop.wait()
    note("ending")


def coroutine() -> None:
    """Return from ``asyncio.run`` as soon as the call has."""

    async def main() -> None:
        await charge_async()
        note("ending")

    asyncio.run(main())


def closed() -> None:
    """Close the store before the loop ends."""

    async def main() -> None:
        await charge_async()
        note("ending")
        await store.aclose()

    asyncio.run(main())


def cancelled() -> None:
    """Be cancelled while the effect is done and the record is not yet, which the store never answers."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await charge_async()
        note("ready")
        try:
            await asyncio.Event().wait()
        finally:
            note("ending")

    asyncio.run(main())


def consumer() -> None:
    """Handle a message, and end when asked to."""

    async def main() -> None:
        assert isinstance(await on_message.deliver("m"), Done)
        await _until_terminated()

    asyncio.run(main())


def stopped_loop() -> None:
    """Stop the event loop and close it, without waiting for anything."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(charge_async())
    note("ending")
    loop.stop()


SCENARIOS: dict[str, Callable[[], Any]] = {
    each.__name__: each
    for each in (
        function,
        worker,
        interrupted,
        forked,
        forks_while_writing,
        coroutine,
        closed,
        cancelled,
        consumer,
        stopped_loop,
    )
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()

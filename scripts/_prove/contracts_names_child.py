"""One process of the proof that ``write_version`` is raised under load: the work of contracts_child.py, slowly."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

# It is not there by itself, so that the library is the one that PYTHONPATH names.
sys.path.append(str(Path(__file__).parent))

import contracts_child

from idempotency import open_store


async def main(url: str, options: dict[str, Any], ledger: str, count: int, seconds: float, pauses: bool) -> None:
    """Do everything once, within about ``seconds``, say when a quarter of it is done, and print the answers.

    ``pauses``: begin the second half when a further line is read.
    """
    store = open_store(url, **options)
    kinds = contracts_child.Work(store, ledger).kinds()
    todo = [(kind, number) for kind in kinds for number in range(count)]
    random.Random(os.getpid()).shuffle(todo)
    free = asyncio.Semaphore(contracts_child.CONCURRENCY)
    answers: dict[str, Any] = {}
    going_on = asyncio.Event()

    async def do(place: int, kind: str, number: int) -> None:
        await asyncio.sleep(seconds * place / len(todo))
        if pauses and place >= len(todo) // 2:
            await going_on.wait()
        async with free:
            try:
                answers[f"{kind} {number}"] = await kinds[kind](number)
            except Exception as error:
                answers[f"{kind} {number}"] = f"error: {type(error).__name__}: {error}"
        if place == len(todo) // 4:
            print("under load", flush=True)

    print("ready", flush=True)
    sys.stdin.readline()
    work = asyncio.gather(*(do(place, *each) for place, each in enumerate(todo)))
    if pauses:
        await asyncio.to_thread(sys.stdin.readline)
        going_on.set()
    await work
    await store.aclose()
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))

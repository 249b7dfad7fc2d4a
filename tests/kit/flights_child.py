"""A process that claims and completes many keys at the same time, and may be killed: ``url table ledger``.

The effect of a key is one line of the file ``ledger``, written between claim and completion. The same line is printed.
"""

from __future__ import annotations

import asyncio
import os
import sys

from idempotency._rules import Execute, judge
from idempotency.stores.sql import SQLStore
from tests.kit.sql_store import new_claim

KEYS = [f"key-{number}" for number in range(300)]
_AT_ONCE = 40


async def main(url: str, table: str, ledger: str) -> None:
    """Work through all keys, except those that another process owns."""
    store = SQLStore.from_url(url, table=table)
    slots = asyncio.Semaphore(_AT_ONCE)
    with open(ledger, "a") as effects:

        async def work(key: str) -> None:
            async with slots:
                claim = new_claim(key)
                verdict = judge(claim, await store.claim(claim))
                if isinstance(verdict, Execute):
                    os.write(effects.fileno(), f"{key}\n".encode())
                    print(key, flush=True)
                    await store.complete(claim, key.encode())

        await store.claim(new_claim(f"warm-{os.getpid()}"))
        await asyncio.gather(*map(work, KEYS))
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

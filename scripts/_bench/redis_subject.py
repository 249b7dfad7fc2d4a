"""A Redis store, and raw commands of redis-py's asyncio client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio as aioredis
from subjects import FINGERPRINT, RESULT, Subject, Verb, claim_of

from idempotency import open_store
from idempotency._rules import Claim, State
from idempotency.stores._clock_guard import ANY
from idempotency.stores.redis import _wire as wire

_BATCH = 1000
_FILL = """
local time = redis.call('TIME')[1] .. '000'
for i = 5, #ARGV, 3 do
  redis.call('HSET', KEYS[1] .. ARGV[i], 'v', '1', 's', '2', 't', ARGV[i + 2], 'f', ARGV[1], 'a', '1', 'l', time,
    'h', '0', 'c', ARGV[4], 'k', ARGV[i + 1], 'n', time, 'r', ARGV[2])
  redis.call('PEXPIRE', KEYS[1] .. ARGV[i], ARGV[3])
end"""


async def unlink_all(client: Any, place: str) -> None:
    """Unlink every key whose prefix is ``place``."""
    keys: list[bytes] = []
    async for key in client.scan_iter(match=f"{place}:*", count=_BATCH):
        keys.append(key)
        if len(keys) == _BATCH:
            await client.unlink(*keys)
            keys.clear()
    if keys:
        await client.unlink(*keys)


class Redis(Subject):
    """One Redis server; the store's connections are recognised by their name."""

    name = "Redis"
    purges = False
    most = 100_000_000

    def __init__(self, url: str, place: str) -> None:
        self.url = url
        self.place = place

    async def open(self) -> None:
        """Open the store, and beside it a client as it comes: its time-out bounds a command, as the store's do."""
        named = f"{self.url}{'&' if '?' in self.url else '?'}client_name={self.place}"
        self.store = open_store(named, prefix=self.place)
        self._client: Any = aioredis.Redis.from_url(self.url)
        await self.store.check()

    async def close(self) -> None:
        """Unlink every key of the prefix."""
        await self.store.aclose()
        await unlink_all(self._client, self.place)
        await self._client.aclose()

    async def fill(self, keys: Sequence[str]) -> None:
        """Let a script write the records, in the store's format."""
        for start in range(0, len(keys), _BATCH):
            claims = [claim_of(key) for key in keys[start : start + _BATCH]]
            own = [value for claim in claims for value in (claim.id.hex(), claim.key, claim.token)]
            common = FINGERPRINT, RESULT, 86_400_000, claims[0].scope
            await self._client.eval(_FILL, 1, f"{self.place}:1:", *common, *own)

    async def stored(self) -> dict[str, int]:
        """Return the memory that the server has allocated, for whatever it stores."""
        return {"memory": (await self._client.info("memory"))["used_memory"]}

    def command(self, verb: Verb, claim: Claim) -> Any:
        """Build the command as the store builds it."""
        key = f"{self.place}:1:{claim.id.hex()}".encode()
        if verb == "complete":
            script, rest = wire.complete(key, claim, RESULT, State.DONE)
        else:
            script, rest = wire.claim(key, claim, ANY)
        return "EVALSHA", script.sha, *rest

    async def send(self, command: Any) -> None:
        """Send one command."""
        await self._client.execute_command(*command)

    async def cheapest(self, _: object) -> None:
        """Get a key that does not exist."""
        await self._client.execute_command("GET", "idempotency-bench")

    async def count(self, work: Callable[[], Awaitable[object]]) -> int:
        """Count the commands of the store's connections with the server's MONITOR."""
        end = f"{self.place} end"
        sent = 0
        async with self._client.monitor() as monitor:
            await work()
            ours = {c["addr"] for c in await self._client.client_list() if c["name"] == self.place}
            await self._client.echo(end)
            while end not in (seen := await monitor.next_command())["command"]:
                sent += f"{seen['client_address']}:{seen['client_port']}" in ours
        return sent

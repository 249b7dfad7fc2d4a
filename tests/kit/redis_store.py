"""Claims and keys of the tests of the Redis store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from idempotency._rules import Claim
from idempotency._sagas.journal import Open
from tests.kit.redis_servers import RedisProcess


def new_claim(key: str = "k", **options: object) -> Claim:
    return Claim(**{"scope": "s", "key": key, "fingerprint": b"f" * 32, "lease": 30, "ttl": 60, **options})


def name_of(claim: Claim) -> str:
    return f"idempotency:1:{claim.id.hex()}"


def saga_key(request: Open, index: str = "") -> str:
    """Return under which key a saga is, or an index of its name."""
    return f"idempotency:1:{{saga:{request.id[-8:].hex()}}}:{index or request.id.hex()}"


def empty(server: RedisProcess) -> None:
    with server.client() as client:
        client.flushall()
        client.script_flush()


@contextlib.contextmanager
def sent_to(server: RedisProcess) -> Iterator[list[str]]:
    """Collect the commands that clients send meanwhile: not those of scripts, and not the handshakes of clients."""
    names: list[str] = []
    with server.client() as client, server.client() as marker, client.monitor() as monitor:
        yield names
        marker.echo("end")
        for heard in monitor.listen():
            name = heard["command"].split()[0].upper()
            if name == "ECHO":
                break
            if heard["client_type"] != "lua" and name not in ("HELLO", "CLIENT"):
                names.append(name)

"""What the contract's tests have in common: requests for new sagas, and waiting for the store's own clock."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import pytest

from idempotency._sagas.journal import Entry, Leave, Look, Open, Phase, Progress, Request, Row, Saga, Write, saga_id

R = TypeVar("R")

ASKED, OTHER = bytes(range(32)), b"\x00" + b"\xff" * 31
SHORT = 0.1
LEASE = 30.0
PATIENCE = 15.0
"""Seconds after which a test fails because something has not happened."""

Advance = Callable[[float], Awaitable[None]]
MakeNewer = Callable[[bytes], Awaitable[None]]

BYTES = {
    "every byte": bytes(range(256)),
    "empty": b"",
    "one MiB": bytes(range(256)) * 4096,
    "quotes": b"'\"\\%s:x;--\r\n",
    "digits": b"9007199254740993",
    "invalid UTF-8": b"\xff\xfe\xc3\x28",
}

NAMES = {
    "colon": "a:b#2",
    "braces": "{a}b}{",
    "quotes": "'\"`;--\\",
    "percent": "%s%(a)s",
    "accents": "cl\u00e9 \u043a\u043b\u044e\u0447 \u9375",
    "outside the basic plane": "\U0001f511",
    "longest": "n" * 200,
}

TWINS = ("name", "NAME", "name ", "nam\u00e9", "name\u0301", "name#2")
"""Names of which no two are the same."""


class Ask(Protocol):
    """``journal`` of a store."""

    async def __call__(self, request: Request[R], /) -> R: ...


def new_name() -> str:
    """Make a name that no other test uses."""
    return f"contract {os.urandom(8).hex()}"


def opening(name: str | None = None, key: str = "key", **changes: Any) -> Open:
    """Make a request for a new saga, with a lease that does not run out during a test."""
    name = new_name() if name is None else name
    fields: dict[str, Any] = {"lease": LEASE, "fingerprint": ASKED, "input": b"input", **changes}
    return Open(id=saga_id(name, key), name=name, key=key, token=os.urandom(16).hex(), **fields)


def rival(request: Open, **changes: Any) -> Open:
    """Make a request for the same saga by another process."""
    return replace(request, **{"token": os.urandom(16).hex(), "lease": LEASE, **changes})


def write(request: Open, *entries: Entry, **changes: Any) -> Write:
    """Make a write by the owner that ``request`` made."""
    return Write(**{"id": request.id, "token": request.token, "lease": LEASE, "entries": entries, **changes})


def leave(request: Open, *entries: Entry, **changes: Any) -> Leave:
    """Make the end of the run that ``request`` began; the saga waits for longer than a test takes."""
    fields: dict[str, Any] = {"phase": Phase.FORWARD, "due": LEASE, "wakes": 0, "entries": entries, **changes}
    return Leave(id=request.id, token=request.token, **fields)


def ending(request: Open, *entries: Entry, **changes: Any) -> Leave:
    """Make the end of a saga as done, which expires after a test."""
    return leave(request, *entries, **{"phase": Phase.DONE, "due": None, "result": b"result", "ttl": 60.0, **changes})


def begun(name: str = "step", body: bytes = b"begun", **changes: Any) -> Entry:
    """Make an entry of a step that has begun."""
    return Entry(**{"name": name, "progress": Progress.BEGUN, "body": body, **changes})


def done(name: str = "step", body: bytes = b"done", **changes: Any) -> Entry:
    """Make an entry of a step that is done, the first of its saga."""
    return Entry(**{"name": name, "progress": Progress.DONE, "order": 1, "body": body, **changes})


def by_name(saga: Saga | None) -> dict[str, Entry]:
    """Return the entries of a saga without their times."""
    assert saga is not None
    entries = {entry.name: replace(entry, began=0.0, changed=0.0) for entry in saga.entries}
    assert len(entries) == len(saga.entries)
    return entries


class Journal:
    """The journal that is tested: called with a request it returns the answer."""

    def __init__(self, ask: Ask, advance: Advance) -> None:
        self._ask = ask
        self._advance = advance

    async def __call__(self, request: Request[R], /) -> R:
        return await self._ask(request)

    async def row(self, request: Open) -> Row:
        """Return the row of the saga that ``request`` is for."""
        saga = await self(Look(id=request.id))
        assert saga is not None
        return saga.row

    async def entries(self, request: Open) -> dict[str, Entry]:
        """Return its entries, without their times."""
        return by_name(await self(Look(id=request.id)))

    async def owned(self, request: Open) -> Row:
        """Open a saga, which must succeed, and return its row."""
        saga = await self(request)
        assert saga is not None
        assert saga.row.token == request.token
        return saga.row

    async def over(self, request: Open) -> None:
        """Wait until the saga is due, by the store's clock."""
        deadline = time.monotonic() + PATIENCE
        while (due_in := (await self.row(request)).due_in) is None or due_in > 0:
            assert due_in is not None
            assert time.monotonic() < deadline, "the saga does not become due"
            await self._advance(due_in)

    async def lapsed(self, **changes: Any) -> Open:
        """Open a new saga with a short lease, and wait until the lease is over."""
        request = opening(**{"lease": SHORT, **changes})
        await self.owned(request)
        await self.over(request)
        return request

    async def expired(self, request: Open) -> None:
        """Wait until the saga is expired, by the store's clock."""
        deadline = time.monotonic() + PATIENCE
        while await self(Look(id=request.id)) is not None:
            assert time.monotonic() < deadline, "the saga does not expire"
            await self._advance(0.02)

    async def pause(self, seconds: float) -> None:
        """Wait until some seconds are over by the store's clock: until a sibling with that lease is due."""
        await self.lapsed(lease=seconds)


class Contract:
    """What every part of the contract is given."""

    @staticmethod
    def asked_of(store: Any) -> Any:
        """Return what answers a request."""
        return store.journal

    @pytest.fixture
    def journal(self, store: Any, advance: Advance) -> Journal:
        """Give the journal that is tested."""
        return Journal(self.asked_of(store), advance)

    @pytest.fixture
    def other_journal(self, another: Any, advance: Advance) -> Journal:
        """Give the same journal by another instance."""
        return Journal(self.asked_of(another), advance)

    @pytest.fixture
    def another(self, store: Any) -> Any:
        """Override to give a second instance on the same sagas."""
        return store

    @pytest.fixture
    def advance(self) -> Advance:
        """Override to give a function that moves the clock of the store."""
        return asyncio.sleep

    @pytest.fixture
    def make_newer(self) -> MakeNewer:
        """Override to give a function that sets the version of the saga of an id to 2."""
        pytest.skip("the fixture make_newer is not given")

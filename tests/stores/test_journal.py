"""The contract of the journal, on every store that keeps sagas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from idempotency.stores.encryption import Encryption
from idempotency.stores.memory import MemoryStore
from idempotency.testing import JournalContract, ManualClock, SyncJournalContract
from tests.kit.newer import make_newer_saga
from tests.kit.targets import Target


class OnMemory:
    """A store in memory whose clock is moved."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock(1000.0)

    @pytest.fixture
    def store(self, clock: ManualClock) -> MemoryStore:
        return MemoryStore(clock=clock)

    @pytest.fixture
    def advance(self, clock: ManualClock) -> Callable[[float], Awaitable[None]]:
        async def advance(seconds: float) -> None:
            clock.advance(seconds)

        return advance


class TestMemory(OnMemory, JournalContract):
    """Memory keeps what the journal promises."""


class TestMemorySync(OnMemory, SyncJournalContract):
    """So do its blocking verbs."""


class TestEncryptedMemory(OnMemory, JournalContract):
    """So it does with encryption."""

    @pytest.fixture
    def store(self, clock: ManualClock) -> Any:
        return MemoryStore(clock=clock, encryption=Encryption(Encryption.new_key()))


@pytest.mark.stores("fakeredis", "redis", "redis62")
class TestContract(JournalContract):
    """Each server keeps what the journal promises."""

    @pytest.fixture
    async def another(self, store: Any, open_another: Callable[[], Awaitable[Any]]) -> Any:
        return await open_another()

    @pytest.fixture
    def make_newer(self, target: Target) -> Callable[[bytes], Awaitable[None]]:
        return lambda record: make_newer_saga(target, record)


@pytest.mark.stores("redis")
class TestSyncContract(SyncJournalContract):
    """So do the blocking verbs, which send the same scripts to each server."""

    @pytest.fixture
    def store(self, sync_store: Any) -> Any:
        return sync_store

    @pytest.fixture
    def make_newer(self, target: Target) -> Callable[[bytes], Awaitable[None]]:
        return lambda record: make_newer_saga(target, record)

"""Scenarios for the crash kit itself: files in a directory, most of them broken in one way."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from idempotency.errors import OutcomeUnknownError
from idempotency.testing import crash_point


class Files:
    """Effects are lines of one file per key, ``done`` is its record."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def effect(self, key: str) -> None:
        with open(self.directory / f"{key}.effects", "a") as ledger:
            ledger.write("effect\n")

    def finish(self, key: str) -> None:
        (self.directory / f"{key}.done").touch()

    def done(self, key: str) -> bool:
        return (self.directory / f"{key}.done").exists()

    def count(self, key: str) -> int:
        ledger = self.directory / f"{key}.effects"
        return len(ledger.read_text().splitlines()) if ledger.exists() else 0


class Once(Files):
    """Right: the effect is its own record."""

    def deliver(self, key: str) -> None:
        crash_point("begin")
        if not self.count(key):
            self.effect(key)
        crash_point("after-effect")


class OwnStore:
    """A store of somebody's own, as far as the crash kit looks at it."""

    def claim_sync(self, record: Path) -> bool:
        return not record.exists()

    def complete_sync(self, record: Path) -> None:
        record.touch()

    def renew_sync(self, record: Path) -> None: ...

    def release_sync(self, record: Path) -> None: ...

    def close(self) -> None: ...


class Stored(Files):
    """Right but for the label between effect and record, and no point is made by hand."""

    def deliver(self, key: str) -> None:
        store, record = OwnStore(), self.directory / f"{key}.done"
        if store.claim_sync(record):
            self.effect(key)
            store.complete_sync(record)


class OnceAsync(Files):
    """Right, and asynchronous in every method; the tables of others are made by ``prepare``."""

    async def prepare(self) -> None:
        (self.directory / "prepared").touch()

    async def deliver(self, key: str) -> None:
        assert (self.directory / "prepared").exists()
        crash_point("begin")
        await asyncio.sleep(0)
        if not super().count(key):
            self.effect(key)
        await asyncio.to_thread(crash_point, "after-effect")

    async def count(self, key: str) -> int:  # type: ignore[override]
        return super().count(key)


class Doubled(Files):
    """Broken: the record comes after the effect."""

    def deliver(self, key: str) -> None:
        crash_point("begin")
        if not self.done(key):
            self.effect(key)
            crash_point("between")
            self.finish(key)
        crash_point("end")


class Lost(Files):
    """Broken: the record comes before the effect."""

    def deliver(self, key: str) -> None:
        crash_point("begin")
        if not self.done(key):
            self.finish(key)
            crash_point("between")
            self.effect(key)
        crash_point("end")


class Locked(Files):
    """Broken: a lock that nobody takes over."""

    def deliver(self, key: str) -> None:
        crash_point("begin")
        if self.done(key):
            return
        self.lock(key)
        crash_point("locked")
        self.effect(key)
        crash_point("between")
        self.finish(key)

    def lock(self, key: str) -> None:
        os.close(os.open(self.directory / f"{key}.lock", os.O_CREAT | os.O_EXCL))


class Held(Locked):
    """Right: a vanished owner leaves the outcome unknown, until somebody looks."""

    def lock(self, key: str) -> None:
        try:
            super().lock(key)
        except FileExistsError:
            raise OutcomeUnknownError from None

    def resolve(self, key: str) -> None:
        if self.count(key):
            self.finish(key)
        else:
            (self.directory / f"{key}.lock").unlink()


class Hanging(Files):
    """Broken: the second delivery never returns."""

    def deliver(self, key: str) -> None:
        if (self.directory / f"{key}.lock").exists():
            while True:
                pass
        (self.directory / f"{key}.lock").touch()
        crash_point("locked")
        self.effect(key)


class Unsteady(Files):
    """No scenario: its labels are others in every run."""

    def deliver(self, key: str) -> None:
        crash_point(f"at {uuid.uuid4()}")
        if not self.count(key):
            self.effect(key)


class Failing(Files):
    """No scenario: it fails undisturbed."""

    def deliver(self, key: str) -> None:
        raise ValueError("out of stock")


class Twice(Files):
    """No scenario: it has two effects undisturbed."""

    def deliver(self, key: str) -> None:
        self.effect(key)
        self.effect(key)


class Loop(Files):
    """Right, with a point that is passed twice."""

    def deliver(self, key: str) -> None:
        for _ in range(2):
            crash_point("pass")
        if not self.count(key):
            self.effect(key)

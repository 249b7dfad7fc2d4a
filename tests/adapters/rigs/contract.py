"""What every adapter must do, over the real wire: each function runs one case and returns what was counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sqlalchemy import create_engine

from idempotency.stores.sql import SQLStore
from tests.adapters.rigs.orders import ATTEMPTS, OrderLedger, Rig, Setting, Worker, until
from tests.kit.servers import forget_redis_keys, with_driver
from tests.kit.targets import unique_name

MODES = ("joined", "leased")
POINTS = ("before-effect", "after-effect", "stored")
"""Where the consumer is killed: before its effect; after it, before the commit; after the commit, before the ack."""


@dataclass(frozen=True)
class Counted:
    """What one case came to."""

    deliveries: int
    effects: int
    lost: int
    doubled: int
    unsettled: int
    dead: int

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.unsettled)


@dataclass
class Case:
    """One queue, its ledger, and the consumers on it."""

    rig: Rig
    setting: Setting
    ledger: OrderLedger
    expected: dict[str, int]

    @contextmanager
    def worker(self, crash_at: str = "") -> Iterator[Worker]:
        worker = Worker(self.rig, self.setting, crash_at)
        try:
            yield worker
            worker.stop()
        except BaseException:
            worker.kill()
            print(worker.said, file=sys.stderr)
            raise
        finally:
            worker.kill()

    def publish(self, key: str, do: str = "buy", *, effects: int = 1, elsewhere: bool = False, **more: Any) -> None:
        self.expected[key] = effects
        self.rig.publish({"key": key, "do": do, **more}, elsewhere=elsewhere)

    def heard(self, kind: str, times: int = 1) -> None:
        until(lambda: self.ledger.count(kind) >= times, f"{kind} x {times}; so far {self.ledger.notes()}")

    def heard_of(self, what: str, key: str) -> None:
        until(lambda: self.ledger.count(what, key), f"{what} {key}; so far {self.ledger.notes()}")

    def settled(self) -> int:
        """Wait for a while until everything is settled; say what is not."""
        deadline = time.monotonic() + 20
        while (unsettled := self.rig.unsettled()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return unsettled

    def deliveries(self) -> int:
        """Count the deliveries so far, but for those of another message under a key."""
        notes = self.ledger.notes()
        return sum(notes.get(kind, 0) for kind in ("started", "replayed", "in-progress", "unknown"))

    def counted(self) -> Counted:
        """Count, when the consumers have ended."""
        unsettled = self.settled()
        found = {key: self.ledger.effects(key) for key in self.expected}
        return Counted(
            deliveries=self.deliveries(),
            effects=sum(found.values()),
            lost=sum(max(0, self.expected[key] - each) for key, each in found.items()),
            doubled=sum(max(0, each - self.expected[key]) for key, each in found.items()),
            unsettled=unsettled,
            dead=self.rig.dead(),
        )


@dataclass(frozen=True)
class Places:
    """Where the cases keep what they count: PostgreSQL for effects and joined records, Redis for leased ones."""

    database: str
    redis: str

    @contextmanager
    def case(self, adapter: str, mode: str, on_crash: str = "rerun") -> Iterator[Case]:
        place = unique_name("brokers")
        rig: Rig = import_module(f"tests.adapters.rigs.{adapter}_rig").Rig(place)
        try:
            setting = Setting(place, mode, self.database, self.redis, on_crash, rig.environment())
            ledger = OrderLedger(setting)
            try:
                ledger.create()
                if mode == "joined":
                    self._create_records(place)
                yield Case(rig, setting, ledger, {})
            finally:
                ledger.drop()
                forget_redis_keys(self.redis, place)
        finally:
            rig.close()

    def _create_records(self, place: str) -> None:
        engine = create_engine(with_driver(self.database, "postgresql+psycopg"))
        SQLStore(engine, table=f"{place}_records").create_schema_sync()
        engine.dispose()


def excused(adapter: str, case: str) -> str:
    """Say why a case cannot be asked of an adapter, if it cannot: its broker does not do what the case needs."""
    reasons: dict[str, str] = getattr(import_module(f"tests.adapters.rigs.{adapter}_rig"), "EXCUSED", {})
    return reasons.get(case, "")


def killed(places: Places, adapter: str, mode: str, point: str) -> Counted:
    """Kill the consumer at ``point``; another one is given the message again.

    A leased effect that may or may not have happened is held: it is not repeated, and its message is a dead letter.
    """
    unsure = mode == "leased" and point == "after-effect"
    with places.case(adapter, mode, "hold" if unsure else "rerun") as case:
        case.publish("order-1")
        with case.worker(crash_at=point) as worker:
            worker.wait_for_death()
        with case.worker():
            case.heard("unknown" if unsure else "replayed" if point == "stored" else "stored")
        counted = case.counted()
        assert counted.dead == unsure, counted
        return counted


def duplicate(places: Places, adapter: str, mode: str) -> Counted:
    """Publish one logical message twice."""
    with places.case(adapter, mode) as case:
        case.publish("order-1")
        with case.worker():
            case.heard("stored")
            case.publish("order-1")
            case.heard("replayed")
        counted = case.counted()
        assert counted.dead == 0, counted
        return counted


def failing(places: Places, adapter: str, mode: str) -> Counted:
    """Handle a message that fails twice and then succeeds."""
    with places.case(adapter, mode) as case:
        case.publish("order-1", "fail", times=2)
        with case.worker():
            case.heard("stored")
        counted = case.counted()
        assert (counted.deliveries, counted.dead) == (3, 0), counted
        return counted


def poison(places: Places, adapter: str, mode: str) -> Counted:
    """Handle a message that always fails, and one after it."""
    with places.case(adapter, mode) as case:
        case.publish("order-1", "poison", effects=0)
        case.publish("order-2")
        with case.worker():
            case.heard("stored")
            case.heard("dead-lettered")
        assert case.ledger.count("started", "order-1") == ATTEMPTS
        counted = case.counted()
        assert counted.dead == 1, counted
        return counted


def busy(places: Places, adapter: str, mode: str) -> Counted:
    """Deliver a duplicate while the first is still being handled."""
    with places.case(adapter, mode) as case:
        with case.worker(), case.worker():
            case.publish("order-1", "wait")
            until(lambda: case.ledger.count("started", "order-1"), "the first began")
            case.publish("order-1", "wait", elsewhere=True)
            case.heard("in-progress")
            assert case.ledger.effects("order-1") == 0
            case.ledger.note("open", "order-1")
            case.heard("stored")
            case.heard("replayed")
            # A settlement that a rebalance of the consumers has undone is made again.
            case.settled()
        counted = case.counted()
        assert counted.dead == 0, counted
        return counted


def reused(places: Places, adapter: str, mode: str) -> Counted:
    """Publish another message under the identity of one that was handled, and then that one again."""
    with places.case(adapter, mode) as case:
        case.publish("order-1")
        with case.worker():
            case.heard("stored")
            case.publish("order-1", "refund")
            case.heard("dead-lettered")
            case.publish("order-1")
            case.heard("replayed")
        counted = case.counted()
        assert (case.ledger.notes().get("mismatch"), case.ledger.count("started", "order-1")) == (1, 1)
        assert counted.dead == 1, counted
        return counted


def one_after_another(places: Places, adapter: str, mode: str) -> Counted:
    """Run the joined cases but ``busy`` on one queue, by few processes: most of the time of a case is their start.

    The consumer of the first order is killed after its effect, the next one after its commit. The third has the rest.
    """
    assert mode == "joined", "a leased message whose consumer is killed after its effect is held"
    with places.case(adapter, mode) as case:
        killed = not excused(adapter, "killed stored")
        case.publish("order-1")
        for point in POINTS[1:] if killed else ():
            with case.worker(crash_at=point) as worker:
                worker.wait_for_death()
        with case.worker():
            case.heard("replayed" if killed else "stored")
            case.publish("order-1")
            case.heard("replayed", killed + 1)
            case.publish("order-1", "refund")
            case.heard("dead-lettered")
            case.publish("order-1")
            case.heard("replayed", killed + 2)
            before = case.deliveries()
            case.publish("order-2", "fail", times=2)
            case.heard("stored", 2)
            assert case.deliveries() - before == 3
            case.publish("order-3", "poison", effects=0)
            case.publish("order-4")
            case.heard("stored", 3)
            case.heard("dead-lettered", 2)
        counted = case.counted()
        started = [case.ledger.count("started", f"order-{number}") for number in range(1, 5)]
        assert started == [killed + 1, 3, ATTEMPTS, 1]
        assert (case.ledger.notes().get("mismatch"), counted.dead) == (1, 2), counted
        return counted


CASES: dict[str, Callable[[Places, str, str], Counted]] = {
    **{
        f"killed {point}": lambda places, adapter, mode, point=point: killed(places, adapter, mode, point)
        for point in POINTS
    },
    "duplicate": duplicate,
    "failing": failing,
    "poison": poison,
    "busy": busy,
    "reused": reused,
}
"""Every case by its name."""

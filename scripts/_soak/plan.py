"""The plan of a run, drawn from its seed: the operations of the clients, and the chaos with its times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

LEASE = 2.0
TIMEOUT = 1.0
WORKERS = 2
CLIENTS = {"postgresql": 5, "mariadb": 5, "sqlite": 2, "redis": 5}
"""How many clients each mode has; SQLite has one writer at a time."""

SQL_MODES = ("transactional", "leased", "hold", "joined", "joined-sync", "consumer")
MODES = {"postgresql": SQL_MODES, "mariadb": SQL_MODES, "sqlite": SQL_MODES, "redis": ("leased", "hold", "consumer")}
DRIVERS = {
    "postgresql": ("postgresql+asyncpg", "postgresql+psycopg"),
    "mariadb": ("mysql+aiomysql", "mysql+asyncmy"),
    "sqlite": ("sqlite+aiosqlite",),
    "redis": ("redis",),
}
WORKER_EVENTS = ("kill the worker", "pause the worker", "stop the worker")
STORE_EVENTS = ("freeze the store", "restart the store")
WAY_EVENTS = ("cut the way", "freeze the way", "swallow replies", "lose replies")
LOCK_EVENTS = ("hold the write lock",)
SESSION_SHAPES = ("execute", "add", "savepoint", "undone savepoint", "hold")
SHAPES = {
    "transactional": (*SESSION_SHAPES, "rollback", "refuse"),
    "joined": SESSION_SHAPES,
    "joined-sync": SESSION_SHAPES,
    "leased": ("plain", "plain", "hold"),
    "hold": ("plain",),
}


@dataclass(frozen=True)
class Event:
    """One piece of chaos: ``at`` seconds from the start, for ``seconds``; ``worker`` is its target, if it has one."""

    at: float
    kind: str
    worker: int
    seconds: float


@dataclass(frozen=True)
class Operation:
    """The operation of one key, and how its clients behave.

    ``shape``: how the handler writes its effect. ``fails``: whether its first run in a process raises before or after
    the effect, or not at all. ``seconds``: how long it takes. ``patience``: after how many seconds a client gives up
    and asks again. ``leaves``: after how many seconds the first try hangs up. ``clients``: how many ask at a time.
    """

    key: str
    mode: str
    shape: str
    fails: str
    seconds: float
    patience: float
    leaves: float | None
    clients: int


def draw_drivers(seed: int, store: str) -> list[str]:
    """Return the driver of each worker."""
    draw = Random(f"{seed} {store} drivers")
    return [draw.choice(DRIVERS[store]) for _ in range(WORKERS)]


def draw_events(seed: int, store: str, seconds: float) -> list[Event]:
    """Return the chaos of a run, in order; all of it is over after ``seconds``."""
    draw = Random(f"{seed} {store} chaos")
    groups = (WORKER_EVENTS, LOCK_EVENTS) if store == "sqlite" else (WORKER_EVENTS, STORE_EVENTS, WAY_EVENTS)
    events, at = [], 1.0
    while at < seconds:
        kind = draw.choice(draw.choice(groups))
        # Half of them are shorter than a lease, so that no lease is lost. The others are longer.
        length = round(draw.uniform(0.1, LEASE) if draw.random() < 0.5 else draw.uniform(LEASE, 2.5 * LEASE), 2)
        events.append(Event(round(at, 2), kind, draw.randrange(WORKERS), min(length, round(seconds - at, 2))))
        # Some follow each other at once. After the others there is a quiet moment.
        at += draw.uniform(0.2, 1.0) if draw.random() < 0.4 else length + draw.uniform(0.5, 2.0)
    return events


def draw_operations(seed: int, store: str, mode: str, client: int) -> Iterator[Operation]:
    """Yield the operations of one client, one after another."""
    draw = Random(f"{seed} {store} {mode} {client}")
    shapes = SHAPES.get(mode) or SHAPES["leased" if store == "redis" else "joined"]
    # A handler in a transaction makes all other writers of SQLite wait.
    slowness = 0.1 if store == "sqlite" else 1.0
    for number in itertools.count():
        yield Operation(
            key=f"{store}-{mode}-{client}-{number}",
            mode=mode,
            shape=draw.choice(shapes),
            fails=draw.choices(("", "before", "after"), (8, 1, 1))[0],
            seconds=slowness * draw.choices((0.0, draw.uniform(0.05, 0.5), 1.2 * LEASE), (60, 35, 5))[0],
            patience=draw.choice((0.3, 1.0, 3.0)),
            leaves=draw.uniform(0.0, 0.2) if draw.random() < 0.1 else None,
            clients=draw.choices((1, 2, 3), (7, 2, 1))[0],
        )

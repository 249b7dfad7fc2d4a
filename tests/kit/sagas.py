"""Functions of sagas under test: what they did is noted, and they fail as a test says."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from idempotency._sagas.journal import Look, Saga, saga_id
from idempotency.errors import RecordedFailureError
from idempotency.saga import AsyncSaga
from idempotency.testing import FaultyStore, ManualClock

DID: list[Any] = []
"""What was done, in its order."""

FAULTS: defaultdict[str, list[Any]] = defaultdict(list)
"""What the next calls meet, by what they do: an exception, or a function that is called; None: nothing."""


class KilledError(BaseException):
    """The process ends: nothing more is written."""


class Process:
    """A process that runs sagas, by a store of its own on the records of all."""

    def __init__(self, store: FaultyStore, clock: ManualClock) -> None:
        self.store = store
        self.clock = clock

    def kill(self) -> None:
        """End the process here."""
        self.store.down = True
        raise KilledError

    def begin_again(self, lease: float = 30.0) -> None:
        """Begin another process, once the lease of the one that was killed is over."""
        self.store.down = False
        self.clock.advance(lease + 1.0)


async def do(what: str) -> str:
    """Do a thing, and return a text about it."""
    DID.append(what)
    await meet(what)
    return f"{what} done"


def do_sync(what: str) -> str:
    """See :func:`do`."""
    DID.append(what)
    meet_sync(what)
    return f"{what} done"


async def take_back(what: str, *, result: str | None) -> None:
    """Undo a thing."""
    DID.append(f"undo {what}" if result is not None else f"undo {what}, which may not be done")
    await meet(f"undo {what}")


def take_back_sync(what: str, *, result: str | None) -> None:
    """See :func:`take_back`."""
    DID.append(f"undo {what}" if result is not None else f"undo {what}, which may not be done")
    meet_sync(f"undo {what}")


async def note_failure(what: str, *, failure: RecordedFailureError) -> None:
    """Undo a thing, and note why."""
    DID.append((f"undo {what}", failure.type))


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function, as a decorator of another module does."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


async def meet(what: str) -> None:
    """Meet what the test has prepared for a call."""
    for each in _next(what):
        if inspect.isawaitable(found := each()):
            await found


def meet_sync(what: str) -> None:
    """See :func:`meet`."""
    for each in _next(what):
        each()


def _next(what: str) -> Iterable[Callable[[], Any]]:
    fault = FAULTS[what].pop(0) if FAULTS[what] else None
    if isinstance(fault, BaseException):
        raise fault
    return [] if fault is None else [fault]


async def recorded(saga: AsyncSaga[Any], key: str = "7") -> Saga | None:
    """Return what the store has of a saga."""
    found: Saga | None = await saga._definition.store.journal(Look(id=saga_id(saga.name, key)))
    return found


async def states(saga: AsyncSaga[Any], key: str = "7") -> dict[str, str]:
    """Return how far each entry of a saga is, by its name."""
    found = await recorded(saga, key)
    assert found is not None
    return {entry.name: entry.progress.name for entry in found.entries}

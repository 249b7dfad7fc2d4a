"""The failures of a worker: what ends it, what it tries again, and what is a failure of the event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from idempotency.errors import StoreError
from idempotency.streams._position import ConflictError

ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends the worker, also where the function raises it."""


class FunctionFailedError(Exception):
    """The function of a projection has raised; the cause is its error."""


@contextmanager
def reading() -> Iterator[None]:
    """Raise a StoreError, after which one tries again, where a read of events conflicts with another transaction."""
    try:
        yield
    except ConflictError as error:
        raise StoreError("the transaction conflicts with another one: begin it again") from error

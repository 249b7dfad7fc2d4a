"""``idempotency saga sweep``: go on with the sagas of an application until a signal says to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from idempotency._cli.options import fail
from idempotency._cli.signals import stopped_by_signals
from idempotency._hooks import import_from_here, import_named
from idempotency.errors import ConfigurationError, IdempotencyError
from idempotency.saga import AsyncSaga, Sweeper, SyncSaga


def sweep(
    sagas: Annotated[list[str], typer.Argument(metavar="MODULE:NAME", help="Sagas, or lists of them.")],
    poll: Annotated[float, typer.Option(help="Seconds between two looks for sagas that are due.")] = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="How many sagas are run at once.")] = 10,
) -> None:
    """Go on with sagas for ever: recorded ones, those whose process was killed, those whose wait is over.

    SIGTERM or SIGINT lets it finish the runs that it has begun, and end; a second one ends it at once.
    """
    try:
        found = [saga for path in sagas for saga in _sagas_at(path)]
        asyncio.run(_sweep(found, poll, concurrency))
    except IdempotencyError as error:
        fail(str(error))


async def _sweep(sagas: list[Any], poll: float, concurrency: int) -> None:
    of_store: dict[int, list[Any]] = {}
    for saga in sagas:
        of_store.setdefault(id(saga._definition.store), []).append(saga)
    sweepers = [
        Sweeper(some[0]._definition.store, some, poll=poll, concurrency=concurrency) for some in of_store.values()
    ]

    async def stop() -> None:
        await asyncio.gather(*(sweeper.stop() for sweeper in sweepers))

    with stopped_by_signals(stop):
        typer.echo(f"sweeping {', '.join(saga.name for saga in sagas)}")
        await asyncio.gather(*(sweeper.run() for sweeper in sweepers))


def _sagas_at(path: str) -> Iterator[Any]:
    """Import what ``module:name`` names, also from the directory of the command."""
    import_from_here()
    found = import_named("sagas are named as", path)
    several = found if isinstance(found, list | tuple) else [found]
    for saga in several:
        if not isinstance(saga, AsyncSaga | SyncSaga):
            raise ConfigurationError(f"{path} is no saga, and no list of sagas, but {type(saga).__name__}")
        yield saga

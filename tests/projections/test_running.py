"""What a worker outlives, and what ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from idempotency.projections import ProjectionStoppedError, projection
from tests.projections.kit import Bank


class Aborted(BaseException):
    """What a library raises so that nobody catches it by accident."""


async def _abort() -> None:
    raise Aborted


async def _await_what_is_cancelled() -> None:
    shared = asyncio.get_running_loop().create_future()
    shared.cancel()
    await shared


@pytest.mark.stores("sqlite", "postgres", "postgres_psycopg", "mariadb")
@pytest.mark.parametrize(("end", "error"), [(_await_what_is_cancelled, "CancelledError"), (_abort, "Aborted")])
async def test_a_cancellation_of_what_the_function_awaits_is_a_failure_of_the_event(
    end: Any, error: str, bank: Bank
) -> None:
    """The task of the worker is not cancelled: the event is tried again, and stops the projection."""

    @projection("balance", **bank.options(attempts=2))
    async def apply(event: Any, session: Any) -> None:
        await session.execute(bank.insert(event, 1))
        if event.data.amount == 2:
            await end()

    await bank.append(1, 2)
    await bank.readable()
    with pytest.raises(ProjectionStoppedError) as stopped:
        await apply.catch_up()

    assert (stopped.value.error, stopped.value.attempts) == (error, 2)
    assert await bank.seen() == (1, 1)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_failure_of_the_event(error: type[BaseException], sync_bank: Bank) -> None:
    """It is raised at once, and nothing is noted: the next worker applies the event."""

    @projection("balance", **sync_bank.options(attempts=1))
    def apply(event: Any, session: Any) -> None:
        session.execute(sync_bank.insert(event, 1))
        raise error

    sync_bank.append_sync(5)
    with pytest.raises(error):
        apply.run_once()

    assert sync_bank.kinds == []
    assert sync_bank.sync_projection().catch_up() == 1

"""Do what an operator asks for, and write it down: first what begins, then how it ended."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from uuid import uuid4

from idempotency.errors import IdempotencyError, StoreError
from idempotency.stores.base import Action, Auditing

_logger = logging.getLogger("idempotency")


class NotChangedError(IdempotencyError):
    """The thing is not as the operator saw it: nothing was changed."""


async def audited(auditing: Auditing, action: Action, work: Callable[[], Awaitable[str]]) -> Action:
    """Write down an action, do it, write down its outcome, and return the action with it.

    Where the action cannot be written down, nothing is done, and the StoreError is raised. An outcome that cannot be
    written down is logged: the action has happened.
    """
    action = replace(action, id=uuid4().hex)
    await auditing.write_down(action)
    try:
        outcome = await work()
    except IdempotencyError as error:
        outcome = f"refused: {error}"
    except Exception as error:
        await _write_outcome(auditing, action, f"failed: {type(error).__name__}")
        raise
    await _write_outcome(auditing, action, outcome)
    return replace(action, outcome=outcome)


async def _write_outcome(auditing: Auditing, action: Action, outcome: str) -> None:
    try:
        await auditing.write_outcome(action.id, outcome)
    except Exception as error:  # the action has happened, and its operator must see that
        why = error if isinstance(error, StoreError) else type(error).__name__
        _logger.error("the outcome of the action %s is not in the audit: %s", action.id, why)

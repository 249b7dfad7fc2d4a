"""Calls under a lease, for effects outside the database: claim, run with a heartbeat, then record the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from idempotency._engine.calls import Calls, Ended, Raised, Ran
from idempotency._engine.lease import Lease
from idempotency._engine.runner import Runner
from idempotency._results.codec import encode_failure
from idempotency._rules import Claim, Execute
from idempotency.errors import ConfigurationError, StoreError, WaitFailedError
from idempotency.operation import RUNNING, Operation
from idempotency.stores.base import Store

HAPPENED = "The effect has happened, and the key is completed without a result."
"""What an error says about the effect of a leased call."""


class Leased:
    """The calls of one asynchronous function."""

    def __init__(self, store: Store, calls: Calls) -> None:
        self._calls = calls
        # async only: each event loop has a runner, made at its first call.
        self._store = store
        # async only: see above.
        self._runners: WeakKeyDictionary[asyncio.AbstractEventLoop, Runner] = WeakKeyDictionary()

    # async only: see __init__.
    def _runner_here(self) -> Runner:
        loop = asyncio.get_running_loop()
        runner = self._runners.get(loop)
        if runner is None:
            runner = self._runners[loop] = Runner(self._store, self._calls.hooks, self._calls.surface)
        return runner

    async def run(self, claim: Claim, work: Callable[..., Awaitable[Any]]) -> Ended:
        """Run ``work`` once under ``claim``, or return the verdict of the record.

        Raises :class:`~idempotency.errors.StoreError` when the store failed before anything ran.
        """
        calls = self._calls
        runner = self._runner_here()  # async only: see __init__
        try:
            verdict, claimed_at = await runner.claim(claim, calls.policy.wait)
        except StoreError as error:
            if calls.policy.on_store_error == "fail_open" and not isinstance(error, WaitFailedError):
                calls.emit("unprotected", claim, error=error)
                return await _unprotected(work)
            calls.emit("unavailable", claim, error=error)
            raise
        if not isinstance(verdict, Execute):
            return verdict
        operation = Operation(claim, verdict.attempt, name=calls.name)
        return await self._execute(Lease(runner, claim, operation, calls.name, claimed_at, calls.name), operation, work)

    async def _execute(self, lease: Lease, operation: Operation, work: Callable[..., Awaitable[Any]]) -> Ended:
        token = RUNNING.set(operation)
        try:
            value = await work()
        except BaseException as error:
            outcome = operation.outcome_after(self._calls.policy.outcome_of_exception(error))
            await lease.end(outcome, encode_failure(error) if outcome == "store" else None, error)
            if isinstance(error, Exception):
                return Raised(error, outcome)
            raise
        else:
            outcome = operation.outcome_after("store")
            ended: Ran | Raised = Ran(value)
            result, flaw = None, ""
            try:
                if outcome == "store":
                    result, flaw = self._calls.encode(value, HAPPENED)
            except ConfigurationError as error:
                ended, flaw = Raised(error, outcome), type(error).__name__
            known = await lease.end(outcome, result, flaw)
            return ended if known is None else known
        finally:
            RUNNING.reset(token)
            lease.stop()


async def _unprotected(work: Callable[..., Awaitable[Any]]) -> Ran | Raised:
    token = RUNNING.set(None)
    try:
        return Ran(await work())
    except Exception as error:
        return Raised(error, "release")
    finally:
        RUNNING.reset(token)

"""Calls of synchronous functions under a lease; see :mod:`idempotency._engine.leased`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from idempotency._engine.calls import Calls, Ended, Raised, Ran
from idempotency._engine.lease_sync import SyncLease
from idempotency._engine.leased import HAPPENED
from idempotency._engine.runner_sync import SyncRunner
from idempotency._results.codec import encode_failure
from idempotency._rules import Claim, Execute
from idempotency.errors import ConfigurationError, StoreError, WaitFailedError
from idempotency.operation import RUNNING, Operation
from idempotency.stores.base import SyncStore


class SyncLeased:
    """The calls of one synchronous function."""

    def __init__(self, store: SyncStore, calls: Calls) -> None:
        self._calls = calls
        # sync only: threads share a runner.
        self._runner = SyncRunner(store, calls.hooks, calls.surface)

    def run(self, claim: Claim, work: Callable[..., Any]) -> Ended:
        """See :meth:`Leased.run`."""
        calls = self._calls
        runner = self._runner  # sync only: see __init__
        try:
            verdict, claimed_at = runner.claim(claim, calls.policy.wait)
        except StoreError as error:
            if calls.policy.on_store_error == "fail_open" and not isinstance(error, WaitFailedError):
                calls.emit("unprotected", claim, error=error)
                return _unprotected_sync(work)
            calls.emit("unavailable", claim, error=error)
            raise
        if not isinstance(verdict, Execute):
            return verdict
        operation = Operation(claim, verdict.attempt, name=calls.name)
        return self._execute(SyncLease(runner, claim, operation, calls.name, claimed_at, calls.name), operation, work)

    def _execute(self, lease: SyncLease, operation: Operation, work: Callable[..., Any]) -> Ended:
        token = RUNNING.set(operation)
        try:
            value = work()
        except BaseException as error:
            outcome = operation.outcome_after(self._calls.policy.outcome_of_exception(error))
            lease.end(outcome, encode_failure(error) if outcome == "store" else None, error)
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
            known = lease.end(outcome, result, flaw)
            return ended if known is None else known
        finally:
            RUNNING.reset(token)
            lease.stop()


def _unprotected_sync(work: Callable[..., Any]) -> Ran | Raised:
    token = RUNNING.set(None)
    try:
        return Ran(work())
    except Exception as error:
        return Raised(error, "release")
    finally:
        RUNNING.reset(token)

"""Find out what happened to a call whose outcome is unknown, by ``verify=``, and resolve its record."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from idempotency._engine.calls import Calls, Raised, Ran, refusal
from idempotency._engine.leased import Leased
from idempotency._engine.verifying import NOT_DONE
from idempotency._hooks import is_coroutine_function
from idempotency._rules import Claim, Known
from idempotency.errors import ConfigurationError, OutcomeUnknownError
from idempotency.events import EventHooks
from idempotency.operation import RUNNING, Operation, current
from idempotency.policy import Policy
from idempotency.stores.base import Resolving, Store, check_store, require


def check_takes_arguments(verify: Callable[..., Any], signature: inspect.Signature) -> None:
    """Refuse a ``verify=`` that cannot be called with the arguments of the tool, which has this signature."""
    positional = [each for each in signature.parameters.values() if each.kind is each.POSITIONAL_ONLY]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [each for each in signature.parameters.values() if each.kind in by_name]
    try:
        inspect.signature(verify).bind(*positional, **{each.name: each for each in named})
    except TypeError as error:
        raise ConfigurationError(f"verify= must take the arguments of the tool: {error}") from error


def calls_of_verification(calls: Calls) -> Calls:
    """Return what the verifications of one tool share: a space of keys of their own, which are free at their end."""
    return replace(
        calls,
        scope=f"verify:{calls.scope}",
        policy=Policy(lease=calls.policy.lease),
        hooks=EventHooks(silent=True),
    )


def claim_of_verification(verifications: Calls, claim: Claim) -> Claim:
    """Return the claim by which one verification of a call runs at a time.

    Else the slower of two would free a call that the faster one had freed before, and that ran again meanwhile.
    """
    return verifications.claim(claim.id.hex(), None)


def check_is_owned(owned: bool) -> None:
    """Raise an error if the lease of a verification is another one's.

    A process may be paused for longer than its lease. What it found out may be about a run before the last one.
    """
    if not owned:
        raise OutcomeUnknownError("Another verification of the call began before this one ended.")


def is_not_done(calls: Calls, claim: Claim, ended: Ran | Raised | Known) -> bool:
    """Return what the verification of ``claim`` found out: whether the effect has not happened.

    Raises :class:`~idempotency.errors.OutcomeUnknownError` if it failed, and
    :class:`~idempotency.errors.InProgressError` if another one is running.
    """
    match ended:
        case Ran(value):
            return bool(value)
        case Raised(error, _):
            calls.emit("unknown", claim, error=error)
            raise OutcomeUnknownError("The outcome is unknown, and verify= failed to find it out.") from error
        case verdict:
            raise refusal(verdict)  # type: ignore[arg-type]


@contextmanager
def as_operation_of(calls: Calls, claim: Claim) -> Iterator[None]:
    """Let ``verify=`` run as the operation that it verifies, so that it derives the same keys as the tool.

    The operation of the verification itself is released at its end: the next one asks again.
    """
    verification = current()
    assert verification is not None  # it runs under a lease
    verification.release()
    token = RUNNING.set(Operation(claim, 1, name=calls.name))
    try:
        yield
    finally:
        RUNNING.reset(token)


def result_of_verification(calls: Calls, found: object) -> bytes | None:
    """Encode what ``verify=`` found; None for a result that is too large to be recorded.

    Raises :class:`~idempotency.errors.ConfigurationError` for what the tool cannot have returned, such as None for an
    effect that was not found.
    """
    result, flaw = calls.encode(found, "")
    if result is None and flaw != "ResultTooLarge":
        raise ConfigurationError(
            f"verify= of {calls.name} returned a {type(found).__name__}, which is no result of the tool: return "
            "NOT_DONE where the effect has not happened"
        )
    return result


class Verification:
    """The verification of one asynchronous tool."""

    def __init__(self, store: object, calls: Calls, verify: Callable[..., Awaitable[Any]]) -> None:
        # async only: what the sync half calls is not awaited.
        if not is_coroutine_function(verify):
            raise ConfigurationError("verify= of an asynchronous tool must be a coroutine function")
        self._store = require(store, Resolving, "verify=")
        self._calls = calls
        self._verifications = calls_of_verification(calls)
        self._claims = check_store(store, Store)
        self._leased = Leased(self._claims, self._verifications)
        self._verify = verify

    async def is_not_done(self, claim: Claim, args: Any, kwargs: Any) -> bool:
        """Find out whether the effect has happened, and resolve the record of ``claim`` by that."""
        own = claim_of_verification(self._verifications, claim)

        async def find_out() -> bool:
            with as_operation_of(self._calls, claim):
                found = await self._verify(*args, **kwargs)
            check_is_owned(await self._claims.renew(own))
            if found is NOT_DONE:
                await self._store.resolve(claim.id, "release")
                return True
            result = result_of_verification(self._calls, found)
            await self._store.resolve(claim.id, "done", result, ttl=self._calls.policy.ttl)
            return False

        ended = await self._leased.run(own, find_out)
        return is_not_done(self._calls, claim, ended)

"""Approvals: a record that somebody approved one call of a tool, with exactly these arguments.

An approval belongs to the identity of a call and to the digest of its arguments. The call takes effect once, so the
approval is spent with the effect: a repeat that is meant is another call, and needs an approval of its own. A call that
failed before its effect may use it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from idempotency._engine.calls import Calls
from idempotency._engine.leased import Leased
from idempotency._engine.leased_sync import SyncLeased
from idempotency._hooks import check_callable
from idempotency._results.codec import results_of
from idempotency._rules import Claim, State
from idempotency.errors import ApprovalNeededError
from idempotency.operation import current
from idempotency.policy import Policy
from idempotency.stores.base import Entry, Inspecting, Store, SyncInspecting, SyncStore, check_store, require
from idempotency.tool._call import call_of
from idempotency.tool._identity import Identity

Needed = bool | Callable[..., bool]


class Approvals:
    """The approvals of one tool."""

    def __init__(self, store: object, calls: Calls, identity: Identity, needed: Needed, asynchronous: bool) -> None:
        if not isinstance(needed, bool):
            check_callable("approval=", needed)
        if needed:
            require(store, Inspecting if asynchronous else SyncInspecting, "approval=")
        self.tool = calls.scope
        self._store = store
        self._identity = identity
        self._needed = needed
        policy = Policy(lease=calls.policy.lease, ttl=calls.policy.ttl)
        self._calls = replace(calls, scope=f"approval:{calls.scope}", policy=policy, results=results_of(_approver))

    async def check(self, claim: Claim, args: Any, kwargs: Any) -> None:
        """Raise :class:`~idempotency.errors.ApprovalNeededError` unless the call is approved, or needs no approval."""
        if self._is_needed(args, kwargs):
            self._judge(await require(self._store, Inspecting, "approval=").inspect(self._claim(claim).id))

    def check_sync(self, claim: Claim, args: Any, kwargs: Any) -> None:
        """See :meth:`check`."""
        if self._is_needed(args, kwargs):
            self._judge(require(self._store, SyncInspecting, "approval=").inspect_sync(self._claim(claim).id))

    async def approve(self, arguments: Mapping[str, Any], by: str) -> None:
        """Record an approval, unless the call has had its effect: then it would wait for the next one."""

        async def work() -> str:
            return _approver(by)

        call = self._identity.claim(call_of(self.tool), (), dict(arguments))
        if _is_done(await require(self._store, Inspecting, "approve").inspect(call.id)):
            return
        claim = self._claim(call)
        leased = Leased(check_store(self._store, Store), self._calls)
        self._calls.answer(claim, await leased.run(claim, work))

    def approve_sync(self, arguments: Mapping[str, Any], by: str) -> None:
        """See :meth:`approve`."""
        call = self._identity.claim(call_of(self.tool), (), dict(arguments))
        if _is_done(require(self._store, SyncInspecting, "approve_sync").inspect_sync(call.id)):
            return
        claim = self._claim(call)
        leased = SyncLeased(check_store(self._store, SyncStore), self._calls)
        self._calls.answer(claim, leased.run(claim, lambda: _approver(by)))

    def _is_needed(self, args: Any, kwargs: Any) -> bool:
        return self._needed if isinstance(self._needed, bool) else bool(self._needed(*args, **kwargs))

    def _judge(self, entry: Entry | None) -> None:
        if _is_done(entry):
            return
        operation = current()
        if operation is not None:
            operation.release()  # whatever the policy says of errors, nothing has happened
        raise ApprovalNeededError(f"{self._calls.name} needs an approval of this call, with exactly these arguments")

    def _claim(self, claim: Claim) -> Claim:
        return self._calls.claim(f"{claim.id.hex()} {claim.fingerprint.hex()}", None)


def _is_done(entry: Entry | None) -> bool:
    return entry is not None and entry.state is State.DONE


def _approver(by: str) -> str:
    return by

"""The calls of one synchronous tool; see :mod:`idempotency.tool._run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idempotency._engine.calls import Calls, Ended, Raised
from idempotency._rules import Claim
from idempotency.operation import current
from idempotency.tool._answer import answer, is_unknown
from idempotency.tool._approval import Approvals
from idempotency.tool._call import ToolCall, call_of, inside_tool, interrupted_until_answered
from idempotency.tool._identity import Identity
from idempotency.tool._unknown import hold_if_unknown, release_if_interim
from idempotency.tool._verify_sync import SyncVerification


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncTool:
    """What all calls of a synchronous tool share. ``joined``: a failure rolls the effect back."""

    calls: Calls
    run: Callable[..., Ended]
    bind: Callable[..., Callable[..., Any]]
    identity: Identity
    approvals: Approvals
    verification: SyncVerification | None
    joined: bool

    def call(self, args: Any, kwargs: Any) -> Any:
        """See :meth:`Tool.call`."""
        call = call_of(self.calls.scope)
        with interrupted_until_answered(call):
            return self._answer(call, args, kwargs)

    def _answer(self, call: ToolCall, args: Any, kwargs: Any) -> Any:
        claim = self.identity.claim(call, args, kwargs)
        ended = self.run(claim, self._work(call, claim, args, kwargs))
        if is_unknown(ended) and self.verification is not None:
            not_done = self.verification.is_not_done(claim, args, kwargs)
            if not_done and isinstance(ended, Raised):
                raise ended.error
            claim = self.identity.claim(call, args, kwargs)
            ended = self.run(claim, self._work(call, claim, args, kwargs))
        return answer(self.calls, call, claim, ended)

    def _work(self, call: ToolCall, claim: Claim, args: Any, kwargs: Any) -> Callable[..., Any]:
        bound = self.bind(*args, **kwargs)

        def work(*session: Any) -> Any:
            operation = current()
            self.approvals.check_sync(claim, args, kwargs)
            try:
                with inside_tool():
                    value = bound(*session)
            except Exception as error:
                if not release_if_interim(operation, call, error) and operation is not None and not self.joined:
                    hold_if_unknown(operation, self.calls.policy, error)
                raise
            release_if_interim(operation, call, value)
            return value

        return work

"""The calls of one asynchronous tool."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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
from idempotency.tool._verify import Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """What all calls of an asynchronous tool share. ``joined``: a failure rolls the effect back."""

    calls: Calls
    run: Callable[..., Awaitable[Ended]]
    bind: Callable[..., Callable[..., Awaitable[Any]]]
    identity: Identity
    approvals: Approvals
    verification: Verification | None
    joined: bool

    async def call(self, args: Any, kwargs: Any) -> Any:
        """Run the tool once, or answer by its record. An outcome that is unknown is verified first, if it can be."""
        call = call_of(self.calls.scope)
        with interrupted_until_answered(call):
            return await self._answer(call, args, kwargs)

    async def _answer(self, call: ToolCall, args: Any, kwargs: Any) -> Any:
        claim = self.identity.claim(call, args, kwargs)
        ended = await self.run(claim, self._work(call, claim, args, kwargs))
        if is_unknown(ended) and self.verification is not None:
            not_done = await self.verification.is_not_done(claim, args, kwargs)
            if not_done and isinstance(ended, Raised):
                raise ended.error
            claim = self.identity.claim(call, args, kwargs)
            ended = await self.run(claim, self._work(call, claim, args, kwargs))
        return answer(self.calls, call, claim, ended)

    def _work(self, call: ToolCall, claim: Claim, args: Any, kwargs: Any) -> Callable[..., Awaitable[Any]]:
        bound = self.bind(*args, **kwargs)

        async def work(*session: Any) -> Any:
            operation = current()
            await self.approvals.check(claim, args, kwargs)
            try:
                with inside_tool():
                    value = await bound(*session)
            except Exception as error:
                if not release_if_interim(operation, call, error) and operation is not None and not self.joined:
                    hold_if_unknown(operation, self.calls.policy, error)
                raise
            release_if_interim(operation, call, value)
            return value

        return work

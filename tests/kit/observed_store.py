"""A FaultyStore that also notes what only tests of the library itself ask for."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from idempotency._rules import Claim, Record
from idempotency.stores.base import Changed, Store
from idempotency.testing import FaultyStore


class ObservedStore(FaultyStore):
    """``claims`` are the claims in order, ``watches`` and ``closed`` say how often it was watched and closed."""

    def __init__(self, inner: Store | None = None) -> None:
        super().__init__(inner)
        self.claims: list[Claim] = []
        self.watches = 0
        self.closed = 0

    async def claim(self, claim: Claim, /) -> Record:
        self.claims.append(claim)
        return await super().claim(claim)

    def claim_sync(self, claim: Claim, /) -> Record:
        self.claims.append(claim)
        return super().claim_sync(claim)

    def watch(self, claim: Claim, /) -> AbstractAsyncContextManager[Changed]:
        self.watches += 1
        return super().watch(claim)

    async def aclose(self) -> None:
        self.closed += 1
        await super().aclose()

    def close(self) -> None:
        self.closed += 1
        super().close()

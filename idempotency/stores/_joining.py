"""The capability that joined and transactional operations need. Import it from :mod:`idempotency.stores.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from idempotency._rules import Claim, Record, State

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from idempotency._sql.bounded import Abandoned, Watchdog
    from idempotency._synchronization import LocalLock


class Ending(Protocol):
    """What a transaction of the library needs to commit an effect together with what is recorded of it."""

    async def claim_in(self, session: AsyncSession, claim: Claim, *, wait: float) -> Record | None:
        """Claim in the transaction of ``session``; commit nothing.

        If another transaction has the row locked, this waits up to ``wait`` seconds for it. None: the row is still
        locked. After None or an error, the transaction can only be rolled back.
        """
        ...

    def claim_in_sync(self, session: Session, claim: Claim, *, wait: float) -> Record | None:
        """See :meth:`claim_in`."""
        ...

    def complete_in_sync(
        self, session: Session, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """Record the end in the transaction of ``session``; commit nothing. False for a superseded owner."""
        ...

    @property
    def timeout(self) -> float:
        """Return how long a verb may take, in seconds."""
        ...

    @property
    def abandoned(self) -> Abandoned:
        """Return the statements of this store whose callers stopped waiting for them."""
        ...

    @property
    def watchdog(self) -> Watchdog:
        """Return what cuts off statements in threads when their time is over."""
        ...


class Joining(Ending, Protocol):
    """A store that can claim and complete in a transaction of the caller, so that effect and record commit as one."""

    async def look_in(self, session: AsyncSession, claim: Claim) -> Record | None:
        """Return what is committed under a key that is not free for ``claim``, if it can be read without a wait."""
        ...

    def look_in_sync(self, session: Session, claim: Claim) -> Record | None:
        """See :meth:`look_in`."""
        ...

    async def complete_in(
        self, session: AsyncSession, claim: Claim, result: bytes | None, /, state: State = State.DONE
    ) -> bool:
        """See :meth:`complete_in_sync`."""
        ...

    def check_shared(self, engine: object) -> None:
        """Raise ConfigurationError unless sessions on ``engine`` reach the database that holds the records."""
        ...

    @property
    def local_lock(self) -> LocalLock | None:
        """Return the lock that joined transactions take first, if the database has one writer at a time; else None."""
        ...

"""The verification of synchronous tools; see :mod:`idempotency.tool._verify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from idempotency._engine.calls import Calls
from idempotency._engine.leased_sync import SyncLeased
from idempotency._engine.verifying import NOT_DONE
from idempotency._hooks import check_callable
from idempotency._rules import Claim
from idempotency.stores.base import SyncResolving, SyncStore, check_store, require
from idempotency.tool._verify import (
    as_operation_of,
    calls_of_verification,
    check_is_owned,
    claim_of_verification,
    is_not_done,
    result_of_verification,
)


class SyncVerification:
    """The verification of one synchronous tool."""

    def __init__(self, store: object, calls: Calls, verify: Callable[..., Any]) -> None:
        # sync only: what the async half calls is awaited.
        check_callable("verify=", verify)
        self._store = require(store, SyncResolving, "verify=")
        self._calls = calls
        self._verifications = calls_of_verification(calls)
        self._claims = check_store(store, SyncStore)
        self._leased = SyncLeased(self._claims, self._verifications)
        self._verify = verify

    def is_not_done(self, claim: Claim, args: Any, kwargs: Any) -> bool:
        """See :meth:`Verification.is_not_done`."""
        own = claim_of_verification(self._verifications, claim)

        def find_out() -> bool:
            with as_operation_of(self._calls, claim):
                found = self._verify(*args, **kwargs)
            check_is_owned(self._claims.renew_sync(own))
            if found is NOT_DONE:
                self._store.resolve_sync(claim.id, "release")
                return True
            result = result_of_verification(self._calls, found)
            self._store.resolve_sync(claim.id, "done", result, ttl=self._calls.policy.ttl)
            return False

        ended = self._leased.run(own, find_out)
        return is_not_done(self._calls, claim, ended)

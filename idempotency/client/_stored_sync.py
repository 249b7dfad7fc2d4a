"""The key of a named call, in a store that is not awaited."""

from __future__ import annotations

from idempotency._rules import Claim, Execute, InProgress, judge
from idempotency.client._call import Call, Keys, Outgoing, new_key
from idempotency.client._stored import ROUNDS, overtaken, read, write
from idempotency.stores.base import SyncStore


def begin_sync(keys: Keys, store: SyncStore | None, request: Outgoing) -> Call | None:
    """See :func:`idempotency.client._stored.begin`."""
    begun = keys.begin(request)
    if isinstance(begun, Claim):
        assert store is not None
        return keys.begin_stored(request, stored_key_sync(store, begun))
    return begun


def stored_key_sync(store: SyncStore, claim: Claim) -> str:
    """See :func:`idempotency.client._stored.stored_key`."""
    for _ in range(ROUNDS):
        verdict = judge(claim, store.claim_sync(claim))
        if not isinstance(verdict, Execute | InProgress):
            return read(verdict)
        key = new_key()
        if isinstance(verdict, Execute) and store.complete_sync(claim, write(key)):
            return key
    raise overtaken()

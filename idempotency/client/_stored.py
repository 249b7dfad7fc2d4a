"""The key of a named call, in a store: the first process that asks makes it, and every other one gets the same."""

from __future__ import annotations

from idempotency._rules import Claim, Execute, InProgress, Known, Mismatch, Replay, judge
from idempotency.client._call import Call, Keys, Outgoing, new_key
from idempotency.errors import KeyReusedError, StoreError, UnreadableError
from idempotency.stores.base import Store

ROUNDS = 20
"""How often a claim is made again that another process has taken over before the key was recorded."""

_FORMAT = b"client-key:1:"
"""How a recorded key begins; the result of a record is a contract."""


async def begin(keys: Keys, store: Store | None, request: Outgoing) -> Call | None:
    """Set the key of a request and return its call; None if the request has no key.

    Raises what :func:`stored_key` raises, and :class:`~idempotency.errors.ConfigurationError` for a name whose key can
    be neither stored nor derived.
    """
    begun = keys.begin(request)
    if isinstance(begun, Claim):
        assert store is not None
        return keys.begin_stored(request, await stored_key(store, begun))
    return begun


async def stored_key(store: Store, claim: Claim) -> str:
    """Return the key of the name in ``claim``, and record it first if there is none.

    Raises :class:`~idempotency.errors.KeyReusedError` if the name was used for another request,
    :class:`~idempotency.errors.UnreadableError` if the record cannot be read, and
    :class:`~idempotency.errors.StoreError` if the store cannot be reached. Then nothing has been sent.
    """
    for _ in range(ROUNDS):
        verdict = judge(claim, await store.claim(claim))
        if not isinstance(verdict, Execute | InProgress):
            return read(verdict)
        key = new_key()
        if isinstance(verdict, Execute) and await store.complete(claim, write(key)):
            return key
    raise overtaken()


def write(key: str) -> bytes:
    """Write the result of a record."""
    return _FORMAT + key.encode("ascii")


def read(verdict: Known) -> str:
    """Read the key that is recorded; raise the error of any other verdict."""
    if isinstance(verdict, Mismatch):
        raise KeyReusedError("The name of this call was used for a different request; nothing was sent.")
    if isinstance(verdict, Replay) and verdict.result.startswith(_FORMAT):
        return verdict.result.removeprefix(_FORMAT).decode("ascii")
    raise UnreadableError("The record of this name has no key that can be read; nothing was sent.")


def overtaken() -> StoreError:
    """Make the error of a claim that was always taken over."""
    return StoreError("Other processes take over the name of this call all the time; nothing was sent.")

"""The words for the model: what happened, and what to do; never a key or the value of an argument."""

from __future__ import annotations

import pytest

from idempotency import errors
from idempotency.errors import IdempotencyError, InProgressError, RecordedFailureError
from idempotency.stores.memory import MemoryStore
from idempotency.tool import explain, idempotent_tool, is_idempotent_tool, repeats_have_no_effect

SECRET = "order-4711"


def in_progress(seconds: float) -> InProgressError:
    error = InProgressError(SECRET)
    error.retry_after = seconds
    return error


def failed(kind: str) -> RecordedFailureError:
    error = RecordedFailureError(SECRET)
    error.type, error.message = kind, SECRET
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (in_progress(3.0), "Call again in 3 seconds with exactly the same arguments"),
        (errors.OutcomeUnknownError(SECRET), "may have been done, and it is not known whether it was. Do not call it"),
        (errors.KeyReusedError(SECRET), "Nothing was done now. The same action was called before with other arguments"),
        (failed("shop.CardDeclined"), "failed for good (CardDeclined). It is not tried again"),
        (failed(""), "failed for good (an error)"),
        (errors.NotReplayableError(SECRET), "is done, and was done once. Its result was not recorded"),
        (errors.UnreadableError(SECRET), "its record cannot be read. It may have been done"),
        (errors.StoreError(SECRET), "Call again later with exactly the same arguments: it is not done twice"),
        (errors.WaitFailedError(SECRET), "Call again later"),
        (errors.StoreRefusedError(SECRET), "Nothing was done: the record of this call is refused. Do not call again"),
        (errors.KeyMissingError(SECRET), "Nothing was done: the call has no idempotency key"),
        (errors.KeyInvalidError(SECRET), "Nothing was done: the idempotency key of this call is malformed"),
        (errors.ApprovalNeededError(SECRET), "Nothing was done: this call needs the approval of a person"),
        (errors.ConfigurationError(SECRET), "Do not call again; report it to a person"),
        (errors.TransactionError(SECRET), "Do not call again; report it to a person"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, IdempotencyError) else "",
)
def test_an_error_says_what_happened_and_what_to_do(error: IdempotencyError, words: str) -> None:
    assert words in explain(error)
    assert SECRET not in explain(error)


def test_an_adapter_finds_the_tools() -> None:
    """Through another decorator, and as a method too."""

    class Desk:
        @idempotent_tool(MemoryStore(), name="desk", ignore=("self",), intent=("order_id",))
        async def refund(self, order_id: str) -> str:
            return order_id

    @idempotent_tool(MemoryStore())
    async def remind(order_id: str) -> str:
        return order_id

    assert is_idempotent_tool(remind)
    assert is_idempotent_tool(Desk().refund)
    assert not is_idempotent_tool(remind.__wrapped__)  # type: ignore[attr-defined]
    assert repeats_have_no_effect(Desk().refund)
    assert not repeats_have_no_effect(remind)

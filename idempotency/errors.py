"""The errors of this library. Each has its HTTP status, its title, and whether a retry may help.

Change the answer to a duplicate or to a bad request here: ``status``, ``title``, ``code``, ``retryable`` and
``safe_new_key`` are attributes of the class, and :mod:`idempotency._http.problem` only writes them down. There is no
logic in this file; the times of an error in progress are those of :mod:`idempotency._rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from idempotency._rules import InProgress, pause


class IdempotencyError(Exception):
    """The base of every error of this library.

    ``code``: the stable name to branch on. ``status``: the HTTP status. ``title``: the title of the problem document.
    ``retryable``: whether the same request may succeed later. ``safe_new_key``: whether the request can be sent with a
    new key without repeating an effect.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Idempotency error"
    retryable: ClassVar[bool] = False
    safe_new_key: ClassVar[bool] = False


class ConfigurationError(IdempotencyError, ValueError):
    """An option, URL or installation is wrong; raised before anything runs."""

    code = "configuration"
    title = "Idempotency is not configured correctly"


class UnknownOptionError(ConfigurationError, TypeError):
    """An option does not exist. It is a TypeError too, as Python raises for an unknown argument."""


class KeyMissingError(IdempotencyError):
    """The operation requires an idempotency key and the request has none (draft section 2.7)."""

    code = "key-missing"
    status = 400
    title = "Idempotency-Key is missing"
    safe_new_key = True


class KeyInvalidError(IdempotencyError):
    """The idempotency key cannot be read, is empty, too long, or was sent twice (RFC 9651 section 4.2)."""

    code = "key-invalid"
    status = 400
    title = "Idempotency-Key is malformed"
    safe_new_key = True


class RequestTooLargeError(IdempotencyError):
    """The body of a keyed request is over ``Policy.max_request`` bytes."""

    code = "request-too-large"
    status = 413
    title = "The request body is too large for an idempotent request"
    safe_new_key = True


class BodyInvalidError(IdempotencyError):
    """The callable ``Policy.fingerprint`` cannot parse the body of a keyed request."""

    code = "body-invalid"
    status = 400
    title = "The request body is malformed"
    safe_new_key = True


class CallerUnknownError(IdempotencyError):
    """A keyed request has credentials that ``scope=`` does not know, and ``unknown_credentials="refuse"``."""

    code = "caller-unknown"
    status = 500
    title = "The caller of this idempotent request cannot be named"


class WebhookUnverifiedError(IdempotencyError):
    """A webhook is not signed with a secret of its sender, or its timestamp is too far from now."""

    code = "webhook-unverified"
    status = 401
    title = "The webhook cannot be verified"
    safe_new_key = True


class WebhookMalformedError(WebhookUnverifiedError):
    """A webhook has no ``webhook-id``, ``webhook-timestamp`` or ``webhook-signature``, or one that is malformed."""

    code = "webhook-malformed"
    status = 400
    title = "The headers of the webhook are missing or malformed"


class InProgressError(IdempotencyError):
    """Another request with this key is still running (draft section 2.7).

    ``retry_after``: seconds after which to ask again: 1 at first, growing with the time that the operation has taken,
    at most 5. ``lease_left``: seconds until its lease ends, unless its owner renews it.
    """

    retry_after: float = 1.0
    lease_left: float = 0.0
    code = "in-progress"
    status = 409
    title = "A request with this Idempotency-Key is in progress"
    retryable = True

    @classmethod
    def of(cls, running: InProgress) -> InProgressError:
        """Make the error of a verdict, with its times."""
        error = cls(f"The operation is in progress; try again in {pause(running):.3g} s.")
        error.retry_after, error.lease_left = pause(running), running.retry_after
        return error


class KeyReusedError(IdempotencyError):
    """The key was used before for a different request (draft section 2.7)."""

    code = "key-reused"
    status = 422
    title = "This Idempotency-Key was used for a different request"


class OutcomeUnknownError(IdempotencyError):
    """The operation began, and how it ended is not known. It is not repeated until an operator resolves the key."""

    code = "outcome-unknown"
    status = 409
    title = "The outcome of the request with this Idempotency-Key is unknown"


class NotReplayableError(IdempotencyError):
    """The operation is completed, but its result was too large or streamed, and was not recorded."""

    code = "completed-not-replayable"
    status = 409
    title = "The request with this Idempotency-Key is completed; its response was not recorded"


class RecordedFailureError(IdempotencyError):
    """The operation failed, and by policy its failure is the recorded result. The text names the exception's class.

    Branch on ``type``, the name of the class, such as ``"shop.CardDeclined"`` or ``"ValueError"``: the class itself may
    not exist any more, so the exception is not raised again. ``message`` is its text, ``arguments`` its ``args``, and
    ``attributes`` its attributes without a leading underscore. They are empty where they were not JSON values, or over
    16 KiB in all. A record of an earlier format has the ``type`` only.
    """

    type: str = ""
    message: str = ""
    arguments: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})
    code = "recorded-failure"
    title = "The operation with this Idempotency-Key failed; the failure is recorded"


class UnreadableError(IdempotencyError):
    """The record under the key is damaged, of a newer format, or encrypted with another key; nothing is repeated."""

    code = "record-unreadable"
    status = 500
    title = "The record of this Idempotency-Key cannot be read"


class StoreError(IdempotencyError):
    """The store cannot be reached, refused, or gave no answer in time."""

    code = "store-unavailable"
    status = 503
    title = "The idempotency store is unavailable"
    retryable = True


class SchemaMissingError(StoreError):
    """The database of the store has no table for the records, or one without a column; the text says how to add it."""


class StoreRefusedError(StoreError):
    """The store refused to write a record, and will refuse it again: retries do not help."""

    code = "store-refused"
    status = 500
    title = "The idempotency store refuses to record this operation"
    retryable = False


class WaitFailedError(StoreError):
    """The store failed while a duplicate waited: another owner is known to run the operation."""


class EmitRefusedError(IdempotencyError, ValueError):
    """A message cannot be written to the outbox, or its broker cannot carry it; nothing is written."""

    code = "emit-refused"
    title = "A message of this operation is refused"


class ApprovalNeededError(IdempotencyError):
    """A call of a tool needs an approval, and nobody has approved it with exactly these arguments; nothing ran."""

    code = "approval-needed"
    status = 403
    title = "The call needs an approval"
    safe_new_key = True


class TransactionError(IdempotencyError):
    """The operation committed or closed the session that is committed with its record, or used it too late."""

    code = "transaction"
    title = "The session is committed with the idempotency record"

"""The errors of projections."""

from __future__ import annotations

from idempotency.errors import IdempotencyError


class ProjectionStoppedError(IdempotencyError):
    """A projection stands still until an operator decides: an event has failed too often, or the version is dropped.

    ``position``: that of the event, as text, or empty; ``error``: the class of its failure; ``attempts``: how often it
    was tried alone. ``dropped``: the version has ended, and no operator can resume it.
    """

    code = "projection-stopped"
    title = "The projection has stopped at an event"
    position: str = ""
    error: str = ""
    attempts: int = 0
    dropped: bool = False


class ProjectionBehindError(IdempotencyError):
    """A projection is not where it has to be yet; try again later."""

    code = "projection-behind"
    status = 503
    title = "The data to read is not up to date yet"
    retryable = True
    safe_new_key = True


class SyncTokenInvalidError(IdempotencyError):
    """The field ``Sync-Token`` of a request is not what this library has sent."""

    code = "sync-token-invalid"
    status = 400
    title = "Sync-Token is malformed"
    safe_new_key = True

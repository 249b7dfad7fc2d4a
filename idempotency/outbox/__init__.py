"""The transactional outbox: what is emitted in a transaction commits with it, and a relay publishes it."""

from idempotency._outbox.limits import Limits
from idempotency._outbox.message import Message
from idempotency.outbox.publisher import Duplicate, Outcome, Publisher, Refused, RetryLater, Sent

__all__ = ["Duplicate", "Limits", "Message", "Outcome", "Publisher", "Refused", "RetryLater", "Sent"]

"""Make retried requests, redelivered messages and repeated calls take effect once."""

from idempotency.policy import Policy

__all__ = ["Policy"]

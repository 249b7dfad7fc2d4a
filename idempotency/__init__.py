"""Make retried requests, redelivered messages and repeated calls take effect once."""

from idempotency.asgi import IdempotencyMiddleware
from idempotency.errors import IdempotencyError
from idempotency.operation import Operation, current
from idempotency.policy import Policy
from idempotency.stores import open_store

__all__ = ["IdempotencyError", "IdempotencyMiddleware", "Operation", "Policy", "current", "open_store"]

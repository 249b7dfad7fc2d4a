"""Make retried requests, redelivered messages and repeated calls take effect once."""

from idempotency.asgi import IdempotencyMiddleware
from idempotency.consumer import idempotent_consumer
from idempotency.errors import IdempotencyError
from idempotency.function import idempotent
from idempotency.operation import Operation, current
from idempotency.policy import Policy
from idempotency.stores import open_store

__all__ = [
    "IdempotencyError",
    "IdempotencyMiddleware",
    "Operation",
    "Policy",
    "current",
    "idempotent",
    "idempotent_consumer",
    "open_store",
]

"""Make retried requests, redelivered messages and repeated calls take effect once."""

from idempotency._engine.background import drain, drain_sync
from idempotency._http.codec import encode_response
from idempotency._http.problem import Problem
from idempotency._http.profile import Profile
from idempotency.asgi import IdempotencyMiddleware
from idempotency.consumer import idempotent_consumer
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError
from idempotency.events import Event
from idempotency.function import idempotent
from idempotency.operation import Operation, current
from idempotency.policy import Policy
from idempotency.stores import open_store

__all__ = [
    "ConfigurationError",
    "Event",
    "IdempotencyError",
    "IdempotencyMiddleware",
    "Operation",
    "Policy",
    "Problem",
    "Profile",
    "StoreError",
    "current",
    "drain",
    "drain_sync",
    "encode_response",
    "idempotent",
    "idempotent_consumer",
    "open_store",
]

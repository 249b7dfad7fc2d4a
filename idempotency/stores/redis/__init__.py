"""Records in Redis: one server, Sentinel or Cluster, Redis 6.2 and later, one command a verb."""

from idempotency.stores.redis._store import RedisStore
from idempotency.stores.redis._wire import Durability

__all__ = ["Durability", "RedisStore"]

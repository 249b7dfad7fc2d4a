"""Projections: what is read is made of events, each applied once, and can be made anew beside what is read."""

from __future__ import annotations

from idempotency.projections._async import AsyncProjection
from idempotency.projections._checkpoint import (
    checkpoint,
    checkpoint_sync,
    checkpoints,
    checkpoints_sync,
    create_projections_schema,
    create_projections_schema_sync,
)
from idempotency.projections._projection import projection
from idempotency.projections._sync_token import SyncTokenMiddleware, sync_token
from idempotency.projections._table import projections_sql, projections_table
from idempotency.projections._worker import SyncProjection
from idempotency.projections.errors import ProjectionBehindError, ProjectionStoppedError, SyncTokenInvalidError
from idempotency.projections.events import ProjectionEvent

__all__ = [
    "AsyncProjection",
    "ProjectionBehindError",
    "ProjectionEvent",
    "ProjectionStoppedError",
    "SyncProjection",
    "SyncTokenInvalidError",
    "SyncTokenMiddleware",
    "checkpoint",
    "checkpoint_sync",
    "checkpoints",
    "checkpoints_sync",
    "create_projections_schema",
    "create_projections_schema_sync",
    "projection",
    "projections_sql",
    "projections_table",
    "sync_token",
]

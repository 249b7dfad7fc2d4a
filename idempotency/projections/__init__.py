"""Projections: what is read is made of events, each applied once, and can be made anew beside what is read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency.projections.errors import ProjectionBehindError, ProjectionStoppedError, SyncTokenInvalidError
from idempotency.projections.events import ProjectionEvent

if TYPE_CHECKING:
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

# What needs SQLAlchemy is imported at its first use.
_LAZY = {
    "AsyncProjection": "_async",
    "SyncProjection": "_worker",
    "SyncTokenMiddleware": "_sync_token",
    "checkpoint": "_checkpoint",
    "checkpoint_sync": "_checkpoint",
    "checkpoints": "_checkpoint",
    "checkpoints_sync": "_checkpoint",
    "create_projections_schema": "_checkpoint",
    "create_projections_schema_sync": "_checkpoint",
    "projection": "_projection",
    "projections_sql": "_table",
    "projections_table": "_table",
    "sync_token": "_sync_token",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)

"""Sagas: many effects, gone on with after any crash, and undone when one fails."""

from __future__ import annotations

from idempotency._engine.verifying import NOT_DONE
from idempotency.saga._facts import SagaDetail, SagaFact
from idempotency.saga._front import (
    hold,
    hold_sync,
    patched,
    patched_sync,
    sleep,
    sleep_sync,
    step,
    step_sync,
    wait_for,
    wait_for_sync,
)
from idempotency.saga._operate import SagaOperations, SagaStats
from idempotency.saga._saga import AsyncSaga, SyncSaga, saga
from idempotency.saga._status import SagaAnswer, SagaStatus
from idempotency.saga._sweeper import Sweeper
from idempotency.saga._view import SagaView
from idempotency.saga.errors import (
    CancelledByOperatorError,
    DeadlineError,
    HeldError,
    SagaEndedError,
    SagaError,
    SagaFailedError,
    SagaLostError,
    SagaPendingError,
    SagaStuckError,
    SignalTimeoutError,
    StepFailedError,
)
from idempotency.saga.events import SagaEvent
from idempotency.saga.options import Retry

__all__ = [
    "NOT_DONE",
    "AsyncSaga",
    "CancelledByOperatorError",
    "DeadlineError",
    "HeldError",
    "Retry",
    "SagaAnswer",
    "SagaDetail",
    "SagaEndedError",
    "SagaError",
    "SagaEvent",
    "SagaFact",
    "SagaFailedError",
    "SagaLostError",
    "SagaOperations",
    "SagaPendingError",
    "SagaStats",
    "SagaStatus",
    "SagaStuckError",
    "SagaView",
    "SignalTimeoutError",
    "StepFailedError",
    "Sweeper",
    "SyncSaga",
    "hold",
    "hold_sync",
    "patched",
    "patched_sync",
    "saga",
    "sleep",
    "sleep_sync",
    "step",
    "step_sync",
    "wait_for",
    "wait_for_sync",
]

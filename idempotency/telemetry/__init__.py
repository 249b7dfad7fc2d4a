"""Metrics and traces of operations, outboxes and sagas.

:class:`idempotency.telemetry.opentelemetry.OpenTelemetry` and :class:`idempotency.telemetry.prometheus.Prometheus` are
hooks for ``on_event=``. :class:`Watch` looks at a store, an outbox and sagas for their gauges.
"""

from idempotency.telemetry._watch import Watch as Watch

__all__ = ["Watch"]

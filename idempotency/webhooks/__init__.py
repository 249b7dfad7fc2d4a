"""Webhooks as Standard Webhooks 1.0 defines them: sign and verify, and receive each once in effect.

:class:`~idempotency.outbox.publishers.webhooks.WebhookPublisher` sends them from the outbox.
"""

from idempotency.webhooks.endpoint import Endpoint
from idempotency.webhooks.receiver import WEBHOOKS, WebhookReceiver
from idempotency.webhooks.schedule import standard_webhooks_schedule
from idempotency.webhooks.signature import Webhook, sign, verify

__all__ = ["WEBHOOKS", "Endpoint", "Webhook", "WebhookReceiver", "sign", "standard_webhooks_schedule", "verify"]

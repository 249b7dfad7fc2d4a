"""Describe the idempotency of an API in its OpenAPI document, by the policies of the middleware that protects it.

:func:`document` makes an application of FastAPI or Litestar serve such a document; :func:`describe` adds the same to
any OpenAPI document.
"""

from idempotency.openapi._applications import document
from idempotency.openapi._describe import Protecting, describe
from idempotency.openapi._vendors import Vendor

__all__ = ["Protecting", "Vendor", "describe", "document"]

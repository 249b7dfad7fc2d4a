"""Describe the idempotency of an API in its OpenAPI document."""

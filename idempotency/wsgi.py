"""Idempotency keys for any WSGI application."""

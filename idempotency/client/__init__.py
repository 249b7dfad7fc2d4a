"""Send one idempotency key with each logical call, and keep it over retries."""

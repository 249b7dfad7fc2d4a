"""Publishers of the outbox: one module for each broker, made directly or by URL."""

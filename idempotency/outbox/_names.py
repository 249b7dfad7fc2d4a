"""The names of what a relay creates on the server, by the name of its table."""

from __future__ import annotations

from idempotency._outbox.table import Tables


def slot_of(tables: Tables) -> str:
    """Return the name of the slot by default. Slots belong to a server, so another database needs another name."""
    return f"idempotency_{tables.messages.name.lower()}"


def publication_of(tables: Tables) -> str:
    """Return the name of the publication by default."""
    return f"idempotency_{tables.messages.name}"

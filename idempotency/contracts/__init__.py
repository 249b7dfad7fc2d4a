"""What is stored or sent is a contract: check how it changes, fill it back, and compare old and new."""

from __future__ import annotations

from idempotency.contracts._contracts import Contract, Contracts
from idempotency.contracts._file import Broken, Checked, check
from idempotency.contracts._rules import Change

__all__ = ["Broken", "Change", "Checked", "Contract", "Contracts", "check"]

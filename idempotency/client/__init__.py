"""Send one idempotency key with each logical call, and the same key with each retry of it.

:class:`IdempotentTransport` and :class:`AsyncIdempotentTransport` are for httpx, and need
``asgi-idempotency[client]``; :class:`IdempotentAdapter` and :func:`call_of` are for requests, and need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from idempotency.client._call import Call, call
from idempotency.client.options import Retry
from idempotency.errors import ConfigurationError

if TYPE_CHECKING:
    from idempotency.client._httpx import AsyncIdempotentTransport
    from idempotency.client._httpx_sync import IdempotentTransport
    from idempotency.client._requests import IdempotentAdapter, call_of

__all__ = [
    "AsyncIdempotentTransport",
    "Call",
    "IdempotentAdapter",
    "IdempotentTransport",
    "Retry",
    "call",
    "call_of",
]

# What needs a client library is imported at its first use.
_LAZY = {
    "AsyncIdempotentTransport": ("idempotency.client._httpx", "httpx", "asgi-idempotency[client]"),
    "IdempotentAdapter": ("idempotency.client._requests", "requests", "requests"),
    "IdempotentTransport": ("idempotency.client._httpx_sync", "httpx", "asgi-idempotency[client]"),
    "call_of": ("idempotency.client._requests", "requests", "requests"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, library, requirement = _LAZY[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigurationError(
            f"{name} needs {library}, which is not installed: pip install '{requirement}'"
        ) from error

"""Extensions of the document for generators of SDKs."""

from __future__ import annotations

from typing import Literal, assert_never, get_args

from idempotency.errors import ConfigurationError, StoreError
from idempotency.openapi._components import Json
from idempotency.policy import Policy

Vendor = Literal["fern", "speakeasy"]
"""A generator of SDKs whose extensions are written."""

_PATIENCE = 60_000
"""Milliseconds for which an SDK retries, at the most."""


def check_vendors(vendors: object) -> frozenset[Vendor]:
    """Return the names as a set.

    Raises :class:`~idempotency.errors.ConfigurationError` for a name that is not known, and for a text.
    """
    if isinstance(vendors, str) or not isinstance(vendors, list | tuple | set | frozenset):
        raise ConfigurationError(f'vendors must be a collection such as {{"fern"}}, not {vendors!r}')
    for vendor in vendors:
        if vendor not in get_args(Vendor):
            raise ConfigurationError(f"vendors takes {' and '.join(get_args(Vendor))}, not {vendor!r}")
    return frozenset(vendors)


def extend(document: Json, operation: Json, policy: Policy, header: str, vendors: frozenset[Vendor]) -> None:
    """Add the extensions for a protected operation. What the document has already stays."""
    for vendor in sorted(vendors):
        match vendor:
            case "fern":
                headers = document.setdefault("x-fern-idempotency-headers", [])
                if not any(str(each.get("header")).lower() == header.lower() for each in headers):
                    headers.append({"header": header, "name": header.lower().replace("-", "_")})
                operation.setdefault("x-fern-idempotent", True)
            case "speakeasy":
                # A request without a key must not be sent twice.
                if policy.required:
                    operation.setdefault("x-speakeasy-retries", _speakeasy_retries(policy))
            case _:
                assert_never(vendor)


def _speakeasy_retries(policy: Policy) -> Json:
    statuses = sorted({policy.in_progress_status, StoreError.status})
    return {
        "strategy": "backoff",
        "backoff": {
            "initialInterval": 1000,
            "maxInterval": 5000,
            # After its lifetime a key is new, and a retry would repeat the effect.
            "maxElapsedTime": min(_PATIENCE, int(policy.ttl * 1000)),
            "exponent": 1.5,
        },
        "statusCodes": [str(status) for status in statuses],
        "retryConnectionErrors": True,
    }

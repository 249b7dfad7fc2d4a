"""Sign and verify webhooks, as Standard Webhooks 1.0 says. Nothing here does I/O, and both work in any framework."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from idempotency.errors import WebhookMalformedError, WebhookUnverifiedError
from idempotency.webhooks._secrets import Signer, Verifier, signers, verifiers

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"

TOLERANCE = 300.0
"""Seconds between the clocks of sender and receiver, in both directions."""

Headers = Mapping[str, str] | Sequence[tuple[str | bytes, str | bytes]]
"""The headers of a framework, or the raw pairs of ASGI."""

# What an unquoted idempotency key may be, without the full stop: with one, other parts could give the signed text.
_ID = re.compile(rb"[!#-+\-/-~]{1,255}")
_TIMESTAMP = re.compile(rb"[0-9]{1,12}")

_MOST_SIGNATURES = 20
"""Anybody may send signatures, and each costs time."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook that was verified.

    ``id``: what the sender calls it at every attempt. ``timestamp``: the seconds since the epoch of this attempt.
    """

    id: str
    timestamp: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """What the headers of a webhook say, before its body is read. Nothing of it is verified."""

    id: bytes
    timestamp: bytes
    signatures: Sequence[bytes]

    def verify(self, body: bytes, secrets: Iterable[Verifier]) -> Webhook:
        """Verify the signatures.

        Raises :class:`~idempotency.errors.WebhookUnverifiedError` if no secret made any of them.
        """
        content = b".".join((self.id, self.timestamp, body))
        if not any(secret.accepts(content, self.signatures) for secret in secrets):
            raise WebhookUnverifiedError("No signature is that of a secret of this sender.")
        return Webhook(self.id.decode(), int(self.timestamp))


def sign(webhook_id: str, body: bytes, secrets: Sequence[str], *, timestamp: float | None = None) -> dict[str, str]:
    """Return the headers of one attempt to send ``body``, signed with each of ``secrets``.

    ``webhook_id``: the same at every attempt; visible ASCII without ``"``, ``,`` and ``.``, at most 255 characters.
    ``secrets``: ``whsec_`` (24 to 64 bytes in base64) or ``whsk_`` (ed25519). While you rotate, give the old and the
    new one. ``timestamp``: seconds since the epoch, rounded down. Default: now.

    Raises :class:`~idempotency.errors.ConfigurationError` for a secret that cannot be used, and ValueError for an id.
    """
    return signed_headers(webhook_id, body, signers(secrets), time.time() if timestamp is None else timestamp)


def signed_headers(webhook_id: str, body: bytes, secrets: Iterable[Signer], timestamp: float) -> dict[str, str]:
    """Return the headers of one attempt, as :func:`sign` does, for secrets that were read before."""
    name = _bytes(webhook_id)
    if not _ID.fullmatch(name):
        raise ValueError('the id of a webhook is 1 to 255 visible ASCII characters without ", comma and full stop')
    seconds = str(int(timestamp))
    content = b".".join((name, seconds.encode(), body))
    return {ID: webhook_id, TIMESTAMP: seconds, SIGNATURE: " ".join(secret.sign(content) for secret in secrets)}


def verify(
    headers: Headers,
    body: bytes,
    secrets: Sequence[str],
    *,
    now: float | None = None,
    tolerance: float = TOLERANCE,
) -> Webhook:
    """Verify a webhook, and return its id, which is the key of its operation.

    ``headers``: a mapping, as ``request.headers`` of a framework, or pairs. ``body``: the bytes as they were received,
    not what was parsed and written again. ``secrets``: ``whsec_``, or ``whpk_`` (ed25519); any one is enough, so that
    the sender can rotate. ``now``: seconds since the epoch, default the clock of this machine. ``tolerance``: by how
    many seconds the timestamp may differ from it. Default 300.

    Raises :class:`~idempotency.errors.WebhookMalformedError` (status 400) if a header is missing or malformed,
    :class:`~idempotency.errors.WebhookUnverifiedError` (401), of which it is a subclass, if no signature is right or
    the timestamp is not near, and :class:`~idempotency.errors.ConfigurationError` for a secret that cannot be used.
    """
    known = verifiers(secrets)
    return read_claimed(headers, now=now, tolerance=tolerance).verify(body, known)


def read_claimed(headers: Headers, *, now: float | None, tolerance: float) -> Claimed:
    """Read the headers of a webhook, and compare its timestamp with ``now``; raise as :func:`verify` does."""
    fields = _read_fields(headers)
    timestamp, signatures = fields[TIMESTAMP], fields[SIGNATURE].split()
    if not _ID.fullmatch(fields[ID]):
        raise WebhookMalformedError(f"The header {ID} is empty, too long, or has characters that an id cannot have.")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise WebhookMalformedError(f"The header {TIMESTAMP} is not a whole number of seconds.")
    if not 0 < len(signatures) <= _MOST_SIGNATURES:
        raise WebhookMalformedError(f"The header {SIGNATURE} has no signature, or more than {_MOST_SIGNATURES}.")
    if abs((time.time() if now is None else now) - int(timestamp)) > tolerance:
        raise WebhookUnverifiedError(f"The header {TIMESTAMP} is more than {tolerance:g} seconds from now.")
    return Claimed(fields[ID], timestamp, signatures)


def _read_fields(headers: Headers) -> dict[str, bytes]:
    fields: dict[str, bytes] = {}
    for field, value in _pairs(headers):
        name = (field if isinstance(field, str) else field.decode("latin-1")).lower()
        if name in (ID, TIMESTAMP, SIGNATURE):
            if name in fields:
                raise WebhookMalformedError(f"The header {name} was sent more than once.")
            fields[name] = _bytes(value).strip(b" \t")
    for name in (ID, TIMESTAMP, SIGNATURE):
        if name not in fields:
            raise WebhookMalformedError(f"The header {name} is missing.")
    return fields


def _pairs(headers: Headers) -> Iterable[tuple[str | bytes, str | bytes]]:
    if not isinstance(headers, Mapping):
        return headers
    items: Iterable[tuple[str, str]] = headers.items()
    return items


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text

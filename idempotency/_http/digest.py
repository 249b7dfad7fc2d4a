"""Digest parts of a request. The format is stored: changing it makes records mismatch."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


def digest(domain: bytes, parts: Iterable[bytes], secret: bytes | None) -> bytes:
    """Digest ``parts`` to 32 bytes: SHA-256, or HMAC-SHA256 with a ``secret``. ``domain`` is one for each use."""
    return digest_text(domain + join(parts), secret)


def digest_text(text: bytes, secret: bytes | None) -> bytes:
    """Digest a text that begins with its domain, and in which parts are joined as :func:`join` does."""
    if secret:
        return hmac.digest(secret, text, "sha256")
    return hashlib.sha256(text).digest()


def join(parts: Iterable[bytes]) -> bytes:
    """Join parts. Each comes after its length, so that two lists of parts never give the same text."""
    return b"".join([b"%d:%b" % (len(part), part) for part in parts])

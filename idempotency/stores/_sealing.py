"""Seal what a record holds of its users: encrypt results, scopes and keys, or store digests of scopes and keys.

A store without these options has no :class:`Sealing`, None, and then writes everything as it is. What it reads may
have been sealed by another process. So each function that reads also accepts None.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from idempotency._rules import Claim, Record
from idempotency.errors import ConfigurationError, StoreError, UnreadableError
from idempotency.stores._shown import shortened
from idempotency.stores.base import Entry, Finding
from idempotency.stores.encryption import MAGIC, OVERHEAD, Encryption, Name, digested

_ENCRYPTED = "(encrypted: "
_KEYED = b"hmac-sha256:"
LOOKED_AT = 100
"""How many records doctor tries to read."""

# The library writes these words before what the user named; they stay readable, because they say what a record is for.
_SURFACE = re.compile(rb"(?:(?:http|function|consumer|begun|busy|failed):1:)*")


class Find(Protocol):
    """:meth:`~idempotency.stores.base.Searching.find`, as far as it is called here."""

    async def __call__(self, *, limit: int) -> list[Entry]: ...


class Sealing:
    """How one store seals what it writes. ``digest_names``: scopes and keys are stored as digests only.

    ``encryption`` decrypts; ``writer`` is the same if it encrypts too, else None.
    """

    __slots__ = ("digest_names", "encryption", "writer")

    def __init__(self, encryption: Encryption | None, digest_names: bool) -> None:
        self.encryption = encryption
        self.writer = encryption if encryption is not None and encryption.writes else None
        self.digest_names = digest_names

    def names(self, claim: Claim) -> tuple[bytes, bytes]:
        """Return the scope and the key of a claim as its record holds them."""
        if self.digest_names:
            whole = _bytes(claim.scope)
            return _surface(whole) + self._digest("scope", whole), self._digest("key", _bytes(claim.key))
        scope, key = _bytes(shortened(claim.scope)), _bytes(shortened(claim.key))
        if self.writer is None:
            return scope, key
        # One envelope for both, in place of the key, since a message costs more than its length: each claim has one.
        return MAGIC, self.writer.encrypt(claim.id, "names", b"%d:%b%b" % (len(scope), scope, key))

    def _digest(self, name: Name, text: bytes) -> bytes:
        return _digests(self.writer, name, text)[0].encode()


def sealing_of(encryption: Encryption | None, digest_names: bool) -> Sealing | None:
    """Return how a store with these options seals; None where it does not.

    Raises :class:`~idempotency.errors.ConfigurationError` for an option of another type.
    """
    if encryption is not None and not isinstance(encryption, Encryption):
        raise ConfigurationError(f"encryption must be an Encryption(key), not {type(encryption).__name__}")
    if not isinstance(digest_names, bool):
        raise ConfigurationError(f"digest_names must be True or False, not {digest_names!r}")
    return Sealing(encryption, digest_names) if encryption is not None or digest_names else None


def sealed_result(sealing: Sealing | None, record: bytes, result: bytes | None) -> bytes | None:
    """Return a result as the record of this id holds it."""
    return None if result is None else sealed_field(sealing, record, "result", result)


def sealed_field(sealing: Sealing | None, record: bytes, field: str, value: bytes) -> bytes:
    """Return the value of a field as the record, or saga, of this id holds it."""
    if sealing is None or sealing.writer is None:
        return value
    return sealing.writer.encrypt(record, field, bytes(value))


def opened_result(sealing: Sealing | None, record: bytes, stored: bytes | None) -> bytes | None:
    """Return a result as it was given to :func:`sealed_result`; see :func:`opened_field`."""
    return None if stored is None else opened_field(sealing, record, "result", stored)


def opened_field(sealing: Sealing | None, record: bytes, field: str, stored: bytes) -> bytes:
    """Return the value of a field as it was given to :func:`sealed_field`, or recorded without encryption.

    Raises :class:`~idempotency.errors.UnreadableError` for one that cannot be decrypted.
    """
    encryption = None if sealing is None else sealing.encryption
    if encryption is None:
        if stored.startswith(MAGIC):
            raise UnreadableError("it is encrypted, and the store has no encryption=")
        return stored
    return encryption.decrypt(record, field, stored) if encryption.is_envelope(stored) else stored


def shown(sealing: Sealing | None, record: bytes, scope: bytes, key: bytes) -> tuple[str, str]:
    """Return scope and key as an operator sees them: as they were given, digests, or why they are not decrypted."""
    # Either one shows that the other was changed.
    if scope.startswith(MAGIC) or key.startswith(MAGIC):
        encryption = None if sealing is None else sealing.encryption
        if encryption is None:
            return _not_shown(f"give the key {key[4:8].hex()}")
        try:
            length, _, names = encryption.decrypt(record, "names", key).partition(b":")
        except UnreadableError as error:
            return _not_shown(str(error))
        scope, key = names[: int(length)], names[int(length) :]
    return readable_text(scope), readable_text(key)


def readable_text(name: bytes) -> str:
    """Read a text that was stored with surrogates; a damaged one too."""
    try:
        return name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return name.decode("utf-8", "replace")  # it is damaged: what counts is in the rest of the record


def _not_shown(why: str) -> tuple[str, str]:
    text = f"{_ENCRYPTED}{why})"
    return text, text


def shown_size(scope: bytes, stored: int | None) -> int | None:
    """Return the size of a result without its envelope, given the scope of its record: one owner writes both."""
    encrypted = scope.startswith(MAGIC) or _is_keyed(scope)
    return max(0, stored - OVERHEAD) if encrypted and stored is not None else stored


def opened(sealing: Sealing, record: bytes, found: Record) -> Record:
    """Return a record with its :func:`opened_result`; one that cannot be decrypted is unreadable."""
    try:
        return replace(found, result=opened_result(sealing, record, found.result))
    except UnreadableError:
        return Record.unreadable(found.version)


def shown_of(
    sealing: Sealing | None, record: bytes, names: tuple[str, str] | tuple[bytes, bytes], result: bytes | None
) -> tuple[str, str, int | None]:
    """Return the scope and the key that an operator sees, and the size of the result; names are bytes if sealed."""
    scope, key = names
    size = None if result is None else len(result)
    if isinstance(scope, str) or isinstance(key, str):
        return shortened(str(scope)), shortened(str(key)), size
    return *shown(sealing, record, scope, key), shown_size(scope, size)


def cannot_be_shown(entry: Entry) -> bool:
    """Return whether the scope of a record is encrypted, and was not decrypted."""
    return entry.scope.startswith(_ENCRYPTED)


def needs_key(entry: Entry, given: bool) -> bool:
    """Return whether a record needs an encryption key that is not known; ``given``: whether there are any keys.

    A keyed digest does not say which key it needs.
    """
    return cannot_be_shown(entry) or (not given and _is_keyed(_bytes(entry.scope)))


def forms_of_key(sealing: Sealing | None, key: str) -> frozenset[str]:
    """Return what entries may show for a key: itself, and its digests."""
    return frozenset({shortened(key), *_all_digests(sealing, _bytes(key))})


async def findings_in(sealing: Sealing | None, find: Find) -> list[Finding]:
    """Return what an operator should know of the encryption of a store, given its ``find``."""
    try:
        looked_at = await find(limit=LOOKED_AT)
    except (StoreError, UnreadableError) as error:
        unread = Finding("note", f"whether records need another encryption key is not known: {error}")
        return [*findings(sealing, ()), unread]
    return findings(sealing, looked_at)


def findings(sealing: Sealing | None, looked_at: Iterable[Entry]) -> list[Finding]:
    """Return what an operator should know of the encryption, given some records of the store."""
    encryption = None if sealing is None else sealing.encryption
    closed = sum(needs_key(entry, encryption is not None) for entry in looked_at)
    found: list[Finding] = []
    if encryption is not None:
        found.append(Finding("ok", f"encryption: {encryption.describe()}"))
    if closed:
        what = f"records that are encrypted with a key that was not given: {closed} or more"
        found.append(Finding("note" if encryption is None else "fix", f"{what}; their duplicates are refused"))
    return found


def _all_digests(sealing: Sealing | None, key: bytes) -> list[str]:
    encryption = None if sealing is None else sealing.encryption
    return [*_digests(None, "key", key), *([] if encryption is None else _digests(encryption, "key", key))]


def _digests(encryption: Encryption | None, name: Name, text: bytes) -> list[str]:
    if encryption is not None:
        return [f"{_KEYED.decode()}{digest}" for digest in encryption.digests(name, text)]
    return [f"sha256:{hashlib.sha256(digested(name, text)).hexdigest()}"]


def _surface(scope: bytes) -> bytes:
    found = _SURFACE.match(scope)
    return b"" if found is None else found[0]


def _is_keyed(scope: bytes) -> bool:
    return scope.removeprefix(_surface(scope)).startswith(_KEYED)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

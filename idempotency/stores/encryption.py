"""Encrypt what stores record: the results, keys and scopes of operations. Needs the package ``cryptography``.

An envelope is what stands in a record in place of a plain value. Its format, all lengths in bytes:

    4   ``E1 47 43 4D``: no plain result, key or scope begins so
    4   the id of the key: the beginning of a digest of it
    12  salt, random
    12  nonce, random
    n   ciphertext, as long as the plain value
    16  tag

The cipher is AES-256-GCM (NIST SP 800-38D). AES-GCM-SIV would bear a nonce that is used twice, but ``cryptography`` has
it only with OpenSSL 3.2 or later. One key may encrypt at most 2**32 messages with random nonces (SP 800-38D, section
8.3). So the AES key is the HMAC-SHA-256 of a salt under the key that is given, and there is a new salt in each process
and after each 2**28 messages: no number of records requires a new key. The associated data are the record's id and the
name of the field: an envelope that is moved to another record, or to another field, cannot be read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Self

from idempotency.errors import ConfigurationError, UnreadableError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Name = Literal["scope", "key"]
"""What is digested, each alone."""

MAGIC = b"\xe1GCM"
"""How an envelope begins. The first byte begins no plain result, and the first two no text in UTF-8."""

OVERHEAD = 48
"""By how many bytes an envelope is longer than its plain value."""

_KEY_SIZE = 32
_ID, _ID_AND_SALT, _NONCE = slice(4, 8), slice(4, 20), slice(20, 32)
_HEAD = 32
_MESSAGES = 2**28
"""For how many messages a salt is used. Children that are forked have the salt of their parent: there may be many."""

_CACHED = 1024
"""How many AES keys are stored in memory: each process that has written a record has one."""


class Encryption:
    """Encrypt and decrypt what a store records; give it to a store, or to ``open_store``, as ``encryption=``.

    ``key``: the key that writes: 32 random bytes, as bytes or as text that :meth:`new_key` has made.
    ``older_keys``: keys that only read, so that records of an earlier key are readable.
    ``writes``: False: what is encrypted is read, and nothing is encrypted. This is for the deployment before the first
    one that encrypts, and after the last one. Default True.

    Raises :class:`~idempotency.errors.ConfigurationError` for a key of another length, for two keys that are the same,
    and if ``cryptography`` is not installed. No message, ``repr`` or log line contains a key; it cannot be pickled.
    """

    __slots__ = ("_cipher_of", "_invalid_tag", "_keys", "_messages", "_writing", "writes")

    def __init__(self, key: bytes | str, *older_keys: bytes | str, writes: bool = True) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigurationError(
                "encryption needs cryptography, which is not installed: pip install 'asgi-idempotency[encryption]'"
            ) from error
        given = [_key_of(each) for each in (key, *older_keys)]
        keys = {_id_of(each): each for each in given}
        if len(keys) < len(given):
            raise ConfigurationError("two of the encryption keys are the same, or share their id: give each one once")
        self._keys = keys
        self.writes = writes
        self._invalid_tag = InvalidTag

        def cipher_of(id_and_salt: bytes) -> AESGCM:
            key = keys[id_and_salt[:4]]
            return AESGCM(hmac.digest(key, b"idempotency:1:salt:" + id_and_salt[4:], "sha256"))

        self._cipher_of = lru_cache(maxsize=_CACHED)(cipher_of)
        self._messages = count(1)
        self._writing = self._with_new_salt()

    @staticmethod
    def new_key() -> str:
        """Make a random key, as URL-safe base64 text of 44 characters."""
        return urlsafe_b64encode(os.urandom(_KEY_SIZE)).decode("ascii")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, writes: bool = True) -> Self:
        """Read the keys from a file: one in a line, as :meth:`new_key` makes them; the first one writes.

        Raises :class:`~idempotency.errors.ConfigurationError`, with the path, if that is not possible.
        """
        try:
            keys = Path(path).read_bytes().decode("ascii").split()
        except OSError as error:
            raise ConfigurationError(f"the encryption keys cannot be read from {path}: {error.strerror}") from error
        except UnicodeDecodeError:
            # Its cause is not given: it holds the content of the file.
            raise ConfigurationError(f"{path} has no encryption keys: it is not text") from None
        if not keys:
            raise ConfigurationError(f"{path} has no encryption keys: it is empty")
        try:
            return cls(*keys, writes=writes)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None

    def __repr__(self) -> str:
        return f"<Encryption {self.describe()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Encryption is not pickled or copied: it holds keys; make one in each process")

    def describe(self) -> str:
        """Return which keys write and read, by their ids."""
        ids = self.key_ids
        writing = [f"writes with {ids[0]}"] if self.writes else []
        reading = ids[1:] if self.writes else ids
        return ", ".join([*writing, *([f"reads with {', '.join(reading)}"] if reading else [])])

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Return the ids of the keys, in hex, the one that writes first. An id says nothing about its key."""
        return tuple(each.hex() for each in self._keys)

    def encrypt(self, record: bytes, field: str, value: bytes) -> bytes:
        """Return the envelope of a value; ``record`` is the id of the record, or saga, whose ``field`` it is."""
        if next(self._messages) % _MESSAGES == 0:
            self._writing = self._with_new_salt()
        head, cipher = self._writing
        nonce = os.urandom(12)
        return head + nonce + cipher.encrypt(nonce, value, record + field.encode())

    def _with_new_salt(self) -> tuple[bytes, AESGCM]:
        id_and_salt = next(iter(self._keys)) + os.urandom(12)
        return MAGIC + id_and_salt, self._cipher_of(id_and_salt)

    def decrypt(self, record: bytes, field: str, envelope: bytes) -> bytes:
        """Return the value in an envelope.

        Raises :class:`~idempotency.errors.UnreadableError` if its key was not given, or if it was changed or moved.
        """
        if not envelope.startswith(MAGIC) or len(envelope) < OVERHEAD:
            raise UnreadableError("its envelope is damaged")
        try:
            cipher = self._cipher_of(envelope[_ID_AND_SALT])
            return cipher.decrypt(envelope[_NONCE], envelope[_HEAD:], record + field.encode())
        except KeyError:
            raise UnreadableError(f"the key {envelope[_ID].hex()} was not given") from None
        except self._invalid_tag:
            raise UnreadableError("it was changed, or belongs to another record") from None

    def is_envelope(self, value: bytes) -> bool:
        """Return whether a value is an envelope, also if its first bytes were changed: then a key's id follows."""
        return value.startswith(MAGIC) or value[_ID] in self._keys

    def digests(self, name: Name, text: bytes) -> list[str]:
        """Return the keyed digests of a scope or key, in hex: one for each key, that of the key that writes first."""
        return [hmac.digest(key, digested(name, text), "sha256").hex() for key in self._keys.values()]


def digested(name: Name, text: bytes) -> bytes:
    """Return what is digested of a scope or key; a scope and a key of the same text have different digests."""
    return b"idempotency:1:%b:%b" % (name.encode(), text)


def _key_of(key: bytes | str) -> bytes:
    if isinstance(key, str):
        try:
            key = urlsafe_b64decode(key.strip())
        except ValueError:
            # Its cause is not given: it may quote the key.
            key = b""
    if not isinstance(key, bytes) or len(key) != _KEY_SIZE:
        raise ConfigurationError("an encryption key is 32 bytes, or text that Encryption.new_key() has made")
    return key


def _id_of(key: bytes) -> bytes:
    return hashlib.sha256(b"idempotency:1:key id:" + key).digest()[:4]

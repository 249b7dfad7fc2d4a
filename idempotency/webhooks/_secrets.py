"""The secrets of Standard Webhooks: ``whsec_`` signs and verifies, ``whsk_`` signs, ``whpk_`` verifies."""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from idempotency.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_SHORTEST, _LONGEST = 24, 64
"""Bytes of a shared secret."""

_SEED = 32
"""Bytes of the seed of an ed25519 key, and of its public key."""


class Signer(Protocol):
    """A secret that signs."""

    def sign(self, content: bytes) -> str:
        """Return one element of ``webhook-signature``: its version, a comma, and the signature in base64."""
        ...


class Verifier(Protocol):
    """A secret that verifies."""

    def accepts(self, content: bytes, signatures: Sequence[bytes]) -> bool:
        """Return whether one of the elements of ``webhook-signature`` is the signature of ``content``."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class SharedSecret:
    """A secret that sender and receiver have in common: HMAC-SHA256, version ``v1``."""

    key: bytes

    def sign(self, content: bytes) -> str:
        """Sign ``content``."""
        return f"v1,{b64encode(hmac.digest(self.key, content, 'sha256')).decode()}"

    def accepts(self, content: bytes, signatures: Sequence[bytes]) -> bool:
        """Compare each in constant time."""
        expected = self.sign(content).encode()
        return any(hmac.compare_digest(expected, each) for each in signatures)


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """The key of a sender: ed25519, version ``v1a``."""

    key: Ed25519PrivateKey

    def sign(self, content: bytes) -> str:
        """Sign ``content``."""
        return f"v1a,{b64encode(self.key.sign(content)).decode()}"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What a receiver has of the key of a sender: ed25519, version ``v1a``."""

    key: Ed25519PublicKey

    def accepts(self, content: bytes, signatures: Sequence[bytes]) -> bool:
        """Verify the signatures of this version until one is good."""
        return any(self._accepts(content, each[4:]) for each in signatures if each.startswith(b"v1a,"))

    def _accepts(self, content: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(b64decode(signature, validate=True), content)
        except (InvalidSignature, binascii.Error):
            return False
        return True


def signers(secrets: Sequence[str]) -> tuple[Signer, ...]:
    """Read the secrets of a sender; ConfigurationError, without the secret, for one that cannot be used."""
    read = _read(secrets)
    if any(isinstance(each, PublicKey) for each in read):
        raise ConfigurationError("a sender signs with whsec_ or whsk_; whpk_ is the receiver's part of a key")
    return tuple(each for each in read if not isinstance(each, PublicKey))


def verifiers(secrets: Sequence[str]) -> tuple[Verifier, ...]:
    """Read the secrets of a receiver; ConfigurationError, without the secret, for one that cannot be used."""
    read = _read(secrets)
    if any(isinstance(each, PrivateKey) for each in read):
        raise ConfigurationError("a receiver verifies with whsec_ or whpk_; whsk_ is the sender's part of a key")
    return tuple(each for each in read if not isinstance(each, PrivateKey))


def _read(secrets: Sequence[str]) -> list[SharedSecret | PrivateKey | PublicKey]:
    if isinstance(secrets, str) or not isinstance(secrets, Sequence) or not secrets:
        raise ConfigurationError("secrets must be a list of one secret or more")
    return [_secret(each) for each in secrets]


def _secret(text: object) -> SharedSecret | PrivateKey | PublicKey:
    kind, _, encoded = text.partition("_") if isinstance(text, str) else ("", "", "")
    if kind not in ("whsec", "whsk", "whpk"):
        raise ConfigurationError("a secret begins with whsec_, whsk_ or whpk_, and base64 follows")
    try:
        # Some write it without its padding.
        value = b64decode(encoded.rstrip("=") + "=" * (-len(encoded.rstrip("=")) % 4), validate=True)
    except ValueError as error:
        raise ConfigurationError(f"what follows {kind}_ is not base64") from error
    if kind == "whsec":
        if not _SHORTEST <= len(value) <= _LONGEST:
            raise ConfigurationError(f"a whsec_ secret has {_SHORTEST} to {_LONGEST} bytes, not {len(value)}")
        return SharedSecret(value)
    return _private_key(value) if kind == "whsk" else _public_key(value)


def _private_key(value: bytes) -> PrivateKey:
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if len(value) not in (_SEED, 2 * _SEED):
        raise ConfigurationError(f"a whsk_ key has {_SEED} bytes, or {2 * _SEED} with its public key, not {len(value)}")
    key = Ed25519PrivateKey.from_private_bytes(value[:_SEED])
    if value[_SEED:] not in (b"", key.public_key().public_bytes_raw()):
        raise ConfigurationError("the public key in a whsk_ key does not belong to its private key")
    return PrivateKey(key)


def _public_key(value: bytes) -> PublicKey:
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(value) != _SEED:
        raise ConfigurationError(f"a whpk_ key has {_SEED} bytes, not {len(value)}")
    return PublicKey(Ed25519PublicKey.from_public_bytes(value))


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            'whsk_ and whpk_ need cryptography: pip install "asgi-idempotency[encryption]"'
        ) from error

"""Name who is calling. Every format here is stored: changing one makes records mismatch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from idempotency._http.authorization import WHOLE, read_identity
from idempotency._http.credentials import KINDS, Kind
from idempotency._http.digest import digest, digest_text
from idempotency.errors import CallerUnknownError, ConfigurationError

ANONYMOUS = "http:1:anonymous"
"""The scope that all unknown callers share."""

CredentialScope = Literal["credentials", "authorization"]
UnknownCredentials = Literal["warn", "refuse"]

_COUNTED: dict[CredentialScope, frozenset[Kind]] = {
    "credentials": frozenset({"authorization", "key", "tenant", "identity"}),
    "authorization": frozenset({"authorization"}),
}
_NAMES_CALLERS: frozenset[Kind] = frozenset({"authorization", "key", "identity"})
_CERTIFICATE = "TLS client certificate"

_WARNING = (
    "A request with a key has credentials that do not count: %s. Callers who differ in nothing else share their keys,"
    " so one can get the response of another. Name the caller: give the middleware a callable scope="
)
_UNSTABLE = (
    "A request with a key has an %s header whose value may differ on every retry, and that names nobody. A retry then"
    " runs again. Name the caller: give the middleware a callable scope="
)
_MAX_WARNINGS = 100
"""Clients choose the names of headers, so the number of warnings is bounded."""

_logger = logging.getLogger("idempotency")


class Credentials:
    """Name callers by the credentials in their headers.

    ``scope``: ``"credentials"``, every header of which :mod:`idempotency._http.credentials` knows what it says of the
    caller; or ``"authorization"``, that header alone. ``secret`` makes the digests keyed, so that weak credentials
    cannot be guessed from the store. ``key_header``, in lower case, is no credential. ``unknown``: what happens to a
    request with credentials that do not count.
    """

    def __init__(
        self, scope: CredentialScope, secret: bytes | None, key_header: bytes, unknown: UnknownCredentials
    ) -> None:
        self.scope = scope
        self.refuses = unknown == "refuse"
        self._counted = _COUNTED[scope]
        self._secret = secret
        self._key_header = key_header
        self._warned: set[str] = set()

    def caller_of(self, scope: Mapping[str, Any]) -> str:
        """Name the caller of a request: a digest of all credentials that count, or :data:`ANONYMOUS` without any.

        With another secret, or a refreshed credential, the caller is another one.

        Raises :class:`~idempotency.errors.CallerUnknownError` for other credentials, if they are to be refused.
        """
        found: list[tuple[Kind, bytes, bytes]] = [
            (kind, name, value) for name, value in scope["headers"] if (kind := KINDS[name])
        ]
        certified = _has_client_certificate(scope)
        if not found and not certified:
            return ANONYMOUS
        if len(found) == 1 and found[0][0] == "authorization" and not certified:
            # Most requests are such.
            value = found[0][2]
            if read_identity(value) is WHOLE:
                # As _digest() writes it, at half the cost.
                text = b"authorization:1:%d:%b" % (len(value), value)
                return "http:1:" + digest_text(text, self._secret).hex()
        return self._caller_of(found, [_CERTIFICATE] if certified else [])

    def _caller_of(self, found: Sequence[tuple[Kind, bytes, bytes]], unknown: list[str]) -> str:
        lines: list[tuple[bytes, bytes]] = []
        kinds: set[Kind] = {kind for kind, _, value in found if value.strip() and kind in self._counted}
        for kind, name, value in found:
            if kind == "authorization":
                identity = read_identity(value)
                if not identity.stable:
                    unknown.append("Authorization")
                # No header has a name with a space: no value imitates an identity that was read.
                line = (b"authorization", value) if identity.text is None else (b"authorization as", identity.text)
                lines.append(line)
            elif value.strip() and name.lower() != self._key_header:
                if kind in self._counted:
                    lines.append((name.lower(), value))
                elif not _is_answered_for(kind, kinds):
                    unknown.append(name.decode("ascii"))
        if unknown:
            self._report(unknown)
        if not lines:
            return ANONYMOUS
        if all(name == b"authorization" for name, _ in lines):
            return self._digest(b"authorization:1:", [value for _, value in lines])
        # Proxies may change the order of headers, but not of those with one name.
        lines.sort(key=lambda line: line[0])
        return self._digest(b"credentials:1:", [part for line in lines for part in line])

    def _digest(self, domain: bytes, parts: list[bytes]) -> str:
        return "http:1:" + digest(domain, parts, self._secret).hex()

    def _report(self, unknown: Iterable[str]) -> None:
        for header in unknown:
            if header.lower() not in self._warned and len(self._warned) < _MAX_WARNINGS:
                self._warned.add(header.lower())
                _logger.warning(_UNSTABLE if header == "Authorization" else _WARNING, header)
        if self.refuses:
            raise CallerUnknownError(
                f"The request has credentials that this API cannot use with a key: {', '.join(sorted(set(unknown)))}."
            )


@dataclass(frozen=True, slots=True)
class KnownCaller:
    """Give every request the caller ``name``, which was found out before, as by a signature."""

    name: str

    def caller_of(self, scope: Mapping[str, Any]) -> str:
        """Name the caller of a request."""
        return self.name


def _is_answered_for(kind: Kind, counted: Iterable[Kind]) -> bool:
    """Return whether credentials that count say as much of the caller as one of ``kind`` does."""
    if kind == "cookie":
        return not _NAMES_CALLERS.isdisjoint(counted)
    return kind == "proof" and "identity" in counted


def _has_client_certificate(scope: Mapping[str, Any]) -> bool:
    """Return whether the server has verified a client certificate (ASGI TLS extension)."""
    extensions = scope.get("extensions")
    tls = extensions.get("tls") if extensions else None
    return bool(tls and (tls.get("client_cert_chain") or tls.get("client_cert_name")))


def scope_text(value: str | bytes | int | None, secret: bytes | None) -> str:
    """Name the caller by a digest of what the user's ``scope`` callable returned.

    None, and an empty text, mean that the caller is not known: such callers share :data:`ANONYMOUS`, as callers without
    credentials do. A callable that must not allow this raises instead. A number is the same caller as its decimal
    text, and text as its UTF-8 bytes.

    Raises :class:`~idempotency.errors.ConfigurationError` for another type, a bool among them.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if value is None or value == b"":
        return ANONYMOUS
    if not isinstance(value, bytes):
        raise ConfigurationError(f"scope must return str, bytes, int or None, not {type(value).__name__}")
    return "http:1:" + digest(b"scope:1:", (value,), secret).hex()


def path_scope(caller: str, path: str) -> str:
    """Name a caller on one path, for ``Policy.key_per_path``. ``caller`` is already a digest, keyed if need be."""
    known = "http:1:" if caller != ANONYMOUS else f"{ANONYMOUS}:"
    return known + digest(b"path:1:", (caller.encode(), path.encode("utf-8", "surrogatepass")), None).hex()


def sender_scope(sender: str) -> str:
    """Name the sender of webhooks, whose signature says that they are its own."""
    return "http:1:" + digest(b"sender:1:", (sender.encode(),), None).hex()


def is_anonymous(scope: str) -> bool:
    """Return whether the caller in the scope of an operation is not known."""
    return scope.startswith(ANONYMOUS)

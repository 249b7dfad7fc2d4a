"""The key of a logical call: whose it is, and what a redirect makes of it. No I/O."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

from idempotency._durations import positive
from idempotency._http.error_hook import FIELD_NAME
from idempotency._http.fingerprint import digest_body, fingerprint
from idempotency._rules import Claim
from idempotency.errors import ConfigurationError
from idempotency.operation import current

Origin = tuple[str, str, int]
"""Scheme, host and port (RFC 6454)."""

SCOPE = "client:1"
"""The scope of the records of named calls."""

HEADER_NAME = "Idempotency-Key"
METHODS = ("POST", "PATCH")
DAY = 86400.0

_PORTS = {"http": 80, "https": 443}
_NAME: ContextVar[str | None] = ContextVar("idempotency_client_call", default=None)


@contextmanager
def call(name: str) -> Iterator[None]:
    """Name the logical call that is made in this block: the same name, the same key, also in another process.

    Make one request that needs a key in the block; others may be in it. Tasks that are started in the block have the
    name, threads do not. The key is stored where the transport or adapter has ``store=``, and is else derived from the
    running operation, as by :meth:`idempotency.Operation.derive`.

    Raises :class:`~idempotency.errors.ConfigurationError` for a name that is no text, or empty; and, at the request,
    where there is neither.
    """
    token = _NAME.set(_checked(name))
    try:
        yield
    finally:
        _NAME.reset(token)


@dataclass(slots=True)
class Call:
    """One logical call: ``key`` as it is sent in the header, and how many ``attempts`` were made of it so far.

    A redirect that is followed, and a request that is sent again with other credentials, belong to the same call.
    """

    key: str = field(repr=False)
    attempts: int = 0
    _method: str = field(default="", repr=False)
    _origin: Origin = field(default=("", "", 0), repr=False)


class Outgoing(Protocol):
    """A request of a client library."""

    @property
    def method(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def headers(self) -> MutableMapping[str, str]: ...

    def given(self, header_name: str) -> str | None:
        """Return the key that the caller has set, or None."""
        ...

    @property
    def body(self) -> bytes | None:
        """Return the body; None if it cannot be sent twice."""
        ...

    @property
    def named(self) -> object:
        """Return the name that the request itself has, or None."""
        ...

    @property
    def call(self) -> Call | None:
        """Return the call that the request is already part of."""
        ...

    def set_key(self, header_name: str, key: str, call: Call) -> None:
        """Make the request part of the call, and write the key into what is sent of it.

        The request itself has no key then: the client may copy it into a redirect, which another transport sends.
        """
        ...


class Keys:
    """What the key of a request is."""

    def __init__(
        self, *, methods: Collection[str], header_name: str, quoted: bool, store: object, ttl: float | timedelta
    ) -> None:
        if isinstance(methods, str) or not all(isinstance(method, str) and method for method in methods):
            raise ConfigurationError(f'methods must be names of methods, such as ("POST", "PATCH"), not {methods!r}')
        if not isinstance(header_name, str) or not FIELD_NAME.fullmatch(header_name):
            raise ConfigurationError(f"header_name must be the name of a header field, not {header_name!r}")
        self._methods = frozenset(method.upper() for method in methods)
        self._header_name = header_name
        self._quoted = quoted
        self._stored = store is not None
        self._ttl = positive("ttl", ttl)

    def begin(self, request: Outgoing) -> Call | Claim | None:
        """Set the key of a request and return its call.

        None if the request has no key. A :class:`~idempotency._rules.Claim` if the key is that of a name, and stored:
        then :meth:`begin_stored` sets it.
        """
        if request.call is not None:
            return self._go_on(request, request.call)
        given = request.given(self._header_name)
        if given is not None:
            return self._set(request, given)
        # Other requests may be in the block of a call. A request that has a name itself is meant.
        if request.method.upper() not in self._methods and request.named is None:
            return None
        name = _NAME.get() if request.named is None else _checked(request.named)
        if name is None:
            return self.begin_stored(request, new_key())
        if self._stored:
            return self._claim(request, name)
        operation = current()
        if operation is None:
            raise ConfigurationError(
                "a call has a name, and its key can be neither stored nor derived: give store=, name it inside of an"
                " operation, or send a key of your own"
            )
        return self.begin_stored(request, operation.derive(name))

    def begin_stored(self, request: Outgoing, key: str) -> Call:
        """Set the key of a request, and return its call."""
        return self._set(request, self._field(key))

    def _set(self, request: Outgoing, value: str) -> Call:
        begun = Call(value, 0, request.method, origin_of(request.url))
        request.set_key(self._header_name, value, begun)
        return begun

    def _go_on(self, request: Outgoing, begun: Call) -> Call | None:
        if request.method != begun._method:
            # A redirect made it a GET.
            request.headers.pop(self._header_name, None)
            return None
        origin = origin_of(request.url)
        value = begun.key if _is_same(begun._origin, origin) else self._field(_derive(begun.key, origin))
        request.set_key(self._header_name, value, begun)
        return begun

    def _claim(self, request: Outgoing, name: str) -> Claim:
        if request.body is None:
            raise ConfigurationError(
                "a call whose name is stored needs a body of bytes, by which its requests are compared: read it first"
            )
        parts, origin = urlsplit(request.url), origin_of(request.url)
        target = f"{origin[0]}://{origin[1]}:{origin[2]}{parts.path}"
        kind = request.headers.get("content-type", "").encode()
        body = digest_body(request.body, kind)
        compared = fingerprint(request.method, target, parts.query.encode(), kind, body, None)
        # The lease is over at once: nothing is sent before the key is recorded, so a claim is taken over without harm.
        return Claim(scope=SCOPE, key=name, fingerprint=compared, lease=0.0, ttl=self._ttl)

    def _field(self, key: str) -> str:
        return f'"{key}"' if self._quoted else key


def new_key() -> str:
    """Make a random key: a UUID, as the draft recommends (section 2.2)."""
    return str(uuid.uuid4())


def origin_of(url: str) -> Origin:
    """Return the origin of an absolute URL."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        # A redirect may lead to such a URL. The client refuses it, with an error of its own.
        return "", url, 0


def _is_same(one: Origin, other: Origin) -> bool:
    # Credentials too are sent on where http becomes https.
    return one == other or (one[1] == other[1] and (*one[::2], *other[::2]) == ("http", 80, "https", 443))


def _derive(key: str, origin: Origin) -> str:
    """Derive the key for another origin, which is not shown the key of the first."""
    digest = hashlib.sha256(b"redirect:1:%b:%b" % (repr(origin).encode(), key.encode("utf-8", "surrogatepass")))
    return str(uuid.UUID(bytes=digest.digest()[:16], version=5))


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"the name of a call must be text, and not empty: it is of type {type(name).__name__}")
    return name

"""What is known of a request with a key from its head alone: the key, the wait, and most of its claim."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from time import monotonic
from typing import Any

from idempotency._http.caller import path_scope
from idempotency._http.fingerprint import fingerprint
from idempotency._http.key import read_key, read_prefer_wait
from idempotency._http.options import Options
from idempotency._rules import Claim
from idempotency.errors import KeyMissingError
from idempotency.policy import Policy


class Head:
    """The head of one request that has a key, or needs one.

    ``scope`` has the members ``method``, ``path``, ``query_string`` and ``headers`` of an ASGI scope, whatever the
    front end. ``keys`` are the values of the field with the key.
    """

    __slots__ = ("_began", "_keys", "_options", "_policy", "_scope")

    def __init__(
        self, options: Options, policy: Policy, scope: MutableMapping[str, Any], keys: Sequence[bytes]
    ) -> None:
        self._options = options
        self._policy = policy
        self._scope = scope
        self._keys = keys
        self._began = monotonic()

    @property
    def name(self) -> str:
        """The name of the operation: the method and the actual path."""
        return f"{self._scope['method']} {self._scope['path']}"

    def key(self) -> str:
        """Read the key.

        Raises :class:`~idempotency.errors.KeyMissingError` and :class:`~idempotency.errors.KeyInvalidError`.
        """
        key = read_key(self._keys, strict=self._options.strict)
        if key is None:
            name = self._options.header_name.decode()
            raise KeyMissingError(f"This operation needs a key in the header {name}.")
        return key

    def wait(self) -> float:
        """Return the seconds that a duplicate waits: what the client asks for, at most the policy's."""
        cap = self._policy.wait
        if cap == 0:
            return 0.0
        preferred = read_prefer_wait(self._scope["headers"])
        return cap if preferred is None else min(preferred, cap)

    def _content(self) -> tuple[bytes, bytes]:
        """Return the values of Content-Type and Content-Length."""
        # Of several fields with one name the first counts.
        fields = dict(reversed(self._scope["headers"]))
        return bytes(fields.get(b"content-type", b"")), bytes(fields.get(b"content-length", b""))

    def _claim(self, key: str, route: str, caller: str, content_type: bytes, body_digest: bytes) -> Claim:
        policy, scope, options = self._policy, self._scope, self._options
        return Claim(
            scope=path_scope(caller, scope["path"]) if policy.key_per_path else caller,
            key=key,
            fingerprint=fingerprint(
                scope["method"], scope["path"], scope["query_string"], content_type, body_digest, options.secret
            ),
            lease=policy.lease,
            ttl=policy.ttl,
            hold=policy.on_crash == "hold",
            transactional=options.transactional,
            began=self._began,
            name=route,
        )

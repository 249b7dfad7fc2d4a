"""The policy of an operation: how long its key is protected, and what happens to the key when it fails."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Literal, get_args

from idempotency._durations import seconds
from idempotency.errors import ConfigurationError

Outcome = Literal["store", "release", "hold"]
"""How an operation ends: its result is recorded, its key is released, or its outcome is held as unknown."""

Fingerprint = Literal["raw", "json"] | Callable[[Any], bytes | str | Awaitable[bytes | str]]

Headers = Sequence[tuple[bytes, bytes]]
"""Raw header pairs in order, repeats included."""

Redact = Callable[[int, Headers, bytes], tuple[Headers, bytes]]

TRANSIENT = frozenset({307, 308, 401, 403, 408, 409, 425, 429, 503})
"""Statuses that say "not now", "not you" or "not here": the same request may get another answer later."""


class Seconds:
    """A duration field: it can be set to seconds or a ``timedelta``, and is read as seconds, a float."""

    def __init__(self, default: float) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, policy: object | None, owner: type | None = None) -> float:
        if policy is None:
            return self._default
        value: float = policy.__dict__[self._name]
        return value

    def __set__(self, policy: object, value: float | timedelta) -> None:
        policy.__dict__[self._name] = seconds(self._name, value)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Set the rules of one kind of operation. Immutable, checked when made, shared by any number of routes.

    Durations are seconds, as a number or a ``timedelta``, at most 100,000,000,000 (3000 years).

    ``ttl``: how long a finished key replays, from its completion; a replay does not extend it. Default 86400 (a day).
    ``lease``: how long an owner may be silent before another claim may take over its key; it is renewed after each
    third of it. Default 30.
    ``wait``: how long a duplicate waits for the result of a running owner before it is answered with 409. Default 0:
    it does not wait.
    ``required``: whether a request without a key is refused with 400. Default False: it runs unprotected.
    ``methods``: the HTTP methods that are protected. Default POST and PATCH (draft section 1).
    ``on_crash``: what happens to a key whose owner crashed: ``"rerun"`` (the default; the effect happens at least
    once) or ``"hold"`` (at most once; the outcome is unknown until resolved).
    ``on_store_error``: ``"fail_closed"`` (the default: 503, nothing runs) or ``"fail_open"`` (runs unprotected).
    ``outcomes``: what happens to a key when its operation ends, where the default does not fit: a status (``404``), a
    class of statuses (``"5xx"``) or an exception class, mapped to ``"store"``, ``"release"`` or ``"hold"``. By default
    every response is stored, except 5xx, the transient 401, 403, 408, 409, 425, 429 and 503, and the redirects 307 and
    308 (the client sends the same request, key included, elsewhere): these release the key, as an exception does. An
    exact status wins over a class of statuses, and an exception class over its base classes. An exception without a
    rule follows the rule for 500.
    ``fingerprint``: what of the body is compared, besides method, path, query and content type: ``"raw"`` (the
    default: every byte, except a multipart boundary), ``"json"`` (JSON apart from white space and the order of members;
    other bodies, and those over 1 MiB, as raw), or a callable given the Starlette ``Request``, sync or async, that
    returns what is compared, as text or bytes.
    ``redact``: what is recorded in place of a response that holds what must not be stored: a callable given the status,
    the header pairs and the body, all as bytes and as they were sent, that returns the header pairs and the body to
    record, and so to replay. The first response is sent unchanged. It is called only where a response is recorded, in
    the event loop: it must not block. ``async def`` is refused. If it fails, the operation is recorded as done without
    its result, and the event ``stored-without-result`` names the error. Default None: as it was sent.
    ``max_request``: how many bytes the body of a keyed request may have; a larger one is refused with 413. Default
    1 GiB.
    ``max_response``: how many bytes of a response are recorded; a larger one is passed through, and recorded as
    completed without its result. Default 1 MiB.

    Raises :class:`~idempotency.errors.ConfigurationError` with the value in the message.
    """

    ttl: Seconds = Seconds(86400.0)
    lease: Seconds = Seconds(30.0)
    wait: Seconds = Seconds(0.0)
    required: bool = False
    methods: Set[str] = frozenset({"POST", "PATCH"})
    on_crash: Literal["rerun", "hold"] = "rerun"
    on_store_error: Literal["fail_closed", "fail_open"] = "fail_closed"
    outcomes: Mapping[int | str | type[BaseException], Outcome] = field(default_factory=dict)
    fingerprint: Fingerprint = "raw"
    redact: Redact | None = None
    max_request: int = 1 << 30
    max_response: int = 1 << 20

    def __post_init__(self) -> None:
        for name, duration in (("ttl", self.ttl), ("lease", self.lease)):
            if duration <= 0:
                raise ConfigurationError(f"{name} must be positive, not {duration!r}")
        if self.wait < 0:
            raise ConfigurationError(f"wait must not be negative, not {self.wait!r}")
        for name, size in (("max_request", self.max_request), ("max_response", self.max_response)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ConfigurationError(f"{name} must be a number of bytes, not {size!r}")
        if not isinstance(self.required, bool):
            raise ConfigurationError(f"required must be True or False, not {self.required!r}")
        if isinstance(self.methods, str):
            raise ConfigurationError(f"methods must be a set of names, not {self.methods!r}")
        object.__setattr__(self, "methods", frozenset(method.upper() for method in self.methods))
        _one_of("on_crash", self.on_crash, ("rerun", "hold"))
        _one_of("on_store_error", self.on_store_error, ("fail_closed", "fail_open"))
        if not callable(self.fingerprint):
            _one_of("fingerprint", self.fingerprint, ("raw", "json"))
        if self.redact is not None:
            _check_not_async("redact", self.redact)
        object.__setattr__(self, "outcomes", MappingProxyType(dict(self.outcomes)))
        for rule, outcome in self.outcomes.items():
            _check_rule(rule)
            _one_of(f"outcomes[{rule!r}]", outcome, get_args(Outcome))

    def outcome_of_status(self, status: int) -> Outcome:
        """Return the outcome of an operation that answered ``status``."""
        default: Outcome = "release" if status >= 500 or status in TRANSIENT else "store"
        if not self.outcomes:
            return default
        exact = self.outcomes.get(status)
        if exact is not None:
            return exact
        # A rule of the user for a class of statuses wins over our default for one status.
        return self.outcomes.get(f"{status // 100}xx", default)

    def outcome_of_exception(self, error: BaseException) -> Outcome:
        """Return the outcome of an operation that raised ``error``.

        An ``Exception`` without a rule of its own follows the rule for the status 500, with which the client is
        answered. After any other (a cancellation, an exit) it is not known how far the operation got, as after a
        crash: it follows ``on_crash``.
        """
        for kind in type(error).__mro__:
            rule = self.outcomes.get(kind)
            if rule is not None:
                return rule
        if isinstance(error, Exception):
            return self.outcome_of_status(500)
        return "release" if self.on_crash == "rerun" else "hold"


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_not_async(name: str, function: object) -> None:
    if not callable(function):
        raise ConfigurationError(f"{name} must be callable, not {function!r}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigurationError(f"{name} must not be async: {function!r}")


def _check_rule(rule: object) -> None:
    if isinstance(rule, type) and issubclass(rule, BaseException):
        return
    if isinstance(rule, int) and not isinstance(rule, bool) and 100 <= rule <= 599:
        return
    if isinstance(rule, str) and len(rule) == 3 and rule[0] in "12345" and rule.endswith("xx"):
        return
    raise ConfigurationError(f'outcomes takes a status, a class such as "5xx", or an exception class, not {rule!r}')

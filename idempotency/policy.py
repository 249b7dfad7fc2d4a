"""The policy of an operation: how long its key is protected, and what happens to the key when it fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, get_args

from idempotency._durations import seconds
from idempotency._hooks import check_callable
from idempotency.errors import ConfigurationError

Outcome = Literal["store", "release", "hold"]
"""How an operation ends: its result is recorded, its key is released, or its outcome is held as unknown."""

Fingerprint = Literal["raw", "json"] | Callable[[Any], bytes | str | Awaitable[bytes | str]]

OutcomeRule = Callable[[int, Mapping[str, str], bytes | None], Outcome | None]
"""Chooses the outcome of a response by its status, its headers (names in lower case) and its body."""

Outcomes = Mapping[int | str | type[BaseException], Outcome]

Headers = Sequence[tuple[bytes, bytes]]
"""Raw header pairs in order, repeats included."""

Redact = Callable[[int, Headers, bytes], tuple[Headers, bytes]]

SAME_REQUEST_AGAIN = frozenset(
    {
        # Elsewhere (RFC 9110 sections 15.4.8, 15.4.9 and 15.5.20).
        *(307, 308, 421),
        # With other credentials or after a payment (RFC 9110 sections 15.5.2, 15.5.3, 15.5.4 and 15.5.8).
        *(401, 402, 403, 407),
        # Later (RFC 9110 sections 15.5.9 and 15.5.10, RFC 4918 sections 11.3 and 11.4, RFC 8470 section 5.2, RFC 6585
        # section 4).
        *(408, 409, 423, 424, 425, 429),
        # With other header fields or another protocol (RFC 9110 sections 15.5.12, 15.5.13, 15.5.18 and 15.5.22, RFC
        # 6585 sections 3 and 5).
        *(411, 412, 417, 426, 428, 431),
    }
)
"""Statuses that say: nothing was done, and the same request may be sent again. See decision 16."""


class _FrozenOutcomes(Outcomes):
    """Outcomes that cannot be changed. Unlike a ``MappingProxyType``, they can be hashed, copied and pickled."""

    __slots__ = ("_rules",)

    def __init__(self, rules: Outcomes) -> None:
        self._rules = dict(rules)

    def __getitem__(self, rule: int | str | type[BaseException]) -> Outcome:
        return self._rules[rule]

    def __iter__(self) -> Iterator[int | str | type[BaseException]]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __hash__(self) -> int:
        return hash(frozenset(self._rules.items()))

    def __repr__(self) -> str:
        return repr(self._rules)

    def __reduce__(self) -> tuple[type[_FrozenOutcomes], tuple[Outcomes]]:
        return _FrozenOutcomes, (self._rules,)


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

    Equal policies are equal and have one hash. A policy can be copied, and pickled if its functions can be.

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
    every response is stored, except 5xx and those after which the client sends the same request again, which release
    the key, as an exception does: elsewhere (307, 308, 421), with other credentials or after a payment (401, 402, 403,
    407), later (408, 409, 423, 424, 425, 429), or with other header fields (411, 412, 417, 426, 428, 431). A 404 or 405
    that no route gave releases too, where the framework says so. An exact status wins over a class of statuses, and an
    exception class over its base classes. An exception without a rule follows the rule for 500.
    ``outcome``: a function that is given the status, the headers (names in lower case, repeats joined by ``", "``) and
    the body of a response of the application, and returns ``"store"``, ``"release"``, ``"hold"``, or None: then
    ``outcomes`` and the default decide. The body has no compression. It is None where it is not recorded (too large,
    streamed), or cannot be decoded. Default None. It is not awaited. If it raises, or returns anything else, that is
    logged, and it counts as None.
    ``fingerprint``: what of the body is compared, besides method, path, query and content type: ``"raw"`` (the
    default: every byte, except a multipart boundary), ``"json"`` (JSON apart from white space and the order of members;
    other bodies, and those over 1 MiB, as raw), or a callable given the Starlette ``Request``, sync or async (in WSGI
    the environ, and not async), that returns what is compared, as text or bytes.
    ``redact``: what is recorded in place of a response that holds what must not be stored: a callable given the status,
    the header pairs and the body, all as bytes, the body without its compression, that returns the header pairs and the
    body to record, and so to replay. The first response is sent unchanged. It is called only where a response is
    recorded, in ASGI in the event loop: it must not block. ``async def`` is refused. If it fails, or the body cannot be
    decoded, the operation is recorded as done without its result, and the event ``stored-without-result`` names the
    error. Default None: as it was sent.
    ``max_request``: how many bytes the body of a keyed request may have; a larger one is refused with 413. Default
    1 GiB.
    ``max_response``: how many bytes of a response are recorded; a larger one is passed through, and recorded as
    completed without its result. Default 1 MiB.
    ``mismatch_status``, ``in_progress_status``: with which status HTTP requests are answered whose key was used for
    another request, or whose first one is running: 400 to 599, default 422 and 409 (draft section 2.7).
    ``key_per_path``: whether a key of HTTP is unique for a caller and a path, and means another operation on another
    path. Default False: unique for a caller, and a mismatch on another path.

    Raises :class:`~idempotency.errors.ConfigurationError` with the value in the message.
    """

    ttl: Seconds = Seconds(86400.0)
    lease: Seconds = Seconds(30.0)
    wait: Seconds = Seconds(0.0)
    required: bool = False
    methods: Set[str] = frozenset({"POST", "PATCH"})
    on_crash: Literal["rerun", "hold"] = "rerun"
    on_store_error: Literal["fail_closed", "fail_open"] = "fail_closed"
    outcomes: Outcomes = field(default_factory=dict)
    outcome: OutcomeRule | None = None
    fingerprint: Fingerprint = "raw"
    redact: Redact | None = None
    max_request: int = 1 << 30
    max_response: int = 1 << 20
    mismatch_status: int = 422
    in_progress_status: int = 409
    key_per_path: bool = False

    def __post_init__(self) -> None:
        for name, duration in (("ttl", self.ttl), ("lease", self.lease)):
            if duration <= 0:
                raise ConfigurationError(f"{name} must be positive, not {duration!r}")
        if self.wait < 0:
            raise ConfigurationError(f"wait must not be negative, not {self.wait!r}")
        for name, size in (("max_request", self.max_request), ("max_response", self.max_response)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ConfigurationError(f"{name} must be a number of bytes, not {size!r}")
        for name, flag in (("required", self.required), ("key_per_path", self.key_per_path)):
            if not isinstance(flag, bool):
                raise ConfigurationError(f"{name} must be True or False, not {flag!r}")
        for name in ("mismatch_status", "in_progress_status"):
            status = self.__dict__[name]
            if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status <= 599:
                raise ConfigurationError(f"{name} must be a status from 400 to 599, not {status!r}")
        object.__setattr__(self, "methods", _names(self.methods))
        _one_of("on_crash", self.on_crash, ("rerun", "hold"))
        _one_of("on_store_error", self.on_store_error, ("fail_closed", "fail_open"))
        if not callable(self.fingerprint):
            _one_of("fingerprint", self.fingerprint, ("raw", "json"))
        if self.redact is not None:
            check_callable("redact", self.redact)
        if not isinstance(self.outcomes, Mapping):
            raise ConfigurationError(f"outcomes must be a mapping, not {self.outcomes!r}")
        object.__setattr__(self, "outcomes", _FrozenOutcomes(self.outcomes))
        for rule, outcome in self.outcomes.items():
            _check_rule(rule)
            _one_of(f"outcomes[{rule!r}]", outcome, get_args(Outcome))
        if self.outcome is not None:
            check_callable("outcome", self.outcome)

    def rule_for_status(self, status: int) -> Outcome | None:
        """Return what ``outcomes`` says of ``status``; None if it says nothing."""
        if not self.outcomes:
            return None
        # A rule of the user for a class of statuses wins over our default for one status.
        return self.outcomes.get(status) or self.outcomes.get(f"{status // 100}xx")

    def outcome_of_status(self, status: int) -> Outcome:
        """Return the outcome of an operation that answered ``status``."""
        default: Outcome = "release" if status >= 500 or status in SAME_REQUEST_AGAIN else "store"
        return self.rule_for_status(status) or default

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


def _names(methods: object) -> frozenset[str]:
    names = list[object](methods) if isinstance(methods, Iterable) and not isinstance(methods, str) else [methods]
    if isinstance(methods, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"methods must be a set of names, not {methods!r}")
    return frozenset(str(name).upper() for name in names)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _check_rule(rule: object) -> None:
    if isinstance(rule, type) and issubclass(rule, BaseException):
        return
    if isinstance(rule, int) and not isinstance(rule, bool) and 100 <= rule <= 599:
        return
    if isinstance(rule, str) and len(rule) == 3 and rule[0] in "12345" and rule.endswith("xx"):
        return
    raise ConfigurationError(f'outcomes takes a status, a class such as "5xx", or an exception class, not {rule!r}')

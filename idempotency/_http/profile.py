"""What an API of a known kind expects of our own answers: the Agentic Commerce Protocol, and APIs like Stripe's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

from idempotency._http.error_hook import ErrorHook
from idempotency._http.fingerprint import OfBody, json_digest
from idempotency._http.problem import Problem
from idempotency.errors import (
    BodyInvalidError,
    ConfigurationError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    RequestTooLargeError,
)
from idempotency.policy import Policy

_POLICY = Policy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Set what ``error=``, ``echo_key=`` and ``policy=`` are by default for a middleware that does not give them.

    ``error``: what makes an answer of a :class:`~idempotency.Problem`; None: a problem document. ``echo_key``: whether
    each response has the key of its request. ``policy``: the policy of every protected route.

    ``Profile.acp`` is for the Agentic Commerce Protocol, ``Profile.stripe`` for APIs whose errors look like those of
    Stripe; ``docs/profiles.md`` says what they do. ``dataclasses.replace`` changes a part of one.
    """

    error: ErrorHook | None = None
    echo_key: bool = False
    policy: Policy = _POLICY

    acp: ClassVar[Profile]
    stripe: ClassVar[Profile]


def choose(profile: Profile | None, error: ErrorHook | None, echo_key: bool | None, policy: Policy | None) -> Profile:
    """Return the profile of a middleware, in which the options win that are not None.

    Raises :class:`~idempotency.errors.ConfigurationError` for what is no profile.
    """
    if profile is None:
        profile = Profile()
    if not isinstance(profile, Profile):
        raise ConfigurationError(f"profile must be a Profile, such as Profile.acp, not {type(profile).__name__}")
    return replace(
        profile,
        error=profile.error if error is None else error,
        echo_key=profile.echo_key if echo_key is None else echo_key,
        policy=profile.policy if policy is None else policy,
    )


_ACP_CODES = {
    KeyMissingError.code: "idempotency_key_required",
    KeyInvalidError.code: "invalid",
    BodyInvalidError.code: "invalid",
    KeyReusedError.code: "idempotency_conflict",
    InProgressError.code: "idempotency_in_flight",
}


def _acp_error(problem: Problem) -> dict[str, object]:
    """Make a flat error of the Agentic Commerce Protocol (delegate payment, sections 4.2 and 5.4)."""
    kind = "invalid_request"
    if problem.status >= 500:
        kind = "service_unavailable" if problem.retryable else "processing_error"
    code = _ACP_CODES.get(problem.code, problem.code.replace("-", "_"))
    return {"type": kind, "code": code, "message": problem.detail}


def _acp_body(data: bytes) -> bytes:
    """Return a digest of what the Agentic Commerce Protocol compares (delegate payment, section 5.2).

    That is the body as a JSON value: the order of members does not count, nor ``1.0`` for ``1``; null is not absence.
    A body that is not JSON is compared byte by byte.
    """
    return json_digest(data, by_value=True) or hashlib.sha256(data).digest()


_STRIPE_CODES = {
    KeyReusedError.code: "idempotency_key_reused",
    InProgressError.code: "idempotency_key_in_use",
    KeyMissingError.code: "idempotency_key_required",
    KeyInvalidError.code: "idempotency_key_invalid",
    OutcomeUnknownError.code: "idempotency_outcome_unknown",
    NotReplayableError.code: "idempotency_result_not_recorded",
}

_STRIPE_REQUEST_FAULTS = (KeyMissingError.code, KeyInvalidError.code, BodyInvalidError.code, RequestTooLargeError.code)


def _stripe_error(problem: Problem) -> dict[str, object]:
    """Make an error as Stripe's clients read it: from the member ``error``, by status and ``type``."""
    kind = "api_error" if problem.status >= 500 else "idempotency_error"
    if problem.code in _STRIPE_REQUEST_FAULTS:
        kind = "invalid_request_error"
    code = _STRIPE_CODES.get(problem.code, problem.code.replace("-", "_"))
    return {"error": {"type": kind, "code": code, "message": problem.detail, "doc_url": problem.docs}}


Profile.acp = Profile(
    error=_acp_error,
    echo_key=True,
    policy=Policy(required=True, methods={"POST"}, fingerprint=OfBody(_acp_body), key_per_path=True),
)
Profile.stripe = Profile(error=_stripe_error, echo_key=True, policy=Policy(mismatch_status=400))

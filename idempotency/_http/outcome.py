"""The outcome of a response: what the policy says of it, and where that says nothing, what the framework says."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from traceback import format_tb
from typing import Any, get_args

from idempotency._hooks import discard_coroutine
from idempotency._http.caller import is_anonymous
from idempotency._http.codec import StoredResponse
from idempotency._http.content_coding import for_functions
from idempotency._http.unrouted import is_unrouted
from idempotency.errors import NotReplayableError
from idempotency.operation import Operation
from idempotency.policy import Headers, Outcome, OutcomeRule, Policy

REFUSAL = 300.0
"""Seconds for which a response 4xx to an anonymous caller is recorded, at the most.

Anybody can send such requests, and a refusal has no effect that must be protected for a day.
"""

Unrouted = Callable[[int, Any, Any], bool]
"""Whether an application has no route for a request: given the status, the request and the application."""

_logger = logging.getLogger("idempotency")


def outcome_of_response(
    policy: Policy,
    status: int,
    headers: Headers,
    body: bytes | None,
    scope: MutableMapping[str, Any],
    app: object,
    unrouted: Unrouted = is_unrouted,
) -> Outcome:
    """Return the outcome of an operation by its response; body None: the response is not recorded.

    ``scope``: the request, as the application has changed it: what ``unrouted`` takes.

    The user's function decides, then the user's table, then the default. None of them can fail any more: the effect may
    have happened.
    """
    if policy.outcome is not None:
        chosen = _ask(policy.outcome, policy.max_response, status, headers, body)
        if chosen is not None:
            return chosen
    if status in (404, 405) and policy.rule_for_status(status) is None and _has_no_route(unrouted, status, scope, app):
        return "release"
    return policy.outcome_of_status(status)


def is_brief(operation: Operation, status: int) -> bool:
    """Return whether a response is recorded for :data:`REFUSAL` only; not if its handler said that it has an effect."""
    return 400 <= status < 500 and is_anonymous(operation.scope) and operation.outcome_after("release") == "release"


def _ask(rule: OutcomeRule, max_response: int, status: int, headers: Headers, body: bytes | None) -> Outcome | None:
    try:
        if body is not None:
            headers, body = _decoded(StoredResponse(status, headers, body), max_response)
        chosen: object = rule(status, _texts(headers), body)
    except Exception as error:
        # Without the error's message, which may quote the body.
        trace = "".join(format_tb(error.__traceback__))
        _logger.error("outcome= raised %s; the default decides\n%s", type(error).__name__, trace)
        return None
    # Anything but text may fail when it is compared.
    if isinstance(chosen, str) and chosen in get_args(Outcome):
        return chosen  # type: ignore[return-value]
    if chosen is not None and not discard_coroutine("outcome=", rule, chosen):
        _logger.error(
            "outcome= must return store, release, hold or None, not a %s; the default decides", type(chosen).__name__
        )
    return None


def _decoded(response: StoredResponse, max_response: int) -> tuple[Headers, bytes | None]:
    try:
        response = for_functions(response, max_response)
    except NotReplayableError:
        return response.headers, None
    return response.headers, response.body


def _texts(headers: Headers) -> dict[str, str]:
    fields: dict[str, str] = {}
    for field, content in headers:
        name, value = field.decode("latin-1").lower(), content.decode("latin-1")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _has_no_route(unrouted: Unrouted, status: int, scope: MutableMapping[str, Any], app: object) -> bool:
    try:
        return unrouted(status, scope, app)
    except Exception as error:
        _logger.warning("the routes of the application could not be asked: %s", type(error).__name__)
        return False

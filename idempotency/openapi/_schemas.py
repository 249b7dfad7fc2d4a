"""The schemas of our own answers: problem documents, and those of the profiles."""

from __future__ import annotations

from collections.abc import Sequence

from idempotency._http.error_hook import ErrorHook
from idempotency._http.profile import Profile
from idempotency.openapi._answers import Answer
from idempotency.openapi._components import Components, Json


def _texts(*names: str) -> Json:
    return {name: {"type": "string"} for name in names}


_PROBLEM: Json = {
    "type": "object",
    "description": "Why a request with an idempotency key is not answered by the application (RFC 9457).",
    "required": ["type", "title", "status", "detail", "code", "retryable", "safe_new_key"],
    "properties": {
        "type": {"type": "string", "format": "uri", "description": "The documentation, with the code as fragment."},
        "title": {"type": "string", "description": "A sentence that is the same for each answer with this code."},
        "status": {"type": "integer", "description": "The status of the response."},
        "detail": {"type": "string", "description": "A sentence about this answer."},
        "code": {"type": "string", "description": "The stable name of the error."},
        "retryable": {"type": "boolean", "description": "Whether the same request may succeed later."},
        "safe_new_key": {"type": "boolean", "description": "Whether a new key cannot repeat an effect."},
        "retry_after": {"type": "integer", "description": "The seconds after which to retry."},
        "lease_left": {
            "type": "integer",
            "description": "The seconds until the lease of the first request ends, unless it is renewed.",
        },
    },
}

_ACP: Json = {
    "type": "object",
    "required": ["type", "code", "message"],
    "properties": _texts("type", "code", "message"),
}

_STRIPE: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "code", "message", "doc_url"],
            "properties": _texts("type", "code", "message", "doc_url"),
        }
    },
}


def schema_of(answers: Sequence[Answer], hook: ErrorHook | None, components: Components) -> Json:
    """Return the schema of answers that have one status and one media type, made by ``hook``.

    Of a hook of the user nothing is known but what it returned for these answers.
    """
    if hook is None:
        codes = {"type": "string", "enum": [answer.code for answer in answers]}
        problem = components.add("schemas", "IdempotencyProblem", _PROBLEM)
        # With a name, so that a generator makes one class for all operations.
        of_status = {"allOf": [problem, {"type": "object", "properties": {"code": codes}}]}
        return components.add("schemas", f"IdempotencyProblem{answers[0].status}", of_status)
    if hook is Profile.acp.error:
        return components.add("schemas", "IdempotencyError", _ACP)
    if hook is Profile.stripe.error:
        return components.add("schemas", "IdempotencyError", _STRIPE)
    if all(isinstance(answer.example, dict) for answer in answers):
        return {"type": "object"}
    return {"type": "string"} if all(isinstance(answer.example, str) for answer in answers) else {}

"""The responses of a protected operation: those of the application, and ours beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from idempotency._http.error_hook import ErrorHook
from idempotency.openapi._answers import Answer
from idempotency.openapi._components import Components, Json
from idempotency.openapi._schemas import schema_of
from idempotency.policy import Policy

_RETRY_AFTER: Json = {
    "description": "The seconds after which to send the same request again, with the same key.",
    "schema": {"type": "integer", "minimum": 0},
}


def is_replayed(status: str, policy: Policy) -> bool:
    """Return whether a response can be a replay. ``status``: as in the document, ``"201"``, ``"2XX"`` or default."""
    number = status.upper().replace("X", "0")
    return not number.isdecimal() or policy.outcome_of_status(int(number)) == "store"


def with_headers(response: Json, headers: Json) -> Json:
    """Return a response that has ``headers`` too. One that it has already, in any case, stays as it is."""
    own: Json = response.get("headers", {})
    names = {name.lower() for name in own}
    added = {name: {**header} for name, header in headers.items() if name.lower() not in names}
    return {**response, "headers": {**own, **added}} if own or added else response


def beside(responses: Json, status: str, components: Components) -> Json | None:
    """Return what the application says of ``status``, perhaps for a range of statuses or for all; None: nothing."""
    for key in (status, f"{status[0]}XX", f"{status[0]}xx", "default"):
        if key in responses:
            return components.resolve(responses[key])
    return None


def ours(answers: Sequence[Answer], hook: ErrorHook | None, headers: Json, components: Components) -> dict[str, Json]:
    """Return the responses of ``answers`` by their status. ``headers``: those that each has."""
    found: dict[str, Json] = {}
    for status, same in groupby(sorted(answers, key=_status), key=_status):
        of_status = list(same)
        response: Json = {"description": " Or: ".join(f"{title}." for title in _unique(a.title for a in of_status))}
        if any(answer.retry_after for answer in of_status):
            headers_of_status = {"Retry-After": components.add("headers", "RetryAfter", _RETRY_AFTER), **headers}
        else:
            headers_of_status = headers
        content = _content(of_status, hook, components)
        if content:
            response["content"] = content
        found[str(status)] = with_headers(response, headers_of_status)
    return found


def _status(answer: Answer) -> int:
    return answer.status


def _unique(titles: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(titles))


def _content(answers: Sequence[Answer], hook: ErrorHook | None, components: Components) -> Json:
    content: Json = {}
    for media_type in dict.fromkeys(answer.media_type for answer in answers):
        if media_type is None:
            continue
        of_type = [answer for answer in answers if answer.media_type == media_type]
        content[media_type] = {
            "schema": schema_of(of_type, hook, components),
            "examples": {answer.code: {"summary": answer.title, "value": answer.example} for answer in of_type},
        }
    return content


def merged(theirs: Json, added: Json) -> Json:
    """Return a response that is either of two: the application's, and ours."""
    description = "\n\n".join(text for text in (theirs.get("description"), added["description"]) if text)
    both = {**with_headers(theirs, added.get("headers", {})), "description": description}
    content: Json = {**theirs.get("content", {})}
    names = {name.lower(): name for name in content}
    of_ours: Json = added.get("content", {})
    for media_type, media in of_ours.items():
        name = names.get(media_type, media_type)
        content[name] = _merged_media(content[name], media) if name in content else media
    return {**both, "content": content} if content else both


def _merged_media(theirs: Json, added: Json) -> Json:
    media: Json = {**theirs}
    # Without a schema everything is allowed already. Not oneOf: a body may fit both.
    if "schema" in theirs and theirs["schema"] != added["schema"]:
        media["schema"] = {"anyOf": [theirs["schema"], added["schema"]]}
    examples: Json = {**added["examples"], **theirs.get("examples", {})}
    if "example" in media:
        # A media type has one or the other.
        examples = {"application": {"value": media.pop("example")}, **examples}
    return {**media, "examples": examples}

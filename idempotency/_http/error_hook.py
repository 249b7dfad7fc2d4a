"""Our own answers in the form of an API: what an ``error=`` hook makes of a problem."""

from __future__ import annotations

import inspect
import json
import logging
import re
import traceback
from collections.abc import Callable, Mapping

from idempotency._http.codec import StoredResponse
from idempotency._http.problem import Problem, problem_response, whole_response

Answer = Mapping[str, object] | tuple[int, Mapping[str, str], bytes | str]
"""The members of a JSON body; or a status, header fields and a body."""

ErrorHook = Callable[[Problem], Answer]

FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110 section 5.1."""

# RFC 9110 section 5.5, without white space around it.
_FIELD_VALUE = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")

# HTTP/2 refuses a response with those of one connection (RFC 9113 section 8.2.2).
FRAMING = frozenset(
    {"connection", "content-length", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)

_logger = logging.getLogger("idempotency")


class _UnusableError(Exception):
    """The hook returned what cannot be sent; the message says why, and contains nothing that it returned."""


def answer_to(problem: Problem, hook: ErrorHook | None) -> StoredResponse:
    """Return the response to a problem: that of the hook, or a problem document if it fails, or without a hook.

    A mapping is sent as ``application/json`` with the status of the problem. A tuple is a whole response; its status is
    an error too. Both get the header fields that each of our answers has (``Retry-After`` among them), if they lack
    them. A hook that raises, or returns something else, is logged without its message: that may contain the key.
    """
    if hook is None:
        return problem_response(problem)
    try:
        return _response(problem, hook(problem))
    except _UnusableError as error:
        _logger.error("the hook error= %s; a problem document is sent", error)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__))
        _logger.error("the hook error= raised %s; a problem document is sent\n%s", type(error).__name__, where)
    return problem_response(problem)


def _response(problem: Problem, answer: object) -> StoredResponse:
    match answer:
        case Mapping():
            # Not NaN and infinity, which are not JSON.
            body = json.dumps(dict(answer), allow_nan=False).encode("ascii")
            return whole_response(problem, problem.status, [(b"content-type", b"application/json")], body)
        case (status, Mapping() as headers, bytes() | str() as body):
            if isinstance(status, bool) or not isinstance(status, int) or not 400 <= status <= 599:
                raise _UnusableError("returned a status that is not one of an error (400 to 599)")
            content = body.encode() if isinstance(body, str) else body
            return whole_response(problem, status, [_field(*pair) for pair in headers.items()], content)
        case _:
            if inspect.iscoroutine(answer):
                answer.close()
            raise _UnusableError(
                f"returned a {type(answer).__name__}, not a mapping or a tuple of status, headers and body"
            )


def _field(name: object, value: object) -> tuple[bytes, bytes]:
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name) or name.lower() in FRAMING:
        raise _UnusableError("returned a header whose name is malformed, or belongs to the server")
    if not isinstance(value, str) or not _FIELD_VALUE.fullmatch(value):
        raise _UnusableError("returned a header whose value is not text, or has line breaks or other characters")
    return name.lower().encode("ascii"), value.encode("latin-1")

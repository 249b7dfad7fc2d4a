"""The CORS fields of the answers that this library gives in the place of a WSGI application.

Flask-CORS and django-cors-headers run inside of the application, so that a replay passes by them, and a browser would
hide it from the page. Here they say which fields an answer to the present request has. Nothing else of the application
runs for that.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from wsgiref.types import StartResponse, WSGIEnvironment

from idempotency._http.applications import inside, owner_of
from idempotency._http.capture_sync import ExcInfo, Fields, Write

if TYPE_CHECKING:
    from flask import Flask

_logger = logging.getLogger("idempotency")


def with_cors(start_response: StartResponse, app: object, environ: WSGIEnvironment) -> StartResponse:
    """Return a ``start_response`` that adds what the CORS code in ``app`` adds to the application's own answers.

    An answer that allows an origin already stays as it is, and so does each one to a request without an Origin.
    """
    if "HTTP_ORIGIN" not in environ:
        return start_response
    # As the request came: the application may change its environ.
    head = {**environ, "wsgi.input": io.BytesIO(), "CONTENT_LENGTH": "0"}

    def start(status: str, headers: Fields, exc_info: ExcInfo | None = None, /) -> Write:
        pairs = [*headers, *_missing(headers, _fields_of(app, head))]
        return start_response(status, pairs) if exc_info is None else start_response(status, pairs, exc_info)

    return start


def _missing(headers: Fields, fields: Fields) -> Iterator[tuple[str, str]]:
    if any(name.lower() == "access-control-allow-origin" for name, _ in headers):
        return
    varies = {part.strip().lower() for name, value in headers if name.lower() == "vary" for part in value.split(",")}
    for name, value in fields:
        lower = name.lower()
        if lower.startswith("access-control-") or (lower == "vary" and value.lower() not in varies):
            yield lower, value


def _fields_of(app: object, environ: WSGIEnvironment) -> Fields:
    """Return the fields of an answer to a request that the CORS code has seen; none if there is no such code."""
    try:
        return list(_ask(app, environ))
    except Exception as error:
        # What it raises may quote the request. The answer is more important than its fields.
        _logger.warning("the CORS code of the application could not be asked: %s", type(error).__name__)
        return []


def _ask(app: object, environ: WSGIEnvironment) -> Iterable[tuple[str, str]]:
    flask, django = sys.modules.get("flask"), sys.modules.get("django.core.handlers.wsgi")
    for each in inside(app):
        owner = owner_of(each)
        if flask is not None and isinstance(owner, flask.Flask):
            return _of_flask(owner, environ)
        if django is not None and isinstance(each, django.WSGIHandler):
            return _of_django(environ)
    return ()


def _of_flask(app: Any, environ: WSGIEnvironment) -> Iterable[tuple[str, str]]:
    # Flask-CORS has no other way to say its fields (decision 15). In the order in which Flask calls its functions.
    functions = [
        function
        for name in chain(_blueprints_of(app, environ), (None,))
        for function in reversed(app.after_request_funcs.get(name, ()))
        if getattr(function, "__module__", "").partition(".")[0] == "flask_cors"
    ]
    if not functions:
        return ()
    # They read the request alone. In a context of the application, its session would be opened, and its teardown run.
    with _empty_flask().request_context(environ):
        response = app.response_class()
        for function in functions:
            response = function(response)
    fields: Iterable[tuple[str, str]] = response.headers.items()
    return fields


def _blueprints_of(app: Any, environ: WSGIEnvironment) -> Iterable[str]:
    from werkzeug.exceptions import HTTPException

    request = app.request_class(environ, populate_request=False)
    try:
        request.url_rule, _ = app.create_url_adapter(request).match(return_rule=True)
    except HTTPException:  # no route takes the request
        return ()
    names: Iterable[str] = request.blueprints
    return names


@cache
def _empty_flask() -> Flask:
    from flask import Flask

    return Flask(__name__, static_folder=None)


def _of_django(environ: WSGIEnvironment) -> Iterable[tuple[str, str]]:
    cors = sys.modules.get("corsheaders.middleware")
    if cors is None:
        return ()
    from django.conf import settings  # type: ignore[import-untyped]
    from django.core.handlers.wsgi import WSGIRequest  # type: ignore[import-untyped]
    from django.http import HttpResponse  # type: ignore[import-untyped]
    from django.utils.module_loading import import_string  # type: ignore[import-untyped]

    for kind in map(import_string, settings.MIDDLEWARE):
        if isinstance(kind, type) and issubclass(kind, cors.CorsMiddleware):
            fields: Iterable[tuple[str, str]] = kind(lambda _: HttpResponse())(WSGIRequest(environ)).items()
            return fields
    return ()

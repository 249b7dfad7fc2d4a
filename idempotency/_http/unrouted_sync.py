"""Find out whether a 404 or 405 of a WSGI application comes from its framework; see :mod:`idempotency._http.unrouted`.

The routers of Flask and Django are asked. Where nothing is known, the response counts as a handler's.
"""

from __future__ import annotations

import io
import sys
from typing import Any
from wsgiref.types import WSGIEnvironment

from idempotency._http.applications import inside
from idempotency._http.unrouted import has_no_route_in_django, matches_nothing


def is_unrouted_sync(status: int, environ: WSGIEnvironment, app: object) -> bool:
    """Return whether ``app`` answered 404 or 405 because none of its routes takes the request.

    ``environ``: that of the request, as the application has changed it.
    """
    if status not in (404, 405):
        return False
    flask, django = sys.modules.get("flask"), sys.modules.get("django.core.handlers.wsgi")
    dispatcher = sys.modules.get("werkzeug.middleware.dispatcher")
    for each in inside(app):
        if dispatcher is not None and isinstance(each, dispatcher.DispatcherMiddleware):
            return False  # one of several applications has answered
        # The middleware is often put around the method Flask.wsgi_app.
        owner = getattr(each, "__self__", each)
        if flask is not None and isinstance(owner, flask.Flask):
            return _has_no_route_in_flask(environ, owner)
        if django is not None and isinstance(each, django.WSGIHandler):
            return has_no_route_in_django(django.get_path_info(environ), environ["REQUEST_METHOD"])
    return False


def _has_no_route_in_flask(environ: WSGIEnvironment, app: Any) -> bool:
    request = app.request_class({**environ, "wsgi.input": io.BytesIO()}, populate_request=False)
    return matches_nothing(app.create_url_adapter(request))

"""Render the pages. Every value is escaped: the names of records, sagas and operators are hostile input."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from idempotency._cli.words import duration
from idempotency.web._operator import Forms, Operator, mounted_at
from idempotency.web._words import Clock, ago, short, size


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("idempotency.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"duration": duration, "size": size, "ago": ago, "short": short, "text": visible}
    made.globals["style"] = Markup(_style())  # noqa: S704 - a file of this package
    return made


@cache
def _style() -> str:
    return files("idempotency.web").joinpath("templates", "style.css").read_text("utf-8")


@cache
def headers() -> dict[str, str]:
    """Return the headers of every answer: it runs nothing, loads nothing, is in no frame, and is not stored."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'"
    return {
        "cache-control": "no-store",
        "content-security-policy": f"{policy}; frame-ancestors 'none'",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        # With no-referrer, a browser would send its forms with the origin null.
        "referrer-policy": "same-origin",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }


def visible(text: object) -> str:
    """Return a text with what cannot be seen in it, or is no character, written out."""
    found = str(text)
    return found if found.isprintable() else ascii(found)[1:-1]


class Page:
    """What one request is answered with, for one operator, under the path where the page is mounted."""

    def __init__(self, request: Request, operator: Operator) -> None:
        self.operator = operator
        self.clock = Clock.read()
        self.forms = Forms(request, operator)
        self._base = mounted_at(request)

    def url(self, path: str = "", **query: object) -> str:
        """Return the URL of a path below the page."""
        asked = urlencode({name: value for name, value in query.items() if value})
        return f"{self._base}/{quote(path)}{'?' if asked else ''}{asked}"

    def render(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """Render a template."""
        text = _environment().get_template(template).render(page=self, operator=self.operator, **values)
        response = HTMLResponse(text.encode("utf-8", "backslashreplace"), status)
        if self.forms.is_new:
            response.headers["set-cookie"] = self.forms.set_cookie()
        return response

    def problem(self, status: int, title: str, detail: str) -> Response:
        """Render what went wrong."""
        return self.render("problem.html", status=status, title=title, detail=detail)

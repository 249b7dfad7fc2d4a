"""Who looks at the page, and what is checked of each request before anything is shown."""

from __future__ import annotations

import hmac
import inspect
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from starlette.requests import Request
from starlette.types import Message, Receive

from idempotency.errors import ConfigurationError

COOKIE = "idempotency_console"
LARGEST_FORM = 16_384
"""Bytes of a form."""

_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Who looks at the page. ``name`` is written into the audit: 1 to 255 characters.

    ``read_only``: sees the page, and can do nothing. Default False.
    """

    name: str
    read_only: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= _LONGEST_NAME:
            raise ConfigurationError(f"the name of an operator is text of 1 to {_LONGEST_NAME} characters")


Allowed = Operator | str | None
Allow = Callable[[Request], Allowed | Awaitable[Allowed]]
"""Names the operator of a request; None for one that must not see the page."""


class Body:
    """The body of a request, which ``allow`` may read before the page does."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: list[Message] = []
        self._size = 0

    async def first(self) -> Message:
        """Return the next message, and remember it; not behind one with which the body is too large for a form."""
        message = await self._receive()
        if self._size <= LARGEST_FORM:
            self._read.append(message)
            self._size += len(message.get("body", b""))
        return message

    async def again(self) -> Message:
        """Return the messages that were read first, and then those that follow."""
        return self._read.pop(0) if self._read else await self._receive()


async def operator_of(allow: Allow, request: Request) -> Operator | None:
    """Ask ``allow`` who makes a request. Whatever it raises is passed on, and nothing is shown."""
    answer = allow(request)
    found = await answer if inspect.isawaitable(answer) else answer
    if found is None or isinstance(found, Operator):
        return found
    if isinstance(found, str):
        return Operator(name=found)
    raise ConfigurationError(
        f"allow must return the name of the operator, an Operator or None, not {type(found).__name__}"
    )


def mounted_at(request: Request) -> str:
    """Return the path under which the page is mounted, as it stands in a URL: empty, or with a slash before it only."""
    return quote(request.scope.get("root_path", "").rstrip("/"))


def path_in_page(request: Request) -> str:
    """Return the path of a request below the page."""
    path: str = request.scope["path"]
    root: str = request.scope.get("root_path", "").rstrip("/")
    # A proxy may have removed the prefix of the application, which is in root_path nevertheless.
    for prefix in (root, root.removeprefix(request.scope.get("app_root_path", ""))):
        if path == prefix or path.startswith(f"{prefix}/"):
            return path[len(prefix) :].strip("/")
    return path.strip("/")


class Forms:
    """The token of the forms of one browser: a random cookie, and a digest of it and of the operator in each form.

    Another site can neither read the cookie nor set it. So any process can check a form, without a shared secret.
    """

    def __init__(self, request: Request, operator: Operator) -> None:
        known = request.cookies.get(COOKIE, "")
        self.is_new = len(known) != 64
        self.cookie = secrets.token_hex(32) if self.is_new else known
        self._request = request
        self.token = hmac.digest(self.cookie.encode(), operator.name.encode("utf-8", "surrogatepass"), "sha256").hex()

    def set_cookie(self) -> str:
        """Return the value of the header Set-Cookie."""
        path = mounted_at(self._request) or "/"
        secure = "; Secure" if self._request.url.scheme == "https" else ""
        return f"{COOKIE}={self.cookie}; Path={path}; HttpOnly; SameSite=Strict{secure}"

    def refuse(self, token: str) -> str | None:
        """Return why a form must not be accepted; None if it was sent from this page, by this operator."""
        if not _same_origin(self._request):
            return "The form was not sent from this page."
        if self.is_new or not hmac.compare_digest(token.encode(), self.token.encode()):
            return "The form is not of this browser and operator: load the page again."
        return None


def _same_origin(request: Request) -> bool:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None and site != "same-origin":
        return False
    # The scheme is not compared: behind a proxy that ends TLS, the application sees http.
    if origin is not None:
        return origin != "null" and _host_of(origin) == request.headers.get("host")
    return site is not None


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None

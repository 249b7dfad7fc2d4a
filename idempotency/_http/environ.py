"""Read a WSGI environ (PEP 3333) as the mapping that the rules of a request read: that of an ASGI scope."""

from __future__ import annotations

from typing import Any
from wsgiref.types import WSGIEnvironment


def path_below(environ: WSGIEnvironment) -> str:
    """Return the path of a request as the application's own routes see it: without that it is mounted under."""
    return _text(environ.get("PATH_INFO", "")) or "/"


def scope_of(environ: WSGIEnvironment) -> dict[str, Any]:
    """Return ``method``, ``path``, ``root_path``, ``query_string``, ``headers`` and ``extensions`` of a request.

    They are what an ASGI server gives for the same request, so that both front ends have one record. A server joins
    several field lines of one name by commas here.
    """
    script = environ.get("SCRIPT_NAME", "")
    return {
        "method": environ["REQUEST_METHOD"],
        "path": _text(script + environ.get("PATH_INFO", "")) or "/",
        "root_path": _text(script),
        "query_string": environ.get("QUERY_STRING", "").encode("latin-1"),
        "headers": _headers(environ),
        "extensions": _extensions(environ),
    }


def variable_of(header: bytes) -> str:
    """Return the name that a header has in an environ."""
    return "HTTP_" + header.decode("ascii").upper().replace("-", "_")


def _text(value: str) -> str:
    # The text has the bytes of the path as characters. ASGI servers decode a path as here.
    return value.encode("latin-1").decode("utf-8", "replace")


def _headers(environ: WSGIEnvironment) -> list[tuple[bytes, bytes]]:
    pairs = [
        (name, environ[variable].encode("latin-1"))
        for name, variable in ((b"content-type", "CONTENT_TYPE"), (b"content-length", "CONTENT_LENGTH"))
        if environ.get(variable)
    ]
    for variable, value in environ.items():
        if variable.startswith("HTTP_"):
            pairs.append((variable[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1")))
    # A server that has authenticated the caller itself may pass on no credentials but this name.
    if environ.get("REMOTE_USER"):
        pairs.append((b"remote-user", environ["REMOTE_USER"].encode("latin-1", "backslashreplace")))
    return pairs


def _extensions(environ: WSGIEnvironment) -> dict[str, Any]:
    """Return the client certificate that the server has verified, in the form of the ASGI TLS extension."""
    verified = environ.get("SSL_CLIENT_VERIFY") == "SUCCESS"
    return {"tls": {"client_cert_name": environ.get("SSL_CLIENT_S_DN") or "unnamed"}} if verified else {}

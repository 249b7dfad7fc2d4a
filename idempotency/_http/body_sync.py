"""Read a request body from ``wsgi.input``; see :mod:`idempotency._http.body`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import inf
from typing import IO
from wsgiref.types import InputStream, WSGIEnvironment

from idempotency._http.body import CHUNK, SPOOL, Body, DisconnectedError, check_size
from idempotency._http.fingerprint import BodyHash
from idempotency.errors import BodyInvalidError


def read_body_sync(environ: WSGIEnvironment, limit: int, content_type: bytes) -> Body:
    """Read a whole request body; see :func:`idempotency._http.body.read_body`.

    Raises :class:`~idempotency.errors.BodyInvalidError` where the server does not say where the body ends, as of a
    chunked one without ``wsgi.input_terminated``: it could be neither compared nor given to the application.
    """
    length = _length(environ)
    if length < inf:
        check_size(int(length), limit)
    digest, size, held = BodyHash(content_type), 0, bytearray()
    file: IO[bytes] | None = None
    try:
        for chunk in _chunks(environ["wsgi.input"], length):
            size += len(chunk)
            check_size(size, limit)
            digest.update(chunk)
            held += chunk
            if file is None and size > SPOOL:
                # Not closed here: the exchange closes it.
                file = tempfile.TemporaryFile()  # noqa: SIM115
            if file is not None and len(held) >= CHUNK:
                file.write(held)
                held = bytearray()
        if file is not None:
            file.write(held)
        return Body(digest.digest(), bytes(held) if file is None else None, file)
    except BaseException:
        if file is not None:
            file.close()
        raise


def _length(environ: WSGIEnvironment) -> float:
    """Return the number of bytes to read; infinity: to the end of the input."""
    length = environ.get("CONTENT_LENGTH") or ""
    if length.isascii() and length.isdigit():
        return int(length.lstrip("0")[:19] or "0")  # 19 digits are more than any limit
    if environ.get("wsgi.input_terminated"):
        return inf
    if length or environ.get("HTTP_TRANSFER_ENCODING"):
        raise BodyInvalidError
    return 0


def _chunks(stream: InputStream, length: float) -> Iterator[bytes]:
    while length:
        chunk = stream.read(int(min(CHUNK, length)))
        if not chunk:
            if length < inf:
                raise DisconnectedError
            return
        length -= len(chunk)
        yield chunk

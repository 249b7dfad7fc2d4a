"""A request body that is read once, compared, and passed on: in memory if it is small, else on disk."""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import IO, Any

from idempotency._http.fingerprint import BodyHash, digest_body
from idempotency.errors import RequestTooLargeError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SPOOL = 1 << 20
"""Bytes held in memory; a larger body goes to a temporary file."""

CHUNK = 1 << 18
"""Bytes that are read from a temporary file, or written to it, at a time."""


class DisconnectedError(Exception):
    """The client disconnected before its request was complete; nothing may run."""


class Body:
    """One request body: its digest, and its bytes if it is small. It can be read any number of times."""

    __slots__ = ("_file", "data", "digest")

    def __init__(self, digest: bytes, data: bytes | None, file: IO[bytes] | None = None) -> None:
        self.digest = digest
        self.data = data
        self._file = None if file is None else _File(file)

    def receive(self, server: Receive) -> Receive:
        """Make the ASGI ``receive`` that gives the body from its start, and then what the server sends.

        No message is invented: a disconnect is passed on when the server sends it.
        """
        if self._file is None:
            return BodyReceive(self.data or b"", server)
        return _FileReceive(self._file, server)

    @property
    def size(self) -> int:
        """Return the number of its bytes."""
        return len(self.data or b"") if self._file is None else self._file.size

    def open(self) -> IO[bytes]:
        """Return a file with the body, at its start. It is closed with the body."""
        if self._file is None:
            return io.BytesIO(self.data or b"")
        return self._file.rewound()

    def close(self) -> None:
        """Remove the temporary file, if there is one."""
        if self._file is not None:
            self._file.close()


class BodyReceive:
    """The ASGI ``receive`` that gives a body in memory, and then what the server sends."""

    __slots__ = ("_data", "_server")

    def __init__(self, data: bytes, server: Receive) -> None:
        self._data: bytes | None = data
        self._server = server

    async def __call__(self) -> Message:
        return self.body() or await self._server()

    def body(self) -> Message | None:
        """Return the message with the body; None if it was given before."""
        if self._data is None:
            return None
        data, self._data = self._data, None
        return {"type": "http.request", "body": data, "more_body": False}


class _File:
    """A temporary file that threads read."""

    __slots__ = ("_file", "_lock", "close", "size")

    def __init__(self, file: IO[bytes]) -> None:
        self.size = file.tell()  # it was written to its end
        self._file = file
        self._lock = threading.Lock()
        self.close = file.close

    def read(self, at: int) -> bytes:
        # A read that was cancelled may still run in its thread.
        with self._lock:
            self._file.seek(at)
            return self._file.read(CHUNK)

    def rewound(self) -> IO[bytes]:
        self._file.seek(0)
        return self._file


class _FileReceive:
    __slots__ = ("_at", "_file", "_server")

    def __init__(self, file: _File, server: Receive) -> None:
        self._file = file
        self._server = server
        self._at: int | None = 0

    async def __call__(self) -> Message:
        if self._at is None:
            return await self._server()
        chunk = await asyncio.to_thread(self._file.read, self._at)
        # A chunk that is not full is the last: the file's end, perhaps empty.
        more = len(chunk) == CHUNK
        self._at = self._at + len(chunk) if more else None
        return {"type": "http.request", "body": chunk, "more_body": more}


async def read_body(receive: Receive, limit: int, content_type: bytes, content_length: bytes) -> Body:
    """Read a whole request body; ``content_type`` decides which bytes of it are compared (see :class:`BodyHash`).

    Raises :class:`DisconnectedError` when the body ends early, and
    :class:`~idempotency.errors.RequestTooLargeError` when it has more than ``limit`` bytes: before it is read, if
    ``content_length`` is more already. No temporary file remains then.
    """
    # 19 digits are more than any limit.
    if content_length.isdigit():
        check_size(int(content_length[:19]), limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        data = bytes(message.get("body", b""))
        check_size(len(data), limit)
        return Body(digest_body(data, content_type), data)
    return await _read_long(message, receive, limit, BodyHash(content_type))


async def _read_long(message: Message, receive: Receive, limit: int, digest: BodyHash) -> Body:
    size = 0
    held = bytearray()
    file: IO[bytes] | None = None
    try:
        while True:
            if message["type"] != "http.request":
                raise DisconnectedError
            chunk = message.get("body", b"")
            size += len(chunk)
            check_size(size, limit)
            digest.update(chunk)
            held += chunk
            if file is None and size > SPOOL:
                # Not closed here: the exchange closes it.
                file = tempfile.TemporaryFile()  # noqa: SIM115
            more = message.get("more_body", False)
            if file is not None and (len(held) >= CHUNK or not more):
                await asyncio.to_thread(file.write, held)
                held = bytearray()
            if not more:
                return Body(digest.digest(), bytes(held) if file is None else None, file)
            message = await receive()
    except BaseException:
        if file is not None:
            file.close()
        raise


def check_size(size: int, limit: int) -> None:
    """Raise RequestTooLargeError for a body of more than ``limit`` bytes."""
    if size > limit:
        raise RequestTooLargeError(f"The body of a request with a key may have {limit} bytes.")


def is_about(error: BaseException, body: bytes) -> bool:
    """Return whether an error means that ``body`` is malformed: the user's function has parsed it as JSON or text."""
    if isinstance(error, json.JSONDecodeError):
        return error.doc == body.decode(json.detect_encoding(body), "surrogatepass")
    return isinstance(error, UnicodeDecodeError) and error.object == body

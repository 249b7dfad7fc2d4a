"""Answers that are odd or hostile, byte for byte as they stand here, by their name."""

from __future__ import annotations

import gzip
from typing import Any

Fields = list[tuple[bytes, bytes]]

ANSWERS: dict[str, tuple[int, Fields, list[bytes]]] = {
    "empty": (204, [], []),
    "elsewhere": (303, [(b"location", b"/orders/7?a=b%20c#d")], []),
    "unassigned": (299, [(b"content-type", b'x/y; z="a,b"')], [b"odd"]),
    "repeated": (201, [(b"x-part", b"2"), (b"link", b"<a>"), (b"x-part", b"1"), (b"link", b"<b>, <c>")], [b"{}"]),
    "values": (
        201,
        [(b"x-empty", b""), (b"x-latin", b"Zo\xeb"), (b"x-tab", b"a\tb"), (b"x-long", b"v" * 4000)],
        [b"1"],
    ),
    "binary": (201, [(b"content-length", b"256")], [bytes(range(256))]),
    "pieces": (200, [(b"content-type", b"application/octet-stream")], [b"", b"a" * 70000, b"", b"b", b"c" * 200000]),
    "compressed": (
        201,
        [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")],
        [gzip.compress(b"tea" * 99, mtime=0)],
    ),
    "smuggled": (
        200,
        [(b"x-smuggled", b"Content-Length: 0")],
        [b"0\r\n\r\nHTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n"],
    ),
}


async def give(scope: Any, receive: Any, send: Any) -> None:
    """Give the answer that the path names."""
    while (await receive())["more_body"]:
        pass
    status, headers, pieces = ANSWERS[scope["path"].rpartition("/")[2]]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})

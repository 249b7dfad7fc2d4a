"""Serve one application by uvicorn, until standard input is closed: http_server.py bare|library|floor [URL PLACE].

Or one with a kind of telemetry: that of :data:`telemetry.KINDS`.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from time import process_time

import uvicorn
import uvloop
from exchange import App, shop
from http_child import SERVER_CORE, pin, say
from http_floors import FLOOR_ERRORS, floor_of
from sqlalchemy.exc import SQLAlchemyError
from subjects import opened, subject_of
from telemetry import KINDS, telemetry_app

from idempotency import IdempotencyMiddleware
from idempotency.errors import IdempotencyError

_BACKLOG = 2048


@asynccontextmanager
async def _app(kind: str, url: str, place: str) -> AsyncIterator[App]:
    match kind:
        case "library":
            async with opened(subject_of(url, place)) as subject:
                yield IdempotencyMiddleware(shop, store=subject.store)
        case _ if kind in KINDS:
            async with opened(subject_of(url, place)) as subject:
                with ExitStack() as stack:
                    yield telemetry_app(subject.store, kind, stack)
        case "floor":
            async with floor_of(url, place) as app:
                yield app
        case _:
            yield shop


async def _serve(kind: str, url: str = "", place: str = "") -> None:
    async with _app(kind, url, place) as app:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(_BACKLOG)
            options = uvicorn.Config(
                app, http="httptools", ws="none", lifespan="off", access_log=False, log_level="warning"
            )
            server = uvicorn.Server(options)
            serving = asyncio.ensure_future(server.serve([listener]))
            say({"port": listener.getsockname()[1]})
            await _answer()
            server.should_exit = True
            await serving


async def _answer() -> None:
    """Say to each line how many seconds of processor time the process has used, until standard input is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        say({"cpu": process_time()})


def main() -> int:
    """Return the exit status: 0, or 2 if the store could not be used, of which the parent reads why."""
    pin(SERVER_CORE)
    try:
        uvloop.run(_serve(*sys.argv[1:]))
    except (IdempotencyError, SQLAlchemyError, *FLOOR_ERRORS) as error:
        say({"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Find out whether this process is one of several that serve the same application."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

_VARIABLES = {
    "uvicorn": "WEB_CONCURRENCY",
    "fastapi": "WEB_CONCURRENCY",
    "gunicorn": "WEB_CONCURRENCY",
    "hypercorn": None,
    "granian": "GRANIAN_WORKERS",
}
"""The variable of the environment with the number of workers, by the command of a server."""

_OPTION = re.compile(r"(?:-w|--workers)(?:=?(?P<number>\d+))?")


def has_siblings(scope: Mapping[str, Any]) -> bool:
    """Return whether this is known to be one of several worker processes.

    ``scope``: that of an ASGI connection, or the environment of a WSGI request.

    uvicorn and hypercorn give their configuration to each process. Of others the command and the environment are read.
    A number of workers in a file of gunicorn is not seen, except by WSGI applications.
    """
    if "wsgi.multiprocess" in scope:
        return bool(scope["wsgi.multiprocess"])
    given: Mapping[str, Any] = getattr(multiprocessing.current_process(), "_kwargs", {})
    workers = getattr(given.get("config"), "workers", None)
    if isinstance(workers, int):
        return workers > 1
    return _workers_of_command(sys.argv, os.environ) > 1


def _workers_of_command(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    server = _server(argv[0] if argv else "")
    if server not in _VARIABLES:
        return 1
    words = list(argv[1:])
    if server == "gunicorn":  # what it is given last decides
        words = [*shlex.split(environment.get("GUNICORN_CMD_ARGS", "")), *words]
    variable = _VARIABLES[server]
    number = environment.get(variable, "") if variable is not None else ""
    for place, word in enumerate(words):
        option = _OPTION.fullmatch(word)
        if option is not None:
            number = option["number"] or "".join(words[place + 1 : place + 2])
    return int(number) if number.isdecimal() else 1


def _server(command: str) -> str:
    path = PurePath(command)
    # As a module: python -m uvicorn.
    return path.parent.name if path.name == "__main__.py" else path.stem

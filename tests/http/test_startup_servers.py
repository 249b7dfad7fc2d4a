"""What servers do with a mistake in the configuration: they do not start, or log one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from idempotency.stores.sql import SQLStore
from tests.http.test_startup import STARTED, start
from tests.kit.asgi_calls import Effects, call, protect
from tests.kit.asgi_servers import SERVERS
from tests.kit.paths import ROOT
from tests.kit.servers import free_port

APPLICATION = """
import os
from starlette.applications import Starlette
from starlette.middleware import Middleware
from idempotency import IdempotencyMiddleware, open_store

url = os.environ["STORE"]
store = url if url == "memory://" else open_store(url, table="startup_none")
app = Starlette(middleware=[Middleware(IdempotencyMiddleware, store=store)])
wrong = Starlette(middleware=[Middleware(IdempotencyMiddleware, store=dict)])
"""
NO_TABLE = "has no table startup_none: run `idempotency schema create`"


def begin(directory: Path, server: str, *words: str, store: str = "memory://") -> subprocess.Popen[str]:
    """Start a server of the application, with its log to be read."""
    (directory / "served.py").write_text(APPLICATION)
    command, port = SERVERS[server], free_port()
    address = ["--bind", f"127.0.0.1:{port}"] if server == "hypercorn" else ["--port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-m", *command, *address, *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}", "STORE": store},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("server", ["uvicorn-h11", "hypercorn", "granian"])
def test_a_server_does_not_start_without_the_table(server: str, postgres_url: str, tmp_path: Path) -> None:
    """It ends by itself, and its log has the remedy."""
    process = begin(tmp_path, server, "served:app", store=postgres_url)

    log, _ = process.communicate(timeout=60)

    assert NO_TABLE in log
    assert server == "hypercorn" or process.returncode != 0


@pytest.mark.parametrize(
    ("server", "words", "line"),
    [
        ("uvicorn-h11", ["--workers", "2", "served:app"], "The store is in the memory of one process"),
        ("uvicorn-h11", ["served:wrong"], "The middleware cannot be used: store must be a Store"),
    ],
)
def test_a_server_logs_the_line(server: str, words: list[str], line: str, tmp_path: Path) -> None:
    """Without any configuration of logs, it is on stderr."""
    process = begin(tmp_path, server, *words)
    assert process.stdout is not None

    found = next((each for each in process.stdout if each.startswith(line)), None)
    process.terminate()
    process.communicate(timeout=60)

    assert found is not None


async def test_without_a_lifespan_each_request_with_a_key_says_it(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is that of a store that cannot be used, and its log line has the remedy; others are not touched."""
    store = SQLStore.from_url(postgres_url, table="startup_missing")
    app: Any = protect(Effects(), store)

    keyed, plain = await call(app, key="k"), await call(app)
    await store.aclose()

    assert (keyed.status, keyed.code, plain.status) == (503, "store-unavailable", 201)
    assert "has no table startup_missing: run `idempotency schema create`" in caplog.text


async def test_a_table_that_the_application_creates_at_its_start_is_enough(postgres_url: str) -> None:
    """The store is checked when the code of the application has run."""
    store = SQLStore.from_url(postgres_url, table="startup_created")

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await store.create_schema()
        yield
        await store.aclose()

    assert await start(protect(Starlette(lifespan=lifespan), store)) == STARTED

"""The command that goes on with sagas, until it is stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from idempotency._cli.commands import app
from idempotency.saga import saga
from idempotency.stores.sql import SQLStore
from tests.kit.paths import ROOT

SAGAS = """
    from idempotency.saga import saga, step, wait_for
    from idempotency.stores.sql import SQLStore

    async def say(what: str) -> None:
        print(what, flush=True)

    @saga(SQLStore.from_url({url!r}), name="trip")
    async def trip(to: str) -> str:
        await step("say", say, f"to {{to}}")
        await wait_for("approved")
        return to

    every = [trip]
    number = 5
"""


@pytest.fixture
def shop(tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of sagas, which is that of the command."""
    (tmp_path / "shop_sagas.py").write_text(dedent(SAGAS).format(url=sqlite_url))
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def _start(url: str) -> None:
    store = SQLStore.from_url(url)

    @saga(store, name="trip")
    async def trip(to: str) -> str:
        return to

    await trip.start("Rome", key="7")
    await store.aclose()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweeper_runs_until_it_is_told_to_stop(shop: Path, sqlite_url: str, number: signal.Signals) -> None:
    """It goes on with a saga that is recorded only, by the code of the application."""
    asyncio.run(_start(sqlite_url))
    command = [sys.executable, "-m", "idempotency", "saga", "sweep", "shop_sagas:every", "--poll", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=shop, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sweeping trip\n"
        assert process.stdout.readline() == "to Rome\n"

        process.send_signal(number)

        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("shop_sagas", "sagas are named as module:name, not 'shop_sagas'"),
        ("shop_sagas:nothing", "'shop_sagas:nothing' cannot be imported: module 'shop_sagas' has no attribute"),
        ("shop_sagas:number", "shop_sagas:number is no saga, and no list of sagas, but int"),
    ],
)
def test_what_is_no_saga_is_refused(shop: Path, monkeypatch: pytest.MonkeyPatch, path: str, why: str) -> None:
    monkeypatch.delitem(sys.modules, "shop_sagas", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    refused = CliRunner().invoke(app, ["saga", "sweep", path])

    assert refused.exit_code == 2
    assert why in " ".join(refused.output.split())

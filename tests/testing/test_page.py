"""The page on testing is a suite: its files are written down as they stand there, and run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import servers
from tests.kit.paths import ROOT
from tests.test_docs_code import blocks

pytestmark = pytest.mark.processes

FILES = dict(
    re.findall(
        r"^```(?:python|ini)\n(?=# (\S+\.(?:py|ini))\n)(.*?)^```$", (ROOT / "docs/testing.md").read_text(), re.M | re.S
    )
)
ANYIO = """
import pytest

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


def run(directory: Path, *words: str) -> str:
    """Run pytest over files, and return its last line."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist", *words],
        cwd=directory,
        env={"PYTHONPATH": f"{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()[-1]


def write(directory: Path, url: str = "") -> None:
    """Write the files of the page down, with the URL of a database."""
    for name, text in FILES.items():
        (directory / name).write_text(re.sub(r"postgresql\+asyncpg://[^\"]*", url, text))


def test_the_page_has_the_files() -> None:
    """Each block whose first line is a name."""
    assert list(FILES) == [
        *("pytest.ini", "conftest.py", "mails.py", "test_mails.py"),
        *("shop.py", "test_orders.py", "test_shop.py", "test_crashes.py"),
    ]


@pytest.mark.parametrize("plugin", ["asyncio", "anyio"])
def test_the_tests_without_a_database_pass_with_both_plugins(plugin: str, tmp_path: Path) -> None:
    """No Redis runs at the address of the application."""
    write(tmp_path)
    if plugin == "anyio":
        ini = (tmp_path / "pytest.ini").read_text()
        (tmp_path / "pytest.ini").write_text(
            re.sub(r"asyncio_default.*\n", "", ini).replace("asyncio_mode", "anyio_mode")
        )
        (tmp_path / "conftest.py").write_text(FILES["conftest.py"] + ANYIO)
    (tmp_path / "mails.py").write_text(FILES["mails.py"].replace("localhost:6379", "localhost:1"))
    other = ["-p", "no:asyncio"] if plugin == "anyio" else []

    assert run(tmp_path, *other, "test_mails.py").startswith("5 passed")


def test_the_page_on_testing_is_a_suite_that_passes(postgres_url: str, tmp_path: Path) -> None:
    """On PostgreSQL, in a database of its own; the crashes leave orders there."""
    with servers.postgres_database(postgres_url, f"testing_page_{tmp_path.name[-8:].replace('-', '_')}") as url:
        write(tmp_path, url)
        # A process for each of all the labels takes half a minute.
        few = 'only=["after claim", "after UPDATE idempotency_record", "after COMMIT"]'
        crashes = (tmp_path / "test_crashes.py").read_text()
        (tmp_path / "test_crashes.py").write_text(crashes.replace("assert_once(Orders)", f"assert_once(Orders, {few})"))

        assert run(tmp_path, "test_orders.py", "test_crashes.py").startswith("3 passed")


def test_the_application_of_the_tutorial_is_tested_as_it_is(tmp_path: Path) -> None:
    """In files of SQLite, one for each test, and not in its own."""
    write(tmp_path)
    (tmp_path / "shop.py").write_text(blocks("tutorial.md")["3. Close the gap between effect and record"][0])

    assert run(tmp_path, "test_shop.py").startswith("2 passed")
    assert not (tmp_path / "shop.db").exists()

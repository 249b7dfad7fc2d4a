"""What an installed package is: importable without extras, typed, small at the front, and with its version."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import idempotency
from tests.kit.paths import ROOT

pytestmark = pytest.mark.processes

PACKAGE = Path(idempotency.__file__).parent

# -S leaves out site-packages: what imports here needs the standard library only.
BLANK = [sys.executable, "-I", "-S", "-c"]
IMPORT_ALL = """
import sys
sys.path.insert(0, sys.argv[1])
import idempotency
print(*(type(getattr(idempotency, name)).__name__ for name in idempotency.__all__))
"""
OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
from idempotency import open_store
from idempotency.errors import ConfigurationError
try:
    open_store(sys.argv[2])
except ConfigurationError as error:
    print(error)
"""
CLIENT = """
import sys
sys.path.insert(0, sys.argv[1])
from idempotency import client
client.Retry(3)
for name in ("IdempotentTransport", "AsyncIdempotentTransport", "IdempotentAdapter", "call_of"):
    try:
        getattr(client, name)
    except client.ConfigurationError as error:
        print(error)
"""
WEBHOOK = """
import sys
sys.path.insert(0, sys.argv[1])
from idempotency.webhooks import sign, verify
try:
    sign("1", b"", ["whsk_" + "A" * 43])
except ValueError as error:
    extra = str(error).split('"')[1]
secrets = ["whsec_" + "A" * 32]
print(verify(sign("1", b"{}", secrets), b"{}", secrets).id == "1", extra)
"""


def blank(code: str, *arguments: str) -> str:
    """Run ``code`` in an interpreter without site-packages and return what it prints."""
    run = subprocess.run(
        [*BLANK, code, str(PACKAGE.parent), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_everything_public_imports_without_an_extra() -> None:
    """A blank interpreter reaches every public name."""
    names = blank(IMPORT_ALL).split()

    assert len(names) == len(idempotency.__all__)


def test_webhooks_are_verified_without_an_extra() -> None:
    """A blank interpreter signs and verifies, and says what ed25519 needs."""
    assert blank(WEBHOOK) == "True asgi-idempotency[encryption]"


def test_a_missing_extra_is_named() -> None:
    """Opening a store whose client is not installed says what to install."""
    assert "asgi-idempotency[redis]" in blank(OPEN, "redis://localhost")
    assert "asgi-idempotency[sql" in blank(OPEN, "sqlite+aiosqlite://")


def test_a_client_without_its_library_names_the_extra() -> None:
    """Importing a transport says what to install; what needs no library is there."""
    transport, other, adapter, _ = blank(CLIENT).splitlines()

    assert (
        transport == "IdempotentTransport needs httpx, which is not installed: pip install 'asgi-idempotency[client]'"
    )
    assert "asgi-idempotency[client]" in other
    assert adapter.endswith("pip install 'requests'")


def test_public_names_are_sorted() -> None:
    """The front door lists its names in order, each once."""
    assert list(idempotency.__all__) == sorted(set(idempotency.__all__))


def test_public_names_are_those_promised() -> None:
    """What the documents import from the top is there."""
    assert {"IdempotencyMiddleware", "Policy", "current", "open_store"} <= set(idempotency.__all__)


def test_the_package_says_that_it_is_typed() -> None:
    """Type checkers of users look for the marker of PEP 561."""
    assert (PACKAGE / "py.typed").is_file()


def test_metadata_agrees_with_the_project_file() -> None:
    """The installed distribution has the version and the Python floor of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = importlib.metadata.metadata("asgi-idempotency")

    assert metadata["Version"] == project["version"]
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_changelog_knows_this_version() -> None:
    """Every version that can be installed is described."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert version in (ROOT / "CHANGELOG.md").read_text()

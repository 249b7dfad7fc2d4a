"""The comparison of the async and the sync half of what is written twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_twins.py"
sys.path.insert(0, str(SCRIPT.parent))

from check_twins import differences, members_of  # noqa: E402

ASYNC = """
class Reader:
    def __init__(self, source: AsyncSource) -> None:
        self._source = source

    async def read(self) -> bytes:
        \"""Read.\"""
        async with self._source.open() as opened:
            return await opened.read()
"""
SYNC = """
class SyncReader:
    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self) -> bytes:
        with self._source.open_sync() as opened:
            return opened.read_sync()
"""
CANCELLED = """
        # async only: a thread is not cancelled.
        # It ends with its process.
        except asyncio.CancelledError:
            await self.close()
            raise
"""


def compared(first: str, second: str) -> list[str]:
    return list(differences(members_of(first, "Reader"), members_of(second, "SyncReader")))


def test_await_and_names_are_no_difference() -> None:
    """What every async half has and no sync half, types and docstrings are not compared."""
    assert compared(ASYNC, SYNC) == []


def test_a_difference_is_found() -> None:
    """The method and the lines are named."""
    (found,) = compared(ASYNC, SYNC.replace("opened.read_sync()", "opened.read_sync(1)"))

    assert found.splitlines() == ["read", "    -         return opened.read()", "    +         return opened.read(1)"]


@pytest.mark.parametrize("mark", ["  # async only: to be polite", "  # async only:", ""])
def test_a_marked_statement_needs_a_reason(mark: str) -> None:
    """A mark is valid with a reason only."""
    asynchronous = ASYNC.replace("self._source = source", f"self._source = source\n        self._polite = True{mark}")

    assert (compared(asynchronous, SYNC) == []) is mark.endswith("polite")


def test_a_marked_handler_is_not_compared() -> None:
    """The try around it is none, where it has no other handlers. A reason may have several lines."""
    body = "async with self._source.open() as opened:\n            return await opened.read()\n"
    tried = "try:\n            " + body.replace("\n    ", "\n        ") + CANCELLED
    asynchronous = ASYNC.replace(body, tried)
    assert "try:" in asynchronous

    assert compared(asynchronous, SYNC) == []
    assert len(compared(asynchronous.replace("async only", "note"), SYNC)) == 1


def test_a_method_of_one_half_is_found_and_the_order_of_methods_too() -> None:
    """Unless it is marked."""
    close = "\n    async def close(self) -> None:\n        await self._source.close()\n"
    marked = close.replace("    async", "    # async only: a thread needs none\n    async")
    close_sync = "    def close(self):\n        self._source.close_sync()\n\n"
    moved = SYNC.replace("    def __init__", f"{close_sync}    def __init__")

    assert compared(ASYNC + close, SYNC) == ["close is only in the async half"]
    assert compared(ASYNC + marked, SYNC) == []
    assert compared(ASYNC + close, moved) == ["order of methods: __init__, read, close; close, __init__, read"]


def test_the_halves_of_the_library_are_equal() -> None:
    """Every difference between them is marked with its reason."""
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)

    assert (run.returncode, run.stderr) == (0, "")

"""The checks of the package's plan: each finds what it is for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_house.py"


@pytest.fixture(scope="module")
def house() -> Any:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("check_house", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_house"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def failures(house: Any, package: Path, capsys: Any, **files: str) -> list[str]:
    """Write the files of a package, ``__`` in their names a folder, and return what is found in it."""
    for name, text in files.items():
        path = package.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    status = house.main(package)
    found: list[str] = capsys.readouterr().err.splitlines()
    assert status == bool(found)
    return found


def function(lines: int) -> str:
    """Write a function of so many code lines, with as many that do not count."""
    body = ["    x = 1", "", "    # why"] * (lines - 1)
    return "\n".join(["def long():", '    """Do it.', "", "    In time.", '    """', *body, ""])


def test_a_function_of_more_than_forty_lines_is_found(house, tmp_path, capsys):
    """Its docstring, comments and blank lines do not count."""
    assert failures(house, tmp_path, capsys, a=function(40)) == []
    assert failures(house, tmp_path, capsys, a=function(41)) == ["a.py:1: long has 41 code lines; 40 are allowed"]


def test_a_file_of_more_than_four_hundred_lines_is_found(house, tmp_path, capsys):
    """Every line counts."""
    assert failures(house, tmp_path, capsys, a="\n" * 400) == []
    assert failures(house, tmp_path, capsys, a="\n" * 401) == ["a.py: has 401 lines; 400 are allowed"]


@pytest.mark.parametrize("probe", ["hasattr(store, 'find')", "getattr(self._store, name, None)"])
def test_a_store_that_is_asked_for_its_attributes_is_found(house, tmp_path, capsys, probe):
    """Also in a file that may look at the objects of other libraries, but not where capabilities are declared."""
    found = failures(house, tmp_path, capsys, adapters__celery=probe, stores__base=probe)
    assert [each.partition(":")[0] for each in found] == ["adapters/celery.py"]


def test_a_probe_is_found_in_a_file_that_is_not_listed(house, tmp_path, capsys):
    """Each file that inspects objects has its reason in the script."""
    found = failures(house, tmp_path, capsys, consumer="hasattr(x, 'y')", _signature="hasattr(x, 'y')")
    assert [each.partition(":")[0] for each in found] == ["consumer.py"]


def test_rooms_that_are_not_planned_are_found(house, tmp_path, capsys):
    """Private modules at the top level, and packages."""
    (tmp_path / "__init__.py").touch()
    assert failures(house, tmp_path, capsys, _rules="", asgi="") == []
    for room in ("_http", "_shed"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    assert failures(house, tmp_path, capsys, _core="") == [
        "_core.py: is not in the plan of the rooms",
        "_shed: is not in the plan of the rooms",
    ]


@pytest.mark.parametrize(
    "text", ['"""Lest it fails."""', "x = 1  # lest it fails", "lest = 1", "_lest_of = 1", "class LestError: ..."]
)
def test_words_that_are_not_plain_are_found(house, tmp_path, capsys, text):
    """In docstrings, comments and names."""
    (found,) = failures(house, tmp_path, capsys, a=text)
    assert found == "the word 'lest' occurs 1 times; 0 are allowed: a.py 1"


def test_words_within_words_and_texts_are_not_found(house, tmp_path, capsys):
    """What an error says is not judged, nor are words such as return."""
    assert failures(house, tmp_path, capsys, a="x = 'told'\ndef y():\n    return address") == []

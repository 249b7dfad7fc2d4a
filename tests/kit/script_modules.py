"""Import the modules of one folder of scripts by their plain names, as the scripts themselves do."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def script_modules(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[str], Any]:
    """Let a test import the modules of this folder, anew.

    Two folders have modules of the same name: without this, a test would be given the one that an earlier test
    imported. The level of the log, which a script may set, stays that of the tests.
    """
    monkeypatch.setattr(logging.getLogger("idempotency"), "setLevel", lambda level: None)
    for file in folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module

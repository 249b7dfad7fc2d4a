"""Reset the stores that exist in a process that was forked."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forking(Protocol):
    """A store that a fork copies into the child."""

    def forked(self) -> None:
        """Use nothing of the parent process any more."""
        ...


FORKING: WeakSet[Forking] = WeakSet()
"""Every store of this process."""


def _forked() -> None:
    for store in list(FORKING):
        store.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

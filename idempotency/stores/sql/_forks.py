"""Stores must drop their connections in each child process that is forked."""

from __future__ import annotations

import os
from weakref import WeakSet

from idempotency.stores.base import Forkable

_stores: WeakSet[Forkable] = WeakSet()


def drop_in_children(store: Forkable) -> None:
    """Call ``store.forked()`` in each child that this process forks."""
    _stores.add(store)


def _forked() -> None:
    for store in list(_stores):
        store.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

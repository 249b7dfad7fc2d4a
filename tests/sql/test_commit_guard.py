"""The commit guard listens to SQLAlchemy's sessions only once an operation needs it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import event

from idempotency._sql import commit_guard

LISTENERS = """
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionEvents

def listeners():
    names = [name for name in vars(SessionEvents) if name.startswith(("before_", "after_", "do_"))]
    return {name for name in names if list(getattr(Session().dispatch, name))}

before = listeners()
assert "before_commit" in vars(SessionEvents)
"""
IMPORTED = """
import idempotency.stores.sql
import idempotency._sql.commit_guard
import idempotency._engine.joined
import idempotency._engine.joined_sync
assert listeners() == before, listeners()
"""
JOINED = """
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from idempotency import idempotent
from idempotency.errors import TransactionError
from idempotency.stores.sql import SQLStore

engine = create_engine("sqlite:///records.db")

store = SQLStore(engine)
# Already here, before other threads run sessions.
guarded = {"before_commit", "after_begin", "after_transaction_end", "after_soft_rollback"}
assert listeners() - before == guarded - before, listeners()

@idempotent(key=lambda order: order, store=store, session=sessionmaker(engine))
def place(order: str, *, session: Session) -> None:
    session.execute(text("SELECT 1"))
    session.commit()

try:
    place("a")
except TransactionError:
    pass
else:
    raise AssertionError("the commit was not refused")
"""


def run(program: str, directory: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_import_adds_no_listener(tmp_path: Path) -> None:
    """A process that imports the store, and never joins a transaction, has the sessions of SQLAlchemy as they were."""
    run(LISTENERS + IMPORTED, tmp_path)


def test_a_joined_operation_adds_the_guard(tmp_path: Path) -> None:
    """Its sessions are guarded from the time they are accepted, and so is the first operation."""
    run(LISTENERS + IMPORTED + JOINED, tmp_path)


def test_many_threads_add_each_listener_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that guard their first session at once add the listeners once."""
    added = []
    monkeypatch.setattr(commit_guard, "_installed", False)
    monkeypatch.setattr(event, "listen", lambda _, name, *__, **___: added.append(name))
    barrier = threading.Barrier(8)

    def install() -> None:
        barrier.wait()
        commit_guard.install()

    threads = [threading.Thread(target=install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(added) == sorted(commit_guard._LISTENERS)


def test_the_guard_comes_before_the_applications_own_listeners(tmp_path: Path) -> None:
    """A commit is refused before a listener of the application has acted on it, whichever was added first."""
    heard = """
committed = []
event.listen(Session, "before_commit", committed.append)
"""
    run(LISTENERS + heard + JOINED + "assert not committed, committed", tmp_path)

"""Whether a server lets a relay read its log, and what an operator should know of a slot."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text

from idempotency.errors import ConfigurationError
from idempotency.outbox._slot import HAS_MESSAGES, Slot, SlotState, read_slot, version_of
from idempotency.stores.base import Finding

_OLDEST = 10
_UNLIMITED = "-1"

# Settings that a version does not have are NULL. The last one is in seconds, with a unit where it is not 0.
_SETTINGS = text(
    "SELECT current_setting('wal_level') AS wal_level,"
    " current_setting('effective_wal_level', true) AS effective_wal_level,"
    " coalesce(current_setting('max_slot_wal_keep_size', true), '-1') AS most_retained,"
    " (SELECT CAST(setting AS float) FROM pg_settings WHERE name = 'idle_replication_slot_timeout') AS idle_timeout"
)


def check_server(connection: Connection, slot: Slot, allow_unlimited_wal: bool) -> None:
    """Raise ConfigurationError, which names the remedy, where the slot cannot or should not be read."""
    version = version_of(connection)
    oldest = HAS_MESSAGES if slot.messages else _OLDEST
    if version < oldest:
        mode = "mode='message'" if slot.messages else "LogRelay"
        raise ConfigurationError(f"{mode} needs PostgreSQL {oldest}, and this is {version}: use PollingRelay")
    settings = connection.execute(_SETTINGS).one()
    problem = _problem_of_level(settings)
    if problem is not None:
        raise ConfigurationError(problem)
    if settings.most_retained == _UNLIMITED and not allow_unlimited_wal:
        raise ConfigurationError(
            "max_slot_wal_keep_size is -1, so that a relay that is stopped lets the log fill the disk of the server:"
            " ALTER SYSTEM SET max_slot_wal_keep_size = '10GB' and reload, or give allow_unlimited_wal=True,"
            " on the command line --allow-unlimited-wal"
        )


def slot_findings(connection: Connection, name: str, longest_poll: float = 1.0) -> list[Finding]:
    """Return what an operator should know of a slot and its server; an empty list if there is no such slot.

    ``longest_poll``: the longest time in seconds between two looks of its relay at the log.
    """
    state = read_slot(connection, name)
    if state is None:
        return []
    settings = connection.execute(_SETTINGS).one()
    findings = [_finding_of_state(name, state)]
    problem = _problem_of_level(settings)
    if problem is not None:
        findings.append(Finding("fix", problem))
    if settings.most_retained == _UNLIMITED:
        findings.append(
            Finding("note", "max_slot_wal_keep_size is -1: a relay that is stopped lets the log fill the disk")
        )
    if settings.idle_timeout and settings.idle_timeout < 10 * longest_poll:
        findings.append(
            Finding(
                "fix",
                f"idle_replication_slot_timeout is {settings.idle_timeout:g} s, and a relay may read the slot every"
                f" {longest_poll:g} s only: the server would make it invalid; set it to minutes",
            )
        )
    return findings


def _finding_of_state(name: str, state: SlotState) -> Finding:
    if state.lost is not None:
        return Finding(
            "fix",
            f"slot {name} is lost ({state.lost}): a relay of the table makes it anew; in message mode, what was not"
            " read yet is lost",
        )
    parts = [f"slot {name}: {_size(state.retained or 0)} of log are retained for it"]
    if state.status is not None:
        parts.append(f"its log is {state.status}")
    if state.safe is not None:
        parts.append(f"{_size(state.safe)} more can be written before it is lost")
    if state.inactive_since is not None and not state.active:
        parts.append(f"it was read last at {state.inactive_since}")
    # What is retained beyond the limit goes with the next checkpoint.
    level: Any = "fix" if state.status == "unreserved" else "note" if state.status == "extended" else "ok"
    return Finding(level, "; ".join(parts))


def _problem_of_level(settings: Any) -> str | None:
    # From PostgreSQL 19 the server raises the level itself when a slot is created.
    level = settings.wal_level
    if level == "logical" or (settings.effective_wal_level is not None and level == "replica"):
        return None
    return f"wal_level is {level}, and must be logical: ALTER SYSTEM SET wal_level = 'logical', and restart the server"


def _size(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"

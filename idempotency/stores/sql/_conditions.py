"""Conditions on a row of the table of records, in which ``{now}`` is the database's clock; see ``_statements.py``."""

from __future__ import annotations

from idempotency._rules import FORMAT, State

# A lease of 0 is over by every clock: also by one that is set back, and by MariaDB's, which stands still during a
# statement.
UNTIL = "CASE WHEN :lease > 0 THEN {now} + :lease ELSE 0 END"

SANE = f"{{r}}version BETWEEN 1 AND {FORMAT} AND {{r}}attempt > 0"
EXPIRED = "COALESCE({r}expires_ms <= {now}, FALSE)"
RUNNING = f"{SANE} AND {{r}}state = {State.RUNNING:d}"
OURS = f"({RUNNING} AND {{r}}token = :token)"
LAPSED = (
    f"({RUNNING} AND {{r}}lease_until_ms <= {{now}} AND {{r}}lease_until_ms <= :latest"
    " AND NOT {r}hold AND NOT :hold AND {r}fingerprint = :fingerprint)"
)
# Whether the claim takes the row: it is expired, or _rules.takes_over says so.
FREE = f"({EXPIRED} OR {OURS} OR {LAPSED})"
OWNED = f"id = :id AND token = :token AND NOT {EXPIRED}"
# A record that is unresolved never expires. So expires_ms IS NULL, which an index finds, comes first.
UNRESOLVED = (
    f"(expires_ms IS NULL AND {SANE} AND (state = {State.UNKNOWN:d}"
    f" OR (state = {State.RUNNING:d} AND hold AND lease_until_ms <= {{now}})))"
)

# A lease of 0 is that of a record which counts something.
LISTED = {
    "unknown": UNRESOLVED,
    "running": f"{RUNNING} AND lease_until_ms > {{now}}",
    "lapsed": f"{RUNNING} AND NOT hold AND lease_until_ms <= {{now}} AND lease_until_ms > 0",
    "done": f"{SANE} AND state = {State.DONE:d}",
    None: f"NOT ({RUNNING} AND NOT hold AND lease_until_ms = 0)",
}

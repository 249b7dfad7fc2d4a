"""The database's own clock, as an expression in its SQL: all times of one database are by this one clock."""

from __future__ import annotations

# It does not depend on the session's time zone, in which one hour of each year may occur twice.
_MYSQL = "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000)"

NOW_MS = {
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)",
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "sqlite": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}
"""Milliseconds since the epoch, by the name of the dialect. MariaDB's clock stands still during a statement."""

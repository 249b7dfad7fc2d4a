"""Name the transaction that keeps a database from cleaning deleted rows away, with its statement and no values."""

from __future__ import annotations

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from idempotency._sql.statement_text import without_values

LONG = 30.0
"""After how many seconds an open transaction is worth a line."""

_MANY_TRANSACTIONS = 10_000
"""After how many later transactions a standby or slot is worth a line: of these, no time is known."""

# A session of another database does not count for this one's tables, nor does VACUUM; a walsender has no database.
_HORIZONS = text(
    """
    SELECT kind, name, age, seconds, state, statement FROM (
        SELECT 'session' AS kind, pid || ' of ' || coalesce(usename, '?') AS name,
               greatest(age(backend_xid), age(backend_xmin)) AS age,
               extract(epoch FROM clock_timestamp() - xact_start) AS seconds, state, query AS statement
        FROM pg_stat_activity
        WHERE coalesce(backend_xid, backend_xmin) IS NOT NULL AND pid <> pg_backend_pid()
              AND coalesce(datname, current_database()) = current_database()
              AND pid NOT IN (SELECT pid FROM pg_stat_replication) AND query !~* '^(autovacuum: )?vacuum'
        UNION ALL
        SELECT 'prepared transaction', gid, age(transaction),
               extract(epoch FROM clock_timestamp() - prepared), NULL, NULL
        FROM pg_prepared_xacts WHERE database = current_database()
        UNION ALL
        SELECT 'standby', coalesce(application_name, '?'), age(backend_xmin), NULL, NULL, NULL
        FROM pg_stat_replication WHERE backend_xmin IS NOT NULL
        UNION ALL
        SELECT 'replication slot', slot_name, age(xmin), NULL, NULL, NULL
        FROM pg_replication_slots WHERE xmin IS NOT NULL
    ) AS horizon
    ORDER BY age DESC, seconds DESC NULLS LAST LIMIT 1
    """
)
_TRANSACTIONS = text(
    """
    SELECT trx_mysql_thread_id AS thread, TIMESTAMPDIFF(SECOND, trx_started, NOW()) AS seconds, trx_query AS statement
    FROM information_schema.innodb_trx WHERE trx_mysql_thread_id <> CONNECTION_ID() ORDER BY trx_started LIMIT 1
    """
)
_HOLDS = "deleted messages cannot be cleaned away before it ends"


def postgresql_holder(connection: Connection) -> str | None:
    """Say who holds the oldest snapshot or transaction; None if nobody has held one for long."""
    found = connection.execute(_HORIZONS).one_or_none()
    if found is None:
        return None
    if found.age < _MANY_TRANSACTIONS if found.seconds is None else found.seconds < LONG:
        return None
    since = "" if found.seconds is None else f" has been open for {found.seconds:.0f} s"
    line = f"{found.kind} {found.name}{since}: {_HOLDS}"
    if found.statement is None:
        return line
    if found.state is None:
        return f"{line}; a member of pg_monitor can see its statement"
    return f"{line}; {found.state}: {without_values(found.statement, 'postgresql')}"


def mysql_holder(connection: Connection) -> str | None:
    """Say which transaction has been open for the longest time; None if none has been for long."""
    try:
        found = connection.execute(_TRANSACTIONS).one_or_none()
    except DBAPIError:
        return "open transactions cannot be seen: grant PROCESS to the user of doctor"
    if found is None or found.seconds < LONG:
        return None
    statement = without_values(found.statement, "mysql") if found.statement else "idle"
    return f"transaction of thread {found.thread} has been open for {found.seconds} s: {_HOLDS}; {statement}"

"""Records in a SQL database, by the engine the application already has: PostgreSQL, MariaDB, MySQL or SQLite."""

from idempotency.stores.sql._saga_table import SagaTables, saga_schema_sql, saga_tables
from idempotency.stores.sql._store import SQLStore
from idempotency.stores.sql._table import audit_table, records_table, schema_sql
from idempotency.stores.sql._upgrade import upgrade_sql

__all__ = [
    "SQLStore",
    "SagaTables",
    "audit_table",
    "records_table",
    "saga_schema_sql",
    "saga_tables",
    "schema_sql",
    "upgrade_sql",
]

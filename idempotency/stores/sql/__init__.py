"""Records in a SQL database, by the engine the application already has: PostgreSQL, MariaDB, MySQL or SQLite."""

from idempotency.stores.sql._store import SQLStore
from idempotency.stores.sql._table import records_table, schema_sql

__all__ = ["SQLStore", "records_table", "schema_sql"]

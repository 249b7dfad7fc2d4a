"""The statements that add to a table of records the columns that an earlier release did not create."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import MetaData
from sqlalchemy.schema import CreateColumn

from idempotency._sql.tables import dialect_named
from idempotency.stores.sql._operation_name import COLUMN, FINGERPRINT
from idempotency.stores.sql._table import DEFAULT_TABLE, records_table


class _Way(NamedTuple):
    """How a database adds columns without waiting long for a lock, and without writing the rows anew."""

    first: str
    add: str
    last: str = ""


_WAYS = {
    "postgresql": _Way("SET lock_timeout = '2s';\n", "ADD COLUMN IF NOT EXISTS"),
    "mariadb": _Way("SET lock_wait_timeout = 2;\n", "ADD COLUMN IF NOT EXISTS", ", ALGORITHM=INSTANT"),
    "mysql": _Way("SET lock_wait_timeout = 2;\n", "ADD COLUMN", ", ALGORITHM=INSTANT"),
}


def upgrade_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that add to a table of before what ``write_version=2`` writes.

    They change no row, and wait up to two seconds for a lock, which they need for a moment. ``dialect`` and ``table``
    are those of :func:`~idempotency.stores.sql.schema_sql`.
    """
    known, records = dialect_named(dialect), records_table(MetaData(), table)
    name = known.identifier_preparer.format_table(records)
    columns = [str(CreateColumn(records.c[each]).compile(dialect=known)) for each in (COLUMN, FINGERPRINT)]
    if known.name == "sqlite":
        return "".join(f"ALTER TABLE {name} ADD COLUMN {column};\n" for column in columns)
    way = _WAYS[known.name]
    added = ", ".join(f"{way.add} {column}" for column in columns)
    return f"{way.first}ALTER TABLE {name} {added}{way.last};\n"

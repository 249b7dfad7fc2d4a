"""The tables of sagas as SQLAlchemy describes them: one of sagas, and one of their entries."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from idempotency._sagas.journal import MOST_CHARACTERS
from idempotency._sql.tables import MYSQL, MYSQL_TABLE, dialect_named, split_name
from idempotency.stores.sql._table import DEFAULT_TABLE, check_schema

_ID = LargeBinary(32).with_variant(mysql.BINARY(32), *MYSQL)
# As bytes on MySQL and MariaDB: in a text column, two names would be the same that differ in spaces at their ends.
_NAME = String(MOST_CHARACTERS).with_variant(mysql.VARBINARY(4 * MOST_CHARACTERS), *MYSQL)
_BYTES = LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)


class SagaTables(NamedTuple):
    """The tables of the sagas of one store."""

    sagas: Table
    entries: Table

    def located(self, schema: str | None) -> SagaTables:
        """Return the tables in ``schema``, where SQLAlchemy's option ``schema_translate_map`` may have moved them."""
        check_schema(self.sagas, schema)
        return self if schema == self.sagas.schema else _described(MetaData(), schema, self.sagas.name)


def saga_tables(metadata: MetaData, name: str = DEFAULT_TABLE) -> SagaTables:
    """Make the tables of sagas in ``metadata``, for Alembic, or to be created with the other tables.

    ``name`` is the name of the store's table of records, as for :func:`~idempotency.stores.sql.records_table`. The
    sagas are in ``NAME_saga``, and their entries in ``NAME_saga_entry``.
    """
    schema, records = split_name(name)
    return _described(metadata, schema, f"{records}_saga")


def saga_schema_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that create the tables of sagas; see :func:`~idempotency.stores.sql.schema_sql`."""
    known = dialect_named(dialect)
    tables = saga_tables(MetaData(), table)
    statements: list[ExecutableDDLElement] = [*map(CreateTable, tables), *map(CreateIndex, _indexes(tables.sagas))]
    return "\n".join(f"{str(statement.compile(dialect=known)).strip()};\n" for statement in statements)


def _indexes(table: Table) -> list[Index]:
    return sorted(table.indexes, key=lambda index: str(index.name))


def _described(metadata: MetaData, schema: str | None, name: str) -> SagaTables:
    # No foreign key: SQLite enforces none unless it is asked to on each connection, and elsewhere each entry would
    # cost a look at its saga. A saga is deleted with its entries by one transaction, which has locked its row.
    return SagaTables(_sagas(metadata, schema, name), _entries(metadata, schema, f"{name}_entry"))


def _sagas(metadata: MetaData, schema: str | None, name: str) -> Table:
    table = Table(
        name,
        metadata,
        Column("id", _ID, primary_key=True),
        Column("name", _NAME, nullable=False),
        Column("key", Text().with_variant(mysql.LONGTEXT(), *MYSQL), nullable=False),
        Column("version", SmallInteger, nullable=False),
        Column("phase", SmallInteger, nullable=False),
        Column("token", String(64), nullable=False),
        Column("owned", Boolean, nullable=False),
        Column("fingerprint", LargeBinary(64).with_variant(mysql.VARBINARY(64), *MYSQL), nullable=False),
        Column("input", _BYTES, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("crashes", Integer, nullable=False),
        Column("wakes", Integer, nullable=False),
        Column("reason", _BYTES),
        Column("result", _BYTES),
        Column("created_ms", BigInteger, nullable=False),
        Column("due_ms", BigInteger),
        Column("deadline_ms", BigInteger),
        Column("expires_ms", BigInteger),
        schema=schema,
        **MYSQL_TABLE,
    )
    # Each saga is in one of them, or in none if it is stuck.
    for index, column in (("due", table.c.due_ms), ("expires", table.c.expires_ms)):
        there = column.is_not(None)
        Index(f"{name}_{index}", column, postgresql_where=there, sqlite_where=there)
    return table


def _entries(metadata: MetaData, schema: str | None, name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("saga_id", _ID, primary_key=True),
        Column("name", _NAME, primary_key=True),
        Column("progress", SmallInteger, nullable=False),
        Column("ord", Integer, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("body", _BYTES, nullable=False),
        Column("began_ms", BigInteger, nullable=False),
        Column("changed_ms", BigInteger, nullable=False),
        schema=schema,
        **MYSQL_TABLE,
    )

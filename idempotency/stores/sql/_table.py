"""The table of records and that of the audit as SQLAlchemy describes them, and how they are created."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Identity,
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

from idempotency._sql.tables import LONG_BYTES, MYSQL, MYSQL_TABLE, dialect_named, split_name
from idempotency.errors import ConfigurationError
from idempotency.stores.sql._operation_name import COLUMN, FINGERPRINT

DEFAULT_TABLE = "idempotency_record"

SCHEMAS = 256
"""Of how many schemas the statements are cached, where each connection may have another one."""

# The statements are text, in which SQLAlchemy and the drivers give these characters a meaning.
_NOT_IN_TEXT = re.compile(r"[:%\\\0]")


def records_table(metadata: MetaData, name: str = DEFAULT_TABLE) -> Table:
    """Make the table of records in ``metadata``, for Alembic, or to be created with the other tables.

    ``name`` may be ``"schema.table"``; without a schema, that of ``metadata`` applies. A store uses the same table if
    it is given the ``fullname`` of what this returns: ``SQLStore(engine, table=records.fullname)``.
    Raises :class:`~idempotency.errors.ConfigurationError` unless the name is an identifier of at most 50 characters,
    and the schema in it an identifier of at most 63.
    """
    return _described(metadata, *split_name(name))


def _described(metadata: MetaData, schema: str | None, name: str) -> Table:
    unbounded = Text().with_variant(mysql.TEXT(), *MYSQL)
    return Table(
        name,
        metadata,
        Column("id", LargeBinary(32).with_variant(mysql.BINARY(32), *MYSQL), primary_key=True),
        Column("scope", unbounded, nullable=False),
        Column("key", unbounded, nullable=False),
        Column("version", SmallInteger, nullable=False),
        Column("state", SmallInteger, nullable=False),
        Column("token", String(64), nullable=False),
        Column("fingerprint", LargeBinary(64).with_variant(mysql.VARBINARY(64), *MYSQL), nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("hold", Boolean, nullable=False),
        Column("watched", Boolean, nullable=False),
        Column("created_ms", BigInteger, nullable=False),
        Column("lease_until_ms", BigInteger, nullable=False),
        Column("expires_ms", BigInteger),
        Column("result", LONG_BYTES),
        # Since version 2 of what is written (stores/_versions.py). A table of before may lack them.
        Column(COLUMN, unbounded),
        Column(FINGERPRINT, LargeBinary(64).with_variant(mysql.VARBINARY(64), *MYSQL)),
        Index(f"{name}_expires", "expires_ms"),
        schema=schema,
        **MYSQL_TABLE,
    )


def audit_table(metadata: MetaData, name: str = DEFAULT_TABLE) -> Table:
    """Make the table of the audit in ``metadata``, for Alembic, or to be created with the other tables.

    ``name`` is the name of the store's table of records, as for :func:`~idempotency.stores.sql.records_table`. The
    audit is in ``NAME_audit``.
    """
    schema, records = split_name(name)
    return _audit(metadata, schema, f"{records}_audit")


def _audit(metadata: MetaData, schema: str | None, name: str) -> Table:
    place = BigInteger().with_variant(Integer, "sqlite")
    return Table(
        name,
        metadata,
        Column("seq", place, Identity(), primary_key=True),
        Column("id", String(32), nullable=False),
        Column("began_ms", BigInteger, nullable=False),
        Column("operator", Text, nullable=False),
        Column("action", Text, nullable=False),
        Column("thing", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("outcome", Text),
        Index(f"{name}_id", "id"),
        schema=schema,
        **MYSQL_TABLE,
        sqlite_autoincrement=True,
    )


def located(table: Table, schema: str | None) -> Table:
    """Return the table in ``schema``, where SQLAlchemy's option ``schema_translate_map`` may have moved it."""
    check_schema(table, schema)
    return table if schema == table.schema else _described(MetaData(), schema, table.name)


def check_schema(table: Table, schema: str | None) -> None:
    """Raise ConfigurationError for a schema whose name cannot be written in a statement."""
    if schema is not None and _NOT_IN_TEXT.search(schema):
        raise ConfigurationError(f"the schema of the table {table.name} has a : or % or backslash in its name")


def schema_by(options: Mapping[str, Any], table: Table) -> str | None:
    """Return the schema of the table under these execution options of SQLAlchemy."""
    schemas = options.get("schema_translate_map") or {}
    return schemas.get(table.schema, table.schema)


def check_same_schema(table: Table, claimed: str | None, completed: str | None) -> None:
    """Raise ConfigurationError where a record would be claimed in one schema and completed in another."""
    if claimed != completed:
        claimed_as, completed_as = located(table, claimed).fullname, located(table, completed).fullname
        raise ConfigurationError(
            f"the record is claimed in the table {claimed_as}, and the session has the table {completed_as}: give the"
            " store's engine and the sessions the same schema_translate_map, or the store a table whose schema is named"
        )


def schema_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that create the tables, for ``"postgresql"``, ``"mysql"``, ``"mariadb"`` or ``"sqlite"``.

    ``table`` may be ``"schema.table"``; the schema itself must be there.
    """
    known = dialect_named(dialect)
    tables = [records_table(MetaData(), table), audit_table(MetaData(), table)]
    statements: list[ExecutableDDLElement] = []
    for each in tables:
        statements += [CreateTable(each), *map(CreateIndex, each.indexes)]
    return "\n".join(f"{str(statement.compile(dialect=known)).strip()};\n" for statement in statements)

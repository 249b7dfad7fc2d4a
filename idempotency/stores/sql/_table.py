"""The table of records as SQLAlchemy describes it, and how it is created."""

from __future__ import annotations

import re

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    make_url,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from idempotency.errors import ConfigurationError

DEFAULT_TABLE = "idempotency_record"
_DUPLICATE_INDEX = 1061


def records_table(metadata: MetaData, name: str = DEFAULT_TABLE) -> Table:
    """Make the table of records in ``metadata``, for Alembic, or to be created with the other tables.

    Raises :class:`~idempotency.errors.ConfigurationError` unless the name is an identifier of at most 50 characters.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,49}", name):
        raise ConfigurationError(f"table must be an identifier of at most 50 letters, digits and _, not {name!r}")
    unbounded = Text().with_variant(mysql.TEXT(), "mysql", "mariadb")
    return Table(
        name,
        metadata,
        Column("id", LargeBinary(32).with_variant(mysql.BINARY(32), "mysql", "mariadb"), primary_key=True),
        Column("scope", unbounded, nullable=False),
        Column("key", unbounded, nullable=False),
        Column("version", SmallInteger, nullable=False),
        Column("state", SmallInteger, nullable=False),
        Column("token", String(64), nullable=False),
        Column("fingerprint", LargeBinary(64).with_variant(mysql.VARBINARY(64), "mysql", "mariadb"), nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("hold", Boolean, nullable=False),
        Column("watched", Boolean, nullable=False),
        Column("created_ms", BigInteger, nullable=False),
        Column("lease_until_ms", BigInteger, nullable=False),
        Column("expires_ms", BigInteger),
        Column("result", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")),
        Index(f"{name}_expires", "expires_ms"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def schema_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that create the table, for ``"postgresql"``, ``"mysql"``, ``"mariadb"`` or ``"sqlite"``."""
    try:
        known = make_url(f"{dialect}://").get_dialect()()
    except ArgumentError as error:
        raise ConfigurationError(f"dialect must be postgresql, mysql, mariadb or sqlite, not {dialect!r}") from error
    records = records_table(MetaData(), table)
    statements: list[ExecutableDDLElement] = [CreateTable(records), *map(CreateIndex, records.indexes)]
    return "\n".join(f"{str(statement.compile(dialect=known)).strip()};\n" for statement in statements)


def create_schema(connection: Connection, table: Table) -> None:
    """Create the table and its index where they are missing; any number of processes may do so at once."""
    name = connection.dialect.name
    if name == "postgresql":
        # IF NOT EXISTS first looks and then creates: of two at once, one would fail on the catalogue's unique index.
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"create {table.name}"})
    connection.execute(CreateTable(table, if_not_exists=True))
    for index in table.indexes:
        try:
            connection.execute(CreateIndex(index, if_not_exists=name not in ("mysql", "mariadb")))
        except DBAPIError as error:
            if _DUPLICATE_INDEX not in getattr(error.orig, "args", ()):
                raise

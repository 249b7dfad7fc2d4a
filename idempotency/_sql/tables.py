"""Names of tables, and their creation by any number of processes at once."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, Dialect, LargeBinary, Table, make_url, text
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from idempotency.errors import ConfigurationError

MYSQL = ("mysql", "mariadb")
"""The names of the dialects of MariaDB and MySQL: that in the URL is the one that is used."""

MYSQL_TABLE: Any = {
    f"{dialect}_{name}": value
    for dialect in MYSQL
    for name, value in (("engine", "InnoDB"), ("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}
"""Options of each ``Table``, by the name of the dialect."""

LONG_BYTES: Any = LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)
"""The type of a column for bytes. Elsewhere they have no limit; on MariaDB and MySQL these are 4 GB, else 64 KB."""

_DUPLICATE_INDEX = 1061
_NAME = re.compile(r"(?:([A-Za-z_][A-Za-z0-9_]{0,62})\.)?([A-Za-z_][A-Za-z0-9_]{0,49})")


def split_name(name: str) -> tuple[str | None, str]:
    """Return the schema and the name of a table, of ``"table"`` or ``"schema.table"``.

    Raises :class:`~idempotency.errors.ConfigurationError` unless the name is an identifier of at most 50 characters,
    which leaves place for the names of its indexes, and the schema an identifier of at most 63.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigurationError(
            "table must be an identifier of at most 50 letters, digits and _, with its schema and a dot before it or"
            f" without, not {name!r}"
        )
    schema, table = found.groups()
    return schema, table


def dialect_named(dialect: str) -> Dialect:
    """Return SQLAlchemy's dialect of that name; ConfigurationError if there is none."""
    try:
        return make_url(f"{dialect}://").get_dialect()()
    except ArgumentError as error:
        raise ConfigurationError(f"dialect must be postgresql, mysql, mariadb or sqlite, not {dialect!r}") from error


def full_name(connection: Connection, table: Table) -> str:
    """Return the quoted name of a table, with the schema that it has on this connection."""
    quote = connection.dialect.identifier_preparer
    schema, name = connection.schema_for_object(table), quote.quote(table.name)
    return name if schema is None else f"{quote.quote_schema(schema)}.{name}"


def check_last_character(connection: Connection, what: str, name: str) -> None:
    """Refuse a name that MariaDB takes for another one; ConfigurationError."""
    if connection.dialect.name in MYSQL and name.endswith(" "):
        raise ConfigurationError(f"{what} must not end with a space on MariaDB, which ignores it: {name!r}")


def create_sql(dialect: str, *tables: Table) -> str:
    """Return the statements that create the tables and their indexes, for the dialect of that name."""
    known = dialect_named(dialect)
    statements: list[ExecutableDDLElement] = [CreateTable(table) for table in tables]
    statements += [CreateIndex(index) for table in tables for index in table.indexes]
    return "".join(f"{str(each.compile(dialect=known)).strip()};\n" for each in statements)


def create_tables(connection: Connection, *tables: Table) -> None:
    """Create the tables and their indexes where they are missing; any number of processes may do so at once."""
    name = connection.dialect.name
    if name == "postgresql":
        # IF NOT EXISTS first looks and then creates: of two at once, one would fail on the catalogue's unique index.
        lock = {"name": f"create {full_name(connection, tables[0])}"}
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), lock)
    for table in tables:
        # The DDL, which SQLAlchemy makes, obeys the connection's schema_translate_map by itself.
        connection.execute(CreateTable(table, if_not_exists=True))
        for index in table.indexes:
            try:
                connection.execute(CreateIndex(index, if_not_exists=name not in MYSQL))
            except DBAPIError as error:
                if _DUPLICATE_INDEX not in getattr(error.orig, "args", ()):
                    raise

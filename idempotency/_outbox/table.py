"""The tables of the outbox as SQLAlchemy describes them, and how they are created."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from idempotency._sql.clock import NOW_MS
from idempotency._sql.tables import LONG_BYTES, MYSQL, MYSQL_TABLE, create_tables, dialect_named, full_name, split_name

DEFAULT_TABLE = "outbox"

BUCKETS = 64
"""Over how many buckets the keys are spread. Relays share the buckets, so that more than 64 relays are of no use."""

MOST_CHARACTERS = 255
"""Of the type of an aggregate, of its id, and of the type of a message."""

# A row lives for a moment. So the table is cleaned by the number of its dead rows, not by their share.
_STORAGE = (
    "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,"
    " autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 1000, autovacuum_vacuum_cost_delay = 0"
)


def outbox_table(metadata: MetaData, name: str = DEFAULT_TABLE) -> Table:
    """Make the tables of an outbox in ``metadata``, for Alembic, or to be created with the other tables.

    It returns the table of messages. Beside it are ``NAME_dead`` for messages that were given up, ``NAME_lease`` by
    which relays share the work, and ``NAME_position`` for relays that read the log of PostgreSQL. ``name`` may be
    ``"schema.table"``; without a schema, that of ``metadata`` applies.
    Raises :class:`~idempotency.errors.ConfigurationError` unless the name is an identifier of at most 50 characters,
    and the schema in it an identifier of at most 63.
    """
    return Tables(metadata, name).messages


class Tables:
    """The tables of one outbox."""

    def __init__(self, metadata: MetaData, name: str = DEFAULT_TABLE) -> None:
        schema, name = split_name(name)
        self.messages = _table(metadata, schema, name, *_id_and_order(), *_message(), *_delivery())
        self._indexed(self.messages)
        self.dead = _table(
            metadata,
            schema,
            f"{name}_dead",
            *_id_and_order(),
            *_message(),
            *_delivery(),
            Column("reason", Text, nullable=False),
            Column("died_ms", BigInteger, nullable=False),
        )
        self.lease = _table(
            metadata,
            schema,
            f"{name}_lease",
            Column("name", String(64), primary_key=True),
            Column("owner", String(36), nullable=False),
            Column("until_ms", BigInteger, nullable=False),
        )
        self.position = _table(
            metadata,
            schema,
            f"{name}_position",
            Column("slot", String(63), primary_key=True),
            Column("lsn", BigInteger, nullable=False),
            Column("change", Integer, nullable=False),
        )

    @staticmethod
    def _indexed(table: Table) -> None:
        # Rows that are scheduled or to be retried are found by their time; there are few of them.
        waits = table.c.available_ms.is_not(None)
        Index(f"{table.name}_available", table.c.available_ms, postgresql_where=waits, sqlite_where=waits)

    @property
    def all(self) -> tuple[Table, Table, Table, Table]:
        """Return the tables, in the order in which they are created."""
        return self.messages, self.dead, self.lease, self.position

    def create(self, connection: Connection) -> None:
        """Create the tables where they are missing, in any number of processes at once."""
        create_tables(connection, *self.all)
        if connection.dialect.name == "postgresql":
            connection.execute(text(storage_sql(full_name(connection, self.messages))))


@lru_cache
def tables_named(name: str) -> Tables:
    """Return the tables of the outbox of that name, described once."""
    return Tables(MetaData(), name)


def storage_sql(table: str) -> str:
    """Return the statement by which PostgreSQL cleans the table often enough; SQLAlchemy cannot describe that."""
    return f"ALTER TABLE {table} SET ({_STORAGE})"


def outbox_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that create the tables, for ``"postgresql"``, ``"mysql"``, ``"mariadb"`` or ``"sqlite"``.

    ``table`` may be ``"schema.table"``; the schema itself must be there.
    """
    known = dialect_named(dialect)
    tables = Tables(MetaData(), table)
    statements: list[ExecutableDDLElement] = [CreateTable(each) for each in tables.all]
    statements += [CreateIndex(index) for each in tables.all for index in each.indexes]
    lines = [str(statement.compile(dialect=known)).strip() for statement in statements]
    if known.name == "postgresql":
        lines.append(storage_sql(tables.messages.fullname))
    return "\n".join(f"{line};\n" for line in lines)


def emitted_at(dialect: str) -> str:
    """Return the expression for the time of a row, which is the first column that is computed.

    On PostgreSQL it also gives the transaction its number, before the row gets its place in the order of rows. So a
    relay that has seen the end of every transaction up to a number has seen all rows up to a place.
    """
    now = NOW_MS[dialect]
    return f"CASE WHEN txid_current() > 0 THEN {now} END" if dialect == "postgresql" else now


def _table(metadata: MetaData, schema: str | None, name: str, *columns: Column[Any]) -> Table:
    return Table(
        name,
        metadata,
        *columns,
        schema=schema,
        **MYSQL_TABLE,
        sqlite_autoincrement=True,
    )


# created_ms is the first column, so that PostgreSQL computes it before seq: see emitted_at.
def _id_and_order() -> tuple[Column[Any], ...]:
    return (
        Column("created_ms", BigInteger, nullable=False),
        # A sequence, not the random id, is the order in which rows are stored.
        Column("seq", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
        Column("id", Uuid(as_uuid=False).with_variant(String(36), *MYSQL, "sqlite"), nullable=False),
    )


# Named as Debezium's Outbox Event Router expects them.
def _message() -> tuple[Column[Any], ...]:
    return (
        Column("aggregatetype", String(MOST_CHARACTERS), nullable=False),
        Column("aggregateid", String(MOST_CHARACTERS), nullable=False),
        Column("type", String(MOST_CHARACTERS), nullable=False),
        Column("payload", LONG_BYTES),
        Column("headers", Text().with_variant(mysql.LONGTEXT(), *MYSQL)),
    )


def _delivery() -> tuple[Column[Any], ...]:
    return (
        Column("bucket", SmallInteger, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("available_ms", BigInteger),
    )

"""The tables of streams as SQLAlchemy describes them, and how they are created."""

from __future__ import annotations

from functools import lru_cache

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
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects import mysql

from idempotency._sql.tables import MYSQL, MYSQL_TABLE, create_sql, create_tables, full_name, split_name

DEFAULT_TABLE = "stream_event"

MOST_CHARACTERS = 255
"""Of the name of a stream, and of the type of an event."""

_LONG_TEXT = Text().with_variant(mysql.LONGTEXT(), *MYSQL)
_START = "INSERT INTO {} (id, place) SELECT 1, 0 WHERE NOT EXISTS (SELECT 1 FROM {} WHERE id = 1)"


def streams_table(metadata: MetaData, name: str = DEFAULT_TABLE) -> Table:
    """Make the tables of streams in ``metadata``, for Alembic, or to be created with the other tables.

    It returns the table of events. Beside it are ``NAME_snapshot`` and ``NAME_place``, which needs one row: see
    :func:`streams_sql`. ``name`` may be ``"schema.table"``.
    Raises :class:`~idempotency.errors.ConfigurationError` unless the name is an identifier of at most 50 characters.
    """
    return Tables(metadata, name).events


class Tables:
    """The tables of one set of streams."""

    def __init__(self, metadata: MetaData, name: str = DEFAULT_TABLE) -> None:
        schema, name = split_name(name)
        options = {"schema": schema, "sqlite_autoincrement": True, **MYSQL_TABLE}
        self.events = Table(
            name,
            metadata,
            # PostgreSQL: the number of the transaction. MariaDB: given after the commit. SQLite: 0. See _statements.py.
            Column("place", BigInteger),
            Column("seq", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
            Column("stream", String(MOST_CHARACTERS), nullable=False),
            Column("version", BigInteger, nullable=False),
            Column("id", Uuid(as_uuid=False).with_variant(String(36), *MYSQL, "sqlite"), nullable=False),
            Column("type", String(MOST_CHARACTERS), nullable=False),
            Column("type_version", SmallInteger, nullable=False),
            Column("data", _LONG_TEXT, nullable=False),
            Column("headers", _LONG_TEXT),
            Column("created_ms", BigInteger, nullable=False),
            UniqueConstraint("stream", "version", name=f"{name}_version"),
            UniqueConstraint("id", name=f"{name}_id"),
            **options,
        )
        Index(f"{name}_order", self.events.c.place, self.events.c.seq)
        self.snapshots = Table(
            f"{name}_snapshot",
            metadata,
            Column("stream", String(MOST_CHARACTERS), primary_key=True),
            Column("type", String(MOST_CHARACTERS), primary_key=True),
            Column("type_version", SmallInteger, nullable=False),
            Column("version", BigInteger, nullable=False),
            Column("data", _LONG_TEXT, nullable=False),
            **options,
        )
        self.place = Table(
            f"{name}_place",
            metadata,
            Column("id", Integer, primary_key=True, autoincrement=False),
            # PostgreSQL: what is added to the number of a transaction. MariaDB: the last place that was given.
            Column("place", BigInteger, nullable=False),
            **options,
        )

    @property
    def all(self) -> tuple[Table, Table, Table]:
        """Return the tables, in the order in which they are created."""
        return self.events, self.snapshots, self.place

    def create(self, connection: Connection) -> None:
        """Create the tables where they are missing, in any number of processes at once."""
        create_tables(connection, *self.all)
        name = full_name(connection, self.place)
        ignored = "INSERT IGNORE" if connection.dialect.name in MYSQL else "INSERT"
        repeated = "" if connection.dialect.name in MYSQL else " ON CONFLICT DO NOTHING"
        connection.execute(text(_START.format(name, name).replace("INSERT", ignored, 1) + repeated))


@lru_cache
def tables_named(name: str) -> Tables:
    """Return the tables of that name, described once."""
    return Tables(MetaData(), name)


def streams_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that create the tables, for the dialect of that name, such as ``"postgresql"``."""
    tables = Tables(MetaData(), table)
    start = _START.format(tables.place.fullname, tables.place.fullname)
    return f"{create_sql(dialect, *tables.all)}{start};\n"

"""The tables of checkpoints as SQLAlchemy describes them, and how they are created."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Connection, Integer, MetaData, String, Table, Text

from idempotency._sql.tables import MYSQL_TABLE, create_sql, create_tables, split_name

DEFAULT_TABLE = "idempotency_checkpoint"

MOST_CHARACTERS = 255
"""Of the name of a consumer or projection, and of that of a stream."""

RUNNING, STOPPED, DROPPED = "running", "stopped", "dropped"
"""The states of a checkpoint."""


def projections_table(metadata: MetaData, name: str = DEFAULT_TABLE) -> Table:
    """Make the tables of checkpoints in ``metadata``, for Alembic, or to be created with the other tables.

    It returns the table of checkpoints. Beside it are ``NAME_live`` for the version of each projection that is read,
    and ``NAME_skipped`` for the events that an operator has skipped. ``name`` may be ``"schema.table"``.
    Raises :class:`~idempotency.errors.ConfigurationError` unless the name is an identifier of at most 50 characters.
    """
    return Tables(metadata, name).checkpoints


class Tables:
    """The tables of one set of checkpoints."""

    def __init__(self, metadata: MetaData, name: str = DEFAULT_TABLE) -> None:
        schema, name = split_name(name)
        options = {"schema": schema, **MYSQL_TABLE}
        self.checkpoints = Table(
            name,
            metadata,
            Column("consumer", String(MOST_CHARACTERS), primary_key=True),
            # That of a projection; 0 for a consumer that has none.
            Column("version", Integer, primary_key=True, autoincrement=False),
            # "" is all that a source has, in one order.
            Column("stream", String(MOST_CHARACTERS), primary_key=True),
            Column("place", BigInteger, nullable=False),
            Column("seq", BigInteger, nullable=False),
            Column("state", String(10), nullable=False),
            # How often the event at "failed" has failed alone, and with what class of error.
            Column("attempts", Integer, nullable=False),
            Column("error", String(MOST_CHARACTERS), nullable=False),
            Column("failed", String(41)),
            Column("moved_ms", BigInteger, nullable=False),
            **options,
        )
        self.live = Table(
            f"{name}_live",
            metadata,
            Column("name", String(MOST_CHARACTERS), primary_key=True),
            Column("version", Integer, nullable=False),
            **options,
        )
        self.skipped = Table(
            f"{name}_skipped",
            metadata,
            Column("consumer", String(MOST_CHARACTERS), primary_key=True),
            Column("version", Integer, primary_key=True, autoincrement=False),
            Column("position", String(41), primary_key=True),
            Column("error", String(MOST_CHARACTERS), nullable=False),
            Column("reason", Text, nullable=False),
            Column("at_ms", BigInteger, nullable=False),
            **options,
        )

    @property
    def all(self) -> tuple[Table, Table, Table]:
        """Return the tables, in the order in which they are created."""
        return self.checkpoints, self.live, self.skipped

    def create(self, connection: Connection) -> None:
        """Create the tables where they are missing, in any number of processes at once."""
        create_tables(connection, *self.all)


def projections_sql(dialect: str, table: str = DEFAULT_TABLE) -> str:
    """Return the statements that create the tables, for the dialect of that name, such as ``"postgresql"``."""
    return create_sql(dialect, *Tables(MetaData(), table).all)

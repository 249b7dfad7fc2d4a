"""A logical replication slot of PostgreSQL, read by plain SQL over an ordinary connection, and its publication."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Connection, Table, text
from sqlalchemy.exc import DBAPIError

from idempotency._sql.failures import error_code
from idempotency.errors import ConfigurationError, StoreError

_SLOT_NAME = re.compile(r"[a-z0-9_]{1,63}")
_PUBLICATION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")

ADVANCES, HAS_MESSAGES, FAILS_OVER = 11, 14, 17
"""The versions of PostgreSQL since which a slot can be advanced, has messages, and can be there on a standby."""

_NOT_ALLOWED, _NO_SLOT_FREE = "42501", "53400"
_UNDEFINED, _NOT_IN_STATE, _IN_USE = "42704", "55000", "55006"


class SlotLostError(StoreError):
    """The slot is gone, or the server has removed log that was not read yet: messages in it are lost.

    ``after`` is the place in the log up to which messages were published, ``until`` the end of the log when the loss
    was seen.
    """

    code = "slot-lost"
    title = "The replication slot of a relay is lost"
    retryable = False
    after: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What the server says of a slot.

    ``confirmed``: up to where the log was read. None while the slot is being created. ``retained``: bytes of log that
    are there for its sake. ``safe``: how many more may be written before it can be lost; None for any number.
    ``lost``: why it can be read no more. ``inactive_since``: when it was read last, from PostgreSQL 17.
    """

    database: str
    plugin: str
    active: bool
    confirmed: str | None
    retained: int | None
    safe: int | None
    status: str | None
    lost: str | None
    inactive_since: str | None

    @classmethod
    def of(cls, row: dict[str, Any], retained: Any) -> Self:
        """Make it of a row of ``pg_replication_slots``, which has more columns in each version."""
        status = row.get("wal_status")
        return cls(
            database=row["database"],
            plugin=row["plugin"],
            active=row["active"],
            confirmed=row["confirmed_flush_lsn"],
            retained=None if retained is None else int(retained),
            safe=row.get("safe_wal_size"),
            status=status,
            lost=row.get("invalidation_reason") or (status if status == "lost" else None),
            inactive_since=row.get("inactive_since"),
        )


def read_slot(connection: Connection, name: str) -> SlotState | None:
    """Return what the server says of the slot; None if there is none, or if it is not a logical one."""
    row = connection.execute(
        text(
            "SELECT CAST(to_jsonb(s) AS text), pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots s"
            " WHERE slot_name = :name AND slot_type = 'logical'"
        ),
        {"name": name},
    ).one_or_none()
    return None if row is None else SlotState.of(json.loads(row[0]), row[1])


class Slot:
    """The slot of one relay. It reads the rows of ``table``, or with ``messages`` those in the log with ``prefix``."""

    def __init__(self, name: str, publication: str, table: Table, prefix: str, messages: bool) -> None:
        if not _SLOT_NAME.fullmatch(name):
            raise ConfigurationError(f"slot must be 1 to 63 small letters, digits and _, not {name!r}")
        if not _PUBLICATION_NAME.fullmatch(publication):
            raise ConfigurationError(f"publication must be an identifier of at most 63 characters, not {publication!r}")
        self.name = name
        self.publication = publication
        self.messages = messages
        self._prefix = prefix
        self._table = table
        self._schema = ""

    @property
    def source(self) -> tuple[str, str, str, bool]:
        """Return the schema and the name of the table, and the prefix of messages, and whether these are read."""
        return self._schema, self._table.name, self._prefix, self.messages

    def read(self, connection: Connection) -> SlotState | None:
        """Return what the server says of the slot; None if there is none.

        Raises :class:`~idempotency.errors.ConfigurationError` for a slot that is not ours.
        """
        named = text(
            "SELECT nspname FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid"
            " WHERE c.oid = to_regclass(:name)"
        )
        self._schema = connection.execute(named, {"name": self._full_name(connection)}).scalar_one()
        state = read_slot(connection, self.name)
        here = connection.execute(text("SELECT current_database()")).scalar_one()
        if state is not None and (state.database, state.plugin) != (here, "pgoutput"):
            raise ConfigurationError(
                f"the slot {self.name} reads the database {state.database} by {state.plugin}: give slot= another name"
            )
        return state

    def publishes(self, connection: Connection) -> bool | None:
        """Return whether the publication has the insertions of the table; None if there is no publication."""
        return connection.execute(
            text(
                "SELECT p.pubinsert AND EXISTS (SELECT FROM pg_get_publication_tables(p.pubname) t"
                " WHERE t.relid = to_regclass(:table)) FROM pg_publication p WHERE p.pubname = :name"
            ),
            {"name": self.publication, "table": self._full_name(connection)},
        ).scalar()

    def create_publication(self, connection: Connection) -> None:
        """Create the publication where it is missing, and check it where it is there.

        It must be there before the slot: the server looks for it at the time of each change. It has insertions only,
        so that nothing of a relay's own work is read.
        """
        table = self._full_name(connection)
        found = self.publishes(connection)
        if found is None:
            quote = connection.dialect.identifier_preparer.quote
            of_table = "" if self.messages else f" FOR TABLE {table}"
            self._run(
                connection,
                f"CREATE PUBLICATION {quote(self.publication)}{of_table} WITH (publish = 'insert')",
                f"make its user the owner of {table} and GRANT CREATE ON DATABASE, or create the publication yourself",
            )
        elif not found and not self.messages:
            raise ConfigurationError(
                f"the publication {self.publication} has no insertions of {table}: ALTER PUBLICATION"
                f' "{self.publication}" ADD TABLE {table}, or give publication= another name'
            )

    def create(self, connection: Connection) -> None:
        """Create the slot. The server first waits for the transactions that are writing at this moment."""
        options = ", failover => true" if version_of(connection) >= FAILS_OVER else ""
        self._run(
            connection,
            f"SELECT pg_create_logical_replication_slot('{self.name}', 'pgoutput'{options})",
            "ALTER ROLE ... REPLICATION, or what your provider has in its place, such as rds_replication",
        )

    def _full_name(self, connection: Connection) -> str:
        schema: Any = connection.schema_for_object(self._table)
        return connection.dialect.identifier_preparer.format_table(self._table, schema)

    def _run(self, connection: Connection, statement: str, remedy: str) -> None:
        try:
            connection.execute(text(statement))
        except DBAPIError as error:
            if error_code(error) == _NOT_ALLOWED:
                raise ConfigurationError(f"the relay may not run {statement.split(' WITH ')[0]}: {remedy}") from error
            if error_code(error) == _NO_SLOT_FREE:
                raise ConfigurationError(
                    "the server has no replication slot free: raise max_replication_slots"
                ) from error
            raise

    def drop(self, connection: Connection) -> None:
        """Drop the slot."""
        connection.execute(text("SELECT pg_drop_replication_slot(:name)"), {"name": self.name})

    def begin_peek(self, connection: Connection, cursor: str, most: int) -> None:
        """Declare a cursor over what was committed since the slot's place: whole transactions, about ``most`` changes.

        The server decodes all of it at the first fetch, and puts what is too large for its memory into a file.
        """
        # Values are written as text of this session.
        connection.execute(
            text(
                "SELECT set_config('bytea_output', 'hex', true), set_config('client_encoding', 'UTF8', true),"
                " set_config('statement_timeout', '0', true)"
            )
        )
        connection.execute(
            text(
                f"DECLARE {cursor} NO SCROLL CURSOR FOR SELECT data FROM pg_logical_slot_peek_binary_changes("
                f"'{self.name}', NULL, {most}, {self._options(connection)})"
            )
        )

    def _options(self, connection: Connection) -> str:
        # The names of publications are a list, in which a name may be quoted.
        options = f"""'proto_version', '1', 'publication_names', '"{self.publication}"'"""
        # Also where rows are read: a message of this outbox must not be passed over.
        return f"{options}, 'messages', 'true'" if version_of(connection) >= HAS_MESSAGES else options

    def advance(self, connection: Connection, lsn: int) -> None:
        """Let the server forget the log up to ``lsn``, unless the slot is further already."""
        to = format_lsn(lsn)
        where = f"FROM pg_replication_slots WHERE slot_name = '{self.name}' AND confirmed_flush_lsn < '{to}'"
        if version_of(connection) >= ADVANCES:
            connection.execute(text(f"SELECT pg_replication_slot_advance(slot_name, '{to}') {where}"))
        elif connection.execute(text(f"SELECT 1 {where}")).scalar():
            # As its result, this function decodes once more what was read already.
            connection.execute(
                text(
                    f"SELECT count(*) FROM pg_logical_slot_get_binary_changes('{self.name}', '{to}', NULL,"
                    f" {self._options(connection)})"
                )
            )


def end_of_log(connection: Connection) -> int:
    """Return the place up to which the log is on disk: every transaction that is visible as durable ends before it."""
    return int(connection.execute(text("SELECT pg_current_wal_flush_lsn() - '0/0'")).scalar_one())


def write_log_to_disk(connection: Connection) -> None:
    """Write the log to disk, in the open transaction, up to everything that is visible now.

    With ``synchronous_commit=off`` a row is visible for some time before a slot can deliver it.
    """
    connection.execute(text("SET LOCAL synchronous_commit = local"))
    # A transaction that writes nothing waits for no disk.
    connection.execute(text("SELECT pg_logical_emit_message(true, 'idempotency:flush', '')"))


def version_of(connection: Connection) -> int:
    """Return the version of the server."""
    version = connection.dialect.server_version_info
    return int(version[0]) if version else 0


def is_busy(error: DBAPIError) -> bool:
    """Return whether another session reads the slot at this moment."""
    return error_code(error) == _IN_USE


def may_be_lost(error: DBAPIError) -> bool:
    """Return whether the slot or the publication may be gone, or the slot be invalid."""
    return error_code(error) in (_UNDEFINED, _NOT_IN_STATE)


def format_lsn(lsn: int) -> str:
    """Return a place in the log as PostgreSQL writes it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"

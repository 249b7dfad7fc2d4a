"""Examine a SQL database: whether it can be used, and which records a crash would lose."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Table, inspect

from idempotency._sql.pooler import is_behind_pooler
from idempotency.stores._operating import version_of
from idempotency.stores.base import Finding
from idempotency.stores.sql._operation_name import COLUMN, FINGERPRINT
from idempotency.stores.sql._saga_table import SagaTables
from idempotency.stores.sql._table import located

_OLDEST_SQLITE = (3, 35)


def examine(connection: Connection, table: Table) -> list[Finding]:
    """Examine the server and the table."""
    by_dialect: dict[str, Callable[[Connection], list[Finding]]] = {
        "postgresql": _postgresql,
        "mysql": _mysql,
        "mariadb": _mysql,
        "sqlite": _sqlite,
    }
    here = located(table, connection.schema_for_object(table))
    return [*by_dialect[connection.dialect.name](connection), *_examine_table(connection, here)]


def examine_saga_tables(connection: Connection, tables: SagaTables) -> list[Finding]:
    """Examine the tables of sagas, if one of them is there."""
    here = tables.located(connection.schema_for_object(tables.sagas))
    inspector = inspect(connection)
    missing = [each.fullname for each in here if not inspector.has_table(each.name, each.schema)]
    if len(missing) == len(here):
        return []
    create = "idempotency schema create --sagas"
    findings = [Finding("fix", f"there is no table {name}: {create}") for name in missing]
    for table in here:
        findings += [] if table.fullname in missing else _examine_engine(connection, table)
    if here.sagas.fullname not in missing:
        indexed = {index["column_names"][0] for index in inspector.get_indexes(here.sagas.name, here.sagas.schema)}
        findings += [
            Finding("fix", f"{here.sagas.fullname} has no index on {column}: {create}")
            for column in ("due_ms", "expires_ms")
            if column not in indexed
        ]
    return findings or [Finding("ok", f"tables {here.sagas.fullname} and {here.entries.fullname}: the indexes")]


def _examine_table(connection: Connection, table: Table) -> list[Finding]:
    inspector = inspect(connection)
    name, place = table.fullname, (table.name, table.schema)
    findings: list[Finding] = []
    if inspector.get_pk_constraint(*place)["constrained_columns"] != ["id"]:
        findings.append(Finding("fix", f"the primary key of {name} is not (id): two owners can hold one key"))
    if not any(index["column_names"][:1] == ["expires_ms"] for index in inspector.get_indexes(*place)):
        findings.append(Finding("fix", f"{name} has no index on expires_ms, which purge needs: schema create"))
    findings += _examine_engine(connection, table)
    findings = findings or [Finding("ok", f"table {name}: primary key and index")]
    if not {COLUMN, FINGERPRINT} <= {column["name"] for column in inspector.get_columns(*place)}:
        findings.append(Finding("note", f"{name} has no columns for the names of operations: schema upgrade"))
    return findings


def _examine_engine(connection: Connection, table: Table) -> list[Finding]:
    options = inspect(connection).get_table_options(table.name, table.schema)
    if options.get(f"{connection.dialect.name}_engine", "InnoDB") == "InnoDB":
        return []
    return [Finding("fix", f"{table.fullname} is not an InnoDB table: it has no transactions")]


def _postgresql(connection: Connection) -> list[Finding]:
    # The settings of this user in this database, as the application's connections have them unless it sets its own.
    findings = [Finding("ok", f"PostgreSQL {_ask(connection, 'SHOW server_version')}")]
    if is_behind_pooler(connection):
        findings.append(Finding("note", "a pooler, such as PgBouncer, is in between: duplicates that wait poll"))
    if _ask(connection, "SELECT pg_is_in_recovery()") == "True":
        findings.append(Finding("fix", "this is a standby: give the address of the primary"))
    if _ask(connection, "SHOW fsync") != "on":
        findings.append(Finding("fix", "fsync off: a crash can destroy the database"))
    commit = _ask(connection, "SHOW synchronous_commit")
    if commit == "off":
        lost = "a crash forgets commits of the last moments that were confirmed; set it on for this user"
        findings.append(Finding("fix", f"synchronous_commit off: {lost}"))
    else:
        findings.append(Finding("ok", f"synchronous_commit {commit}: a crash forgets nothing that was committed"))
    return findings


def _mysql(connection: Connection) -> list[Finding]:
    findings = [Finding("ok", f"MySQL or MariaDB {_ask(connection, 'SELECT VERSION()')}")]
    if _ask(connection, "SELECT @@read_only") != "0":
        findings.append(Finding("fix", "read_only is set: give the address of the primary"))
    flush = _ask(connection, "SELECT @@innodb_flush_log_at_trx_commit")
    if flush == "1":
        return [
            *findings,
            Finding("ok", "innodb_flush_log_at_trx_commit 1: a crash forgets nothing that was committed"),
        ]
    lost = "a crash forgets up to a second of confirmed commits; set it to 1"
    return [*findings, Finding("fix", f"innodb_flush_log_at_trx_commit {flush}: {lost}")]


def _sqlite(connection: Connection) -> list[Finding]:
    version = _ask(connection, "SELECT sqlite_version()")
    needed = version_of(version) >= _OLDEST_SQLITE
    findings = [Finding("ok", f"SQLite {version}") if needed else Finding("fix", f"SQLite {version}: 3.35 is needed")]
    mode = _ask(connection, "PRAGMA journal_mode")
    if mode != "wal":
        slow = "readers and the writer block each other; the file system must allow shared memory"
        return [*findings, Finding("fix", f"journal_mode {mode}, not WAL: {slow}")]
    return [*findings, Finding("ok", "journal_mode WAL")]


def _ask(connection: Connection, question: str) -> str:
    return str(connection.exec_driver_sql(question).scalar_one())

"""Examine an outbox: its tables, its relays, and what keeps the database from cleaning it."""

from __future__ import annotations

import re
from collections.abc import Callable

from sqlalchemy import Connection, Table, inspect, select, text

from idempotency._outbox.emit import OUTBOX
from idempotency._outbox.table import Tables, storage_sql
from idempotency._sql.tables import full_name
from idempotency.outbox._cleaning import mysql_holder, postgresql_holder
from idempotency.outbox._names import slot_of
from idempotency.outbox._slot import SlotState, read_slot
from idempotency.outbox._slot_checks import slot_findings
from idempotency.outbox._states import OutboxStats, read_stats
from idempotency.stores.base import Finding

LATE = 60.0
"""After how many seconds an oldest message is worth a note although a relay runs."""

MANY_DELETED = 20_000
"""PostgreSQL cleans the table after 1000 deleted rows, if nothing keeps it from that."""

_PREDICATE = "available_ms IS NOT NULL"


def examine(connection: Connection, tables: Tables) -> list[Finding]:
    """Examine the tables, and where they are whole also the relays and the database."""
    missing = _examine_columns(connection, tables)
    if missing:
        return missing
    by_dialect: dict[str, Callable[[Connection, Tables, OutboxStats], list[Finding]]] = {
        "postgresql": _postgresql,
        "mysql": _mysql,
        "mariadb": _mysql,
        "sqlite": lambda *_: [],
    }
    stats = read_stats(connection, tables)
    of_database = by_dialect[connection.dialect.name](connection, tables, stats)
    return [*_examine_index(connection, tables.messages), *of_database, *_examine_stats(stats)]


def _examine_columns(connection: Connection, tables: Tables) -> list[Finding]:
    inspector, findings = inspect(connection), []
    for table in tables.all:
        schema, name = connection.schema_for_object(table), full_name(connection, table)
        if not inspector.has_table(table.name, schema):
            findings.append(Finding("fix", f"there is no table {name}: {OUTBOX.command}, or {OUTBOX.described}"))
            continue
        there = {column["name"] for column in inspector.get_columns(table.name, schema)}
        lacking = [column.name for column in table.c if column.name not in there]
        if lacking:
            findings.append(
                Finding("fix", f"{name} lacks {', '.join(lacking)}: add it by a migration, as in {OUTBOX.described}")
            )
    return findings


def _examine_stats(stats: OutboxStats) -> list[Finding]:
    findings = []
    waiting = f"messages that wait: {stats.due + stats.blocked}, the oldest for {stats.oldest_age:.0f} s"
    if stats.relays:
        findings.append(Finding("ok", f"relays that run: {len(stats.relays)}"))
        if stats.oldest_age > LATE:
            findings.append(Finding("note", waiting))
    elif stats.due + stats.blocked:
        findings.append(Finding("fix", f"no relay runs; {waiting}: start idempotency relay"))
    else:
        findings.append(Finding("note", "no relay runs: start idempotency relay"))
    if stats.dead:
        findings.append(Finding("note", f"messages that are dead: {stats.dead}: idempotency outbox list --dead"))
    return findings


def _examine_index(connection: Connection, table: Table) -> list[Finding]:
    indexes = inspect(connection).get_indexes(table.name, connection.schema_for_object(table))
    found = [index for index in indexes if index["column_names"] == ["available_ms"]]
    name, dialect = full_name(connection, table), connection.dialect.name
    if not found:
        return [Finding("fix", f"{name} has no index on available_ms, which relays need: {OUTBOX.command}")]
    # MariaDB and MySQL have no partial indexes.
    partial = any(_PREDICATE in str(index.get("dialect_options", {}).get(f"{dialect}_where")) for index in found)
    if dialect in ("postgresql", "sqlite") and not partial:
        remedy = f"drop it, and then {OUTBOX.command}"
        return [Finding("fix", f"the index on available_ms of {name} is not partial, every row is in it: {remedy}")]
    return [Finding("ok", f"{name}: index on available_ms")]


def read_slots(connection: Connection, tables: Tables) -> dict[str, SlotState]:
    """Return what the server says of each slot of the outbox, by name; empty without PostgreSQL."""
    if connection.dialect.name != "postgresql":
        return {}
    states = {slot: read_slot(connection, slot) for slot in _slots(connection, tables)}
    return {slot: state for slot, state in states.items() if state is not None}


def _slots(connection: Connection, tables: Tables) -> list[str]:
    return sorted({slot_of(tables), *connection.execute(select(tables.position.c.slot)).scalars()})


def _postgresql(connection: Connection, tables: Tables, stats: OutboxStats) -> list[Finding]:
    name = full_name(connection, tables.messages)
    of_slots = {slot: slot_findings(connection, slot) for slot in _slots(connection, tables)}
    return [
        *_examine_storage(connection, name),
        *_examine_cleaning(connection, name),
        *(finding for findings in of_slots.values() for finding in findings),
        *_examine_readers(stats, [slot for slot, findings in of_slots.items() if findings]),
    ]


def _examine_readers(stats: OutboxStats, slots: list[str]) -> list[Finding]:
    """Look for a relay that polls the table beside one that reads the log, or beside the slot of one."""
    if not any(relay.buckets for relay in stats.relays):
        return []
    if any(relay.slots for relay in stats.relays):
        what = "a relay polls the table while another one reads the log, so that each publishes all messages: stop one"
        return [Finding("fix", what)]
    return [
        Finding(
            "note",
            f"a relay polls the table, and none reads the slot {slot}: the log is retained for it, and messages of an"
            " Outbox(mode='message') are not published: start idempotency relay --log in place of the relay, or drop"
            " the slot",
        )
        for slot in slots
    ]


def _examine_storage(connection: Connection, name: str) -> list[Finding]:
    query = text("SELECT reloptions FROM pg_class WHERE oid = to_regclass(:name)")
    options = dict(each.split("=", 1) for each in connection.execute(query, {"name": name}).scalar_one() or ())
    remedy = storage_sql(name)
    lacking = [each for each in re.findall(r"(\w+) = ", remedy) if each not in options]
    if options.get("autovacuum_enabled") in ("false", "off", "0", "no"):
        return [Finding("fix", f"{name} has autovacuum_enabled off: its deleted rows are never cleaned away")]
    if lacking:
        return [Finding("fix", f"{name} is cleaned too seldom, it lacks {lacking[0]}: {remedy}")]
    return [Finding("ok", f"{name}: autovacuum by the number of its deleted rows")]


def _examine_cleaning(connection: Connection, name: str) -> list[Finding]:
    query = text("SELECT n_dead_tup, n_live_tup FROM pg_stat_all_tables WHERE relid = to_regclass(:name)")
    dead, live = connection.execute(query, {"name": name}).one()
    many = dead > MANY_DELETED and dead > live
    findings = []
    if many:
        findings.append(
            Finding(
                "note", f"{name} has {dead} deleted rows beside {live}: relays read slowly until they are cleaned away"
            )
        )
    horizon = postgresql_holder(connection)
    if horizon is not None:
        findings.append(Finding("fix" if many else "note", horizon))
    return findings


def _mysql(connection: Connection, tables: Tables, _: OutboxStats) -> list[Finding]:
    table = tables.messages
    options = inspect(connection).get_table_options(table.name, connection.schema_for_object(table))
    findings = []
    if options.get(f"{connection.dialect.name}_engine", "InnoDB") != "InnoDB":
        findings.append(Finding("fix", f"{full_name(connection, table)} is not InnoDB: it has no transactions"))
    transaction = mysql_holder(connection)
    if transaction is not None:
        findings.append(Finding("note", transaction))
    return findings

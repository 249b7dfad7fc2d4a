"""What of a server's settings an operator should know: can it be used, and what would a crash make it forget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from idempotency._cli.lookup import ask, is_sql, primaries
from idempotency.errors import StoreError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from idempotency.stores.redis import RedisStore
    from idempotency.stores.sql import SQLStore

_OLDEST_REDIS = (6, 2)
_OLDEST_SQLITE = (3, 35)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``ok``, ``note`` for what is worth knowing, or ``fix`` for what must be put right."""

    level: Literal["ok", "note", "fix"]
    what: str


async def examine(store: Any) -> list[Finding]:
    """Examine the store and its server; a store that cannot be used is a finding too."""
    try:
        await store.check()
        if is_sql(store):
            return [Finding("ok", "reachable, and the table has every column"), *await _sql(store)]
        return [Finding("ok", "reachable, and it runs the store's scripts"), *await _redis(store)]
    except StoreError as error:
        return [Finding("fix", str(error))]


async def _redis(store: RedisStore) -> list[Finding]:
    servers = await primaries(store)
    findings: list[Finding] = []
    for server in servers:
        where = f"{server.name}: " if len(servers) > 1 else ""
        findings += [Finding(each.level, where + each.what) for each in await _redis_server(store, server)]
    return findings


async def _redis_server(store: RedisStore, server: Any) -> list[Finding]:
    try:
        info = await ask(store, server, "INFO")
    except StoreError as error:
        return [Finding("note", f"neither version, eviction nor persistence could be read: {error}")]
    try:
        names = ("appendfsync", "save")
        settings = {name: (await ask(store, server, "CONFIG GET", name))[name] for name in names}
    except (StoreError, KeyError):
        settings = None
    try:
        return [_redis_version(info), _role(info), _eviction(info), *_persistence(info, settings)]
    except KeyError as error:  # of a server that speaks as Redis does
        return [Finding("note", f"neither eviction nor persistence is known: INFO does not tell {error}")]


def _redis_version(info: dict[str, Any]) -> Finding:
    version = str(info["redis_version"])
    if _numbers(version) < _OLDEST_REDIS:
        return Finding("fix", f"Redis {version}: 6.2 or later is needed")
    return Finding("ok", f"Redis {version}")


def _role(info: dict[str, Any]) -> Finding:
    if info["role"] != "master":
        return Finding("fix", "this is a replica: give the address of the primary, or of the sentinels")
    replicas = int(info.get("connected_slaves", 0))
    if not replicas:
        return Finding("ok", "primary, without replicas")
    return Finding(
        "note",
        f"primary, {replicas} replicas: they are written to later, so a failover can forget the last keys;"
        " RedisStore(durability=Durability()) waits for them",
    )


def _eviction(info: dict[str, Any]) -> Finding:
    policy, limit = str(info["maxmemory_policy"]), int(info["maxmemory"])
    if policy == "noeviction":
        return Finding("ok", "maxmemory-policy noeviction")
    if not limit:
        return Finding("note", f"maxmemory-policy {policy}, but no maxmemory: set noeviction before you set a limit")
    if policy == "volatile-ttl":
        return Finding("note", "maxmemory-policy volatile-ttl: with too little memory, keys are forgotten early")
    return Finding(
        "fix",
        f"maxmemory-policy {policy}: an evicted record is a forgotten key, and its operation can run again;"
        " set maxmemory-policy noeviction",
    )


def _persistence(info: dict[str, Any], settings: dict[str, str] | None) -> list[Finding]:
    failing = [
        Finding("fix", f"{name} {info[name]}: the server cannot write to its disk")
        for name in ("rdb_last_bgsave_status", "aof_last_write_status")
        if info.get(name, "ok") != "ok"
    ]
    return [*failing, _crash_loses(info, settings)]


def _crash_loses(info: dict[str, Any], settings: dict[str, str] | None) -> Finding:
    appends = bool(int(info["aof_enabled"]))
    if settings is None:
        kept = "with an append-only file" if appends else "without an append-only file"
        return Finding("note", f"{kept}; CONFIG GET is not allowed, so what a crash would forget is not known")
    if appends:
        return {
            "always": Finding("ok", "appendfsync always: a crash forgets nothing"),
            "everysec": Finding("note", "appendfsync everysec: a crash of the machine forgets up to the last 2 s"),
        }.get(
            settings["appendfsync"],
            Finding("note", "appendfsync no: a crash of the machine forgets what was not flushed, often the last 30 s"),
        )
    if settings["save"]:
        return Finding(
            "note",
            f"snapshots only (save {settings['save']}): a crash forgets every key since the last one;"
            " set appendonly yes",
        )
    if int(info.get("connected_slaves", 0)):
        return Finding("note", "no persistence: if primary and replicas restart, every key is forgotten")
    return Finding("fix", "no persistence: a restart forgets every key; set appendonly yes")


async def _sql(store: SQLStore) -> list[Finding]:
    name = store._table.name
    return await store._run(lambda _, connection: [*_server(connection, name), *_table(connection, name)])


def _server(connection: Connection, table: str) -> list[Finding]:
    by_dialect: dict[str, Callable[[Connection], list[Finding]]] = {
        "postgresql": _postgresql,
        "mysql": _mysql,
        "mariadb": _mysql,
        "sqlite": _sqlite,
    }
    return by_dialect[connection.dialect.name](connection)


def _table(connection: Connection, name: str) -> list[Finding]:
    from sqlalchemy import inspect

    inspector = inspect(connection)
    findings: list[Finding] = []
    if inspector.get_pk_constraint(name)["constrained_columns"] != ["id"]:
        findings.append(Finding("fix", f"the primary key of {name} is not (id): two owners can hold one key"))
    if not any(index["column_names"][:1] == ["expires_ms"] for index in inspector.get_indexes(name)):
        findings.append(Finding("fix", f"{name} has no index on expires_ms, which purge needs: schema create"))
    if inspector.get_table_options(name).get("mysql_engine", "InnoDB") != "InnoDB":
        findings.append(Finding("fix", f"{name} is not an InnoDB table: it has no transactions"))
    return findings or [Finding("ok", f"table {name}: primary key and index")]


def _postgresql(connection: Connection) -> list[Finding]:
    # The settings of this user in this database, as the application's connections have them unless it sets its own.
    findings = [Finding("ok", f"PostgreSQL {_told(connection, 'SHOW server_version')}")]
    if _told(connection, "SELECT pg_is_in_recovery()") == "True":
        findings.append(Finding("fix", "this is a standby: give the address of the primary"))
    if _told(connection, "SHOW fsync") != "on":
        findings.append(Finding("fix", "fsync off: a crash can destroy the database"))
    commit = _told(connection, "SHOW synchronous_commit")
    if commit == "off":
        lost = "a crash forgets commits of the last moments that were confirmed; set it on for this user"
        findings.append(Finding("fix", f"synchronous_commit off: {lost}"))
    else:
        findings.append(Finding("ok", f"synchronous_commit {commit}: a crash forgets nothing that was committed"))
    return findings


def _mysql(connection: Connection) -> list[Finding]:
    findings = [Finding("ok", f"MySQL or MariaDB {_told(connection, 'SELECT VERSION()')}")]
    if _told(connection, "SELECT @@read_only") != "0":
        findings.append(Finding("fix", "read_only is set: give the address of the primary"))
    flush = _told(connection, "SELECT @@innodb_flush_log_at_trx_commit")
    if flush == "1":
        return [
            *findings,
            Finding("ok", "innodb_flush_log_at_trx_commit 1: a crash forgets nothing that was committed"),
        ]
    lost = "a crash forgets up to a second of confirmed commits; set it to 1"
    return [*findings, Finding("fix", f"innodb_flush_log_at_trx_commit {flush}: {lost}")]


def _sqlite(connection: Connection) -> list[Finding]:
    version = _told(connection, "SELECT sqlite_version()")
    needed = _numbers(version) >= _OLDEST_SQLITE
    findings = [Finding("ok", f"SQLite {version}") if needed else Finding("fix", f"SQLite {version}: 3.35 is needed")]
    mode = _told(connection, "PRAGMA journal_mode")
    if mode != "wal":
        slow = "readers and the writer block each other; the file system must allow shared memory"
        return [*findings, Finding("fix", f"journal_mode {mode}, not WAL: {slow}")]
    return [*findings, Finding("ok", "journal_mode WAL")]


def _told(connection: Connection, question: str) -> str:
    return str(connection.exec_driver_sql(question).scalar_one())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())

"""Examine the Redis servers: whether they can be used, and which records a crash would lose."""

from __future__ import annotations

from typing import Any

from idempotency.errors import StoreError
from idempotency.stores._operating import version_of
from idempotency.stores.base import Finding
from idempotency.stores.redis._clients import Clients

_OLDEST = (6, 2)


async def examine(clients: Clients) -> list[Finding]:
    """Examine every server that holds records."""
    servers = await clients.primaries()
    findings: list[Finding] = []
    for server in servers:
        where = f"{server.name}: " if len(servers) > 1 else ""
        findings += [Finding(each.level, where + each.what) for each in await _examine_server(clients, server)]
    return findings


async def _examine_server(clients: Clients, server: Any) -> list[Finding]:
    try:
        info = await clients.ask(server, "INFO")
    except StoreError as error:
        return [Finding("note", f"neither version, eviction nor persistence could be read: {error}")]
    try:
        names = ("appendfsync", "save")
        settings = {name: (await clients.ask(server, "CONFIG GET", name))[name] for name in names}
    except (StoreError, KeyError):
        settings = None
    try:
        return [_version(info), _role(info), _eviction(info), *_persistence(info, settings)]
    except KeyError as error:  # another server with the protocol of Redis
        return [Finding("note", f"neither eviction nor persistence is known: INFO does not contain {error}")]


def _version(info: dict[str, Any]) -> Finding:
    version = str(info["redis_version"])
    if version_of(version) < _OLDEST:
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
    return [*failing, _lost_in_a_crash(info, settings)]


def _lost_in_a_crash(info: dict[str, Any], settings: dict[str, str] | None) -> Finding:
    appends = bool(int(info["aof_enabled"]))
    if settings is None:
        file = "with an append-only file" if appends else "without an append-only file"
        return Finding("note", f"{file}; CONFIG GET is not allowed, so what a crash would forget is not known")
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

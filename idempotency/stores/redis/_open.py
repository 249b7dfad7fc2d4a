"""Read the URL of a Redis store, and open clients with the options that a store needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.asyncio as aioredis
from redis import cluster, connection, sentinel
from redis.asyncio import cluster as aiocluster
from redis.asyncio import connection as aioconnection
from redis.asyncio import sentinel as aiosentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from idempotency.errors import ConfigurationError

AsyncClient = aioredis.Redis | aiocluster.RedisCluster
SyncClient = redis.Redis | cluster.RedisCluster

_FORMS = (
    "redis://host:port/db, rediss://host:port/db, unix:///path, redis+cluster://host:port,host:port or "
    "redis+sentinel://host:port,host:port/service/db"
)
_PORTS = {"": 6379, "cluster": 6379, "sentinel": 26379}
_CONNECTIONS = 40
"""Per client: the commands a store sends at one time, its subscription, and a scan."""


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL: the servers, the kind of deployment, and options of a connection."""

    kind: str
    hosts: list[tuple[str, int]]
    service: str
    url: str  # for one server, as redis-py reads it
    secrets: dict[str, str]  # user and password of the sentinels

    def __repr__(self) -> str:
        return f"<Address {self.servers}>"

    @property
    def servers(self) -> str:
        """Name the servers, without credentials."""
        if not self.hosts:
            return urlsplit(self.url).path
        return ",".join(f"{host}:{port}" for host, port in self.hosts)

    def open(self, timeout: float) -> AsyncClient:
        """Make an asyncio client for the running loop; nothing is connected yet."""
        options: dict[str, Any] = {
            "socket_timeout": None,  # the store limits every verb; this limit would take a task for each command
            **self._defaults(timeout),
            "retry": AsyncRetry(NoBackoff(), 1, (redis.ConnectionError,)),
            **aioconnection.parse_url(self.url),
        }
        if self.kind == "":
            return aioredis.Redis.from_pool(aioredis.ConnectionPool(**options))
        _declare_ssl(options)
        if self.kind == "sentinel":
            sentinels = aiosentinel.Sentinel(self.hosts, sentinel_kwargs=self._of_sentinels(options, timeout))
            primary: aioredis.Redis = sentinels.master_for(self.service, **options)
            return primary
        # A node that is gone is noticed by its time-out; the second half of the time is for the other nodes.
        options["socket_timeout"] = options["socket_timeout"] or timeout / 2
        nodes = [aiocluster.ClusterNode(*host) for host in self.hosts]
        return aiocluster.RedisCluster(startup_nodes=nodes, **_without(options, "db", "host", "port", "retry"))

    def open_sync(self, timeout: float) -> SyncClient:
        """Make a blocking client; only that of a cluster connects at once."""
        options: dict[str, Any] = {
            "socket_timeout": timeout,
            **self._defaults(timeout),
            "retry": Retry(NoBackoff(), 1, (redis.ConnectionError,)),
            **connection.parse_url(self.url),
        }
        if self.kind == "":
            return redis.Redis.from_pool(redis.ConnectionPool(**options))
        _declare_ssl(options)
        if self.kind == "sentinel":
            sentinels = sentinel.Sentinel(self.hosts, sentinel_kwargs=self._of_sentinels(options, timeout))
            client: redis.Redis = sentinels.master_for(self.service, **options)
            return client
        nodes = [cluster.ClusterNode(*host) for host in self.hosts]
        return cluster.RedisCluster(startup_nodes=nodes, **_without(options, "db", "host", "port", "retry"))

    def _defaults(self, timeout: float) -> dict[str, Any]:
        # RESP2: no more handshake than is needed, and no pushed messages between replies.
        defaults: dict[str, Any] = {
            "protocol": 2,
            "socket_connect_timeout": timeout,
            "max_connections": _CONNECTIONS,
        }
        return defaults if not self.hosts else {**defaults, "socket_keepalive": True}

    def _of_sentinels(self, options: dict[str, Any], timeout: float) -> dict[str, Any]:
        limits = {"socket_timeout": timeout / 2, "socket_connect_timeout": timeout / 2}
        return {**{name: value for name, value in options.items() if name.startswith("ssl")}, **limits, **self.secrets}


def read_url(url: str) -> Address:
    """Read a URL, and raise ConfigurationError, without quoting its credentials, for one that cannot be read."""
    scheme = url.partition("://")[0].lower()
    try:
        return _read(url, scheme)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        # The text of a ValueError may quote any part of the URL; a TypeError names the option that redis-py lacks.
        reason = f": {error}" if isinstance(error, TypeError) else ""
        raise ConfigurationError(f"this {scheme}:// URL cannot be read{reason}; write {_FORMS}") from None


def _read(url: str, scheme: str) -> Address:
    base, _, kind = scheme.partition("+")
    if base not in ("redis", "rediss", "unix") or kind not in _PORTS or (base == "unix" and kind):
        raise ConfigurationError(f"a Redis URL has the form {_FORMS}")
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    secrets = {
        name.removeprefix("sentinel_"): query.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in query
    }
    if base == "unix":
        if not parts.path:
            raise ConfigurationError("a unix:// URL names the path of the socket: unix:///run/redis/redis.sock")
        return _checked(Address("", [], "", url, {}))
    credentials, _, names = parts.netloc.rpartition("@")
    hosts = [_host(name, _PORTS[kind]) for name in names.split(",")]
    if len(hosts) > 1 and not kind:
        raise ConfigurationError(f"{base}:// names one server; write {base}+cluster:// or {base}+sentinel://")
    service, db = _path(parts.path, kind)
    host, port = hosts[0]
    at = f"{credentials}@" if credentials else ""
    plain = f"{base}://{at}{f'[{host}]' if ':' in host else host}:{port}/{db}?{urlencode(query)}"
    return _checked(Address(kind, hosts, service, plain, secrets))


def _host(name: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{name}")
    return parts.hostname or "localhost", parts.port or port


def _path(path: str, kind: str) -> tuple[str, str]:
    names = [unquote(name) for name in path.split("/") if name]
    service = ""
    if kind == "sentinel":
        if not names:
            raise ConfigurationError("a redis+sentinel:// URL names the service: redis+sentinel://host:port/service/db")
        service = names.pop(0)
    if len(names) > 1 or any(not name.isdecimal() for name in names):
        raise ConfigurationError("the database of a Redis URL is a number: redis://host:port/0")
    db = names[0] if names else "0"
    if kind == "cluster" and db != "0":
        raise ConfigurationError("a redis+cluster:// URL names no database: a cluster has only 0")
    return service, db


def _checked(address: Address) -> Address:
    options: dict[str, Any] = {**aioconnection.parse_url(address.url)}
    # redis-py refuses an unknown option when it makes a connection, which would be in the first request.
    aioredis.ConnectionPool(**options).make_connection()
    return address


def _declare_ssl(options: dict[str, Any]) -> None:
    kind = options.pop("connection_class", None)
    if kind is not None:
        options["ssl"] = True


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def server_of(client: Any) -> str:
    """Return the name of the server that a client is connected to, as far as it can be known."""
    pool = getattr(client, "connection_pool", None)
    if pool is None:
        nodes = getattr(getattr(client, "nodes_manager", None), "startup_nodes", {})
        return ",".join(nodes) or "the cluster"
    options = pool.connection_kwargs
    if "path" in options:
        return str(options["path"])
    if "host" in options:
        return f"{options['host']}:{options.get('port', 6379)}"
    return str(getattr(pool, "service_name", "the server"))


def max_connections_of(client: Any) -> int:
    """Return how many connections a client may have to one server."""
    pool = getattr(client, "connection_pool", None)
    if pool is not None:
        return int(getattr(pool, "max_connections", _CONNECTIONS))
    nodes = client.nodes_manager.startup_nodes.values()
    return min((int(getattr(node, "max_connections", _CONNECTIONS)) for node in nodes), default=_CONNECTIONS)


def clients_of(client: Any) -> list[Any]:
    """List a client and the clients of its sentinels, which redis-py does not close."""
    sentinels = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    return [client, *(sentinels.sentinels if sentinels is not None else ())]


def abandon(client: AsyncClient) -> None:
    """Close the connections of an asyncio client whose event loop is closed, or not the running one."""
    for each in clients_of(client):
        pool = getattr(each, "connection_pool", None)
        if pool is not None:
            connections = [*pool._available_connections, *pool._in_use_connections]
        else:
            connections = [one for node in each.nodes_manager.nodes_cache.values() for one in node._connections]
            each._initialize = True  # by this redis-py marks a cluster client as closed
        for link in connections:
            cut_off(link)


def cut_off(link: Any) -> None:
    """Cut a connection off, which may belong to a closed event loop."""
    writer, link._writer, link._reader = link._writer, None, None
    if writer is None:
        return
    transport = writer.transport
    plain = getattr(getattr(transport, "_ssl_protocol", None), "_transport", transport)  # below TLS
    with contextlib.suppress(RuntimeError):
        transport.abort()
    # The transport of a closed loop can only mark itself closed: its socket stays open.
    socket = getattr(plain, "_sock", None)
    if socket is not None and writer._loop.is_closed():
        plain._sock = None
        socket.close()

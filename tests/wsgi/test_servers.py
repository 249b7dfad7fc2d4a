"""Flask and Django behind gunicorn, with sync workers and with threads, on Redis and PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.kit.servers import LOOPBACK, free_port, with_port
from tests.kit.targets import Target, unique_name
from tests.kit.tcp_proxy import Proxy
from tests.kit.wsgi_servers import Gunicorn, until

pytestmark = pytest.mark.processes

LEASE = 1.5  # that of tests/wsgi/shop.py

SERVERS = {
    "flask-sync-redis": ("redis", "flask_app", "--workers", "2"),
    "django-gthread-postgres": ("postgres", "django_app", "--workers", "2", "--threads", "4", "--preload"),
}


def target_of(kind: str, request: pytest.FixtureRequest) -> tuple[Target, str]:
    """Make a place for records, and the URL by which threads reach it."""
    target = Target(kind, request.getfixturevalue(f"{kind}_url"))
    asyncio.run(target.create())
    return target, target.sync_url if target.is_sql else target.url


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """One server for all tests of this module, each with keys of its own."""
    kind, app, *options = SERVERS[request.param]
    target, url = target_of(kind, request)
    with Gunicorn(tmp_path_factory.mktemp("shop"), target, app, *options, url=url) as gunicorn:
        yield gunicorn
        assert gunicorn.stop() == 0
    target.forget()
    assert "Traceback" not in gunicorn.log.read_text()


def new_key() -> str:
    return unique_name("wsgi")


def test_a_retry_is_replayed(server: Gunicorn) -> None:
    """Whichever worker gets it, with the header fields and the bytes of the first answer."""
    key = new_key()

    first, *again = [server.post("order", key) for _ in range(6)]

    assert first.status_code == 201
    assert "idempotent-replayed" not in first.headers
    for each in again:
        assert (each.status_code, each.content) == (201, first.content)
        assert each.headers["content-type"] == first.headers["content-type"]
        assert each.headers["idempotent-replayed"] == "true"
    assert len(server.lines(effect=key)) == 1


def test_a_chunked_body_is_compared_and_handed_on(server: Gunicorn) -> None:
    """A body without a length is read by its chunks, and is the same as with one; a large one is compared as well."""
    key, large = new_key(), new_key()

    answers = [server.post("order", key, body) for body in (iter([b"bo", b"dy"]), b"body", iter([b"bodies"]))]
    uploads = [server.post("order", large, bytes(2_000_000) + end) for end in (b"a", b"a", b"b")]

    assert [each.status_code for each in answers + uploads] == [201, 201, 422] * 2
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["bytes"] == 4
    assert uploads[0].json()["bytes"] == 2_000_001


def test_of_simultaneous_requests_one_runs(server: Gunicorn) -> None:
    """The others are told to come again, or wait for the result, in whichever process they are."""
    refused, waited = new_key(), new_key()

    with ThreadPoolExecutor(6) as threads:
        running = threads.submit(server.post, f"order?gate={refused}", refused)
        server.effects(refused)
        duplicate = server.post(f"order?gate={refused}", refused)
        server.open_gate(refused)
        first = running.result()
        waiting = [threads.submit(server.post, f"waited?gate={waited}", waited) for _ in range(2)]
        server.effects(waited)
        server.open_gate(waited)
        results = [each.result() for each in waiting]

    assert (duplicate.status_code, duplicate.json()["code"]) == (409, "in-progress")
    assert server.post(f"order?gate={refused}", refused).json() == first.json()
    assert results[0].json() == results[1].json()
    assert sorted("idempotent-replayed" in each.headers for each in results) == [False, True]
    assert [len(server.lines(effect=key)) for key in (refused, waited)] == [1, 1]


def test_a_stream_is_complete_and_not_run_again(server: Gunicorn) -> None:
    """A response over the limit is sent live, to the byte, and is completed."""
    key = new_key()

    first, again = server.post("stream", key), server.post("stream", key)

    assert first.content == b"".join(number.to_bytes(2) * 50_000 for number in range(40))
    assert (again.status_code, again.json()["code"]) == (409, "completed-not-replayable")
    assert len(server.lines(effect=key)) == 1


def test_a_client_that_leaves_changes_nothing(server: Gunicorn) -> None:
    """While its handler runs: the answer is recorded for the retry. In the middle of its body: nothing runs."""
    late, early = new_key(), new_key()
    head = "POST /order{0} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nIdempotency-Key: {1}\r\n\r\n"

    with socket.create_connection((LOOPBACK, server.port)) as client:
        client.sendall((head.format(f"?gate={late}", late) + "body").encode())
        server.effects(late)
    with socket.create_connection((LOOPBACK, server.port)) as client:
        client.sendall((head.format("", early) + "bo").encode())
    server.open_gate(late)
    retry = until(lambda: (r := server.post(f"order?gate={late}", late)).status_code == 201 and r, "the record")

    assert retry.headers["idempotent-replayed"] == "true"
    assert len(server.lines(effect=late)) == 1
    assert server.post("order", early).status_code == 201
    assert [line["attempt"] for line in server.lines(effect=early)] == [1]


def test_a_handler_longer_than_its_lease_keeps_it(server: Gunicorn) -> None:
    """The lease is renewed by a thread of the worker, also of one that was forked from the master with its store."""
    key = new_key()

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.post, f"leased?gate={key}", key)
        server.effects(key)
        deadline = time.monotonic() + LEASE + 0.3
        while time.monotonic() < deadline:
            assert server.post(f"leased?gate={key}", key).status_code == 409
        server.open_gate(key)
        first = running.result()

    assert first.status_code == 201
    assert len(server.lines(effect=key)) == 1


def test_a_worker_that_is_killed_after_the_effect(server: Gunicorn) -> None:
    """After its lease the key runs again, or is unknown, as the policy says; gunicorn starts another worker."""
    rerun, held = new_key(), new_key()

    with ThreadPoolExecutor(2) as threads:
        running = [
            threads.submit(server.post, f"{path}?gate={key}", key) for path, key in (("leased", rerun), ("held", held))
        ]
        pids = {server.effects(key)[0]["pid"] for key in (rerun, held)}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for each in running:
            assert isinstance(each.exception(), httpx.TransportError)
    for key in (rerun, held):
        server.open_gate(key)
    again = until(lambda: (r := server.post(f"leased?gate={rerun}", rerun)).status_code != 409 and r, "the new run")
    unknown = until(
        lambda: (r := server.post(f"held?gate={held}", held)).json()["code"] != "in-progress" and r, "the end"
    )

    assert again.status_code == 201
    assert [line["attempt"] for line in server.lines(effect=rerun)] == [1, 2]
    assert (unknown.status_code, unknown.json()["code"]) == (409, "outcome-unknown")
    assert len(server.lines(effect=held)) == 1


def test_a_worker_that_takes_too_long(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Gunicorn's SIGABRT is a SystemExit in the handler: the key is free at once, or unknown, as the policy says.

    It is sent here, because gunicorn kills a worker that has not ended a second later.
    """
    target, url = target_of("redis", request)
    rerun, held = new_key(), new_key()

    with Gunicorn(tmp_path, target, "flask_app", url=url) as server, ThreadPoolExecutor(1) as threads:
        for path, key in (("order", rerun), ("held", held)):
            running = threads.submit(server.post, f"{path}?gate={key}", key)
            os.kill(server.effects(key)[0]["pid"], signal.SIGABRT)
            with suppress(httpx.TransportError):  # not every version of gunicorn gives an answer
                assert running.result().status_code == 500
        until(lambda: server.lines(event="released") and server.lines(event="held"), "both ends")
        for key in (rerun, held):
            server.open_gate(key)
        again, unknown = server.post(f"order?gate={rerun}", rerun), server.post(f"held?gate={held}", held)

    assert (again.status_code, unknown.json()["code"]) == (201, "outcome-unknown")
    assert (len(server.lines(effect=rerun)), len(server.lines(effect=held))) == (2, 1)
    target.forget()


def test_a_server_that_stops_writes_what_is_pending(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A record that the store refuses meanwhile is written before the worker ends, and the store is closed."""
    target, _ = target_of("redis", request)
    key = new_key()
    port = int(target.url.rpartition(":")[2].partition("/")[0])
    with (
        Proxy(port) as proxy,
        Gunicorn(tmp_path, target, "flask_app", url=with_port(target.url, proxy.port)) as server,
        ThreadPoolExecutor(1) as threads,
    ):
        running = threads.submit(server.post, f"order?gate={key}", key)
        server.effects(key)
        proxy.aim(free_port())
        proxy.cut()
        server.open_gate(key)
        assert running.result().status_code == 201
        stopping = threads.submit(server.stop)
        until(lambda: "Handling signal: term" in server.log.read_text(), "the stop")
        proxy.aim(port)
        assert stopping.result() == 0

    assert [line["event"] for line in server.lines(operation="POST /order")] == ["unrecorded", "stored"]
    target.forget()


def test_workers_of_a_file_are_seen_beside_a_store_in_memory(tmp_path: Path) -> None:
    """One line in the log of gunicorn, although its command and its environment name no number."""
    (tmp_path / "gunicorn.conf.py").write_text("workers = 2")
    with Gunicorn(tmp_path, Target("memory", "memory://"), "flask_app") as gunicorn:
        for _ in range(2):
            assert gunicorn.post("order", new_key()).status_code == 201
        log = gunicorn.log.read_text()

    assert 1 <= log.count("The store is in the memory of one process, and the server has several workers") <= 2

"""The command that relays: it runs until it is stopped, in the way in which it is stopped."""

from __future__ import annotations

import inspect
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idempotency._cli.commands import app
from idempotency._cli.options import DEFAULT_LEASE
from idempotency._cli.relay import _place
from idempotency.outbox._log import LogRelay
from idempotency.outbox._poll import PollingRelay
from tests.cli.test_outbox import Place, place, refused
from tests.kit.relay_process import PRINTED, SLOWLY, relaying

__all__ = ["place"]


@pytest.mark.stores("sqlite", "postgres")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.processes
def test_a_relay_runs_until_it_is_told_to_stop(place: Place, number: signal.Signals) -> None:
    """It publishes what is there and what comes, and gives back its buckets when it ends."""
    place.emit("before")
    with relaying(place.target.url, place.table, PRINTED) as (process, output):
        assert output.readline() == "published before\n"
        place.emit("later")
        assert output.readline() == "published later\n"
        assert place.command("outbox", "stats").stdout.splitlines()[-1].endswith(" buckets 0-63")

        process.send_signal(number)

        assert process.wait(20) == 0
    lines = place.command("outbox", "stats").stdout.splitlines()
    assert (lines[0], lines[-1]) == ("due:       0", "relay:     -")


@pytest.mark.stores("sqlite")
@pytest.mark.processes
def test_the_batch_in_hand_is_finished(place: Place) -> None:
    """Also if the signal is sent twice at once, as by a terminal."""
    with relaying(place.target.url, place.table, SLOWLY) as (process, output):
        place.emit("short")
        assert output.readline() == "begun short\n"

        for _ in range(2):
            process.send_signal(signal.SIGTERM)

        assert output.readline() == "published short\n"
        assert process.wait(20) == 0
    assert place.do(lambda box: box.waiting()) == []


@pytest.mark.stores("sqlite")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say which signals are caught")
@pytest.mark.processes
def test_a_second_signal_ends_it_at_once(place: Place) -> None:
    """The message in hand is published again by the next relay."""
    with relaying(place.target.url, place.table, SLOWLY) as (process, output):
        place.emit("endless")
        assert output.readline() == "begun endless\n"

        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while catches_or_ignores(process.pid, signal.SIGTERM):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)

        assert process.wait(20) == -signal.SIGTERM
    assert place.do(lambda box: box.waiting()) == ["endless"]


def catches_or_ignores(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler of a signal, or ignores it."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigCgt", "SigIgn"))]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "IDEMPOTENCY_PUBLISH"),
        (("--publish", "redis://:secret@localhost?nonsense=1"), "'nonsense' is no option"),
        (("--publish", "tests.kit.relay_functions:nothing"), "cannot be imported"),
        (("--publish", PRINTED, "--lease", "15"), "lease must be longer than the publisher's delivery time-out"),
        (("--publish", PRINTED, "--lease", "60", "--log"), "needs a PollingRelay"),
        (("--publish", PRINTED, "--slot", "orders"), "need --log"),
        (("--publish", PRINTED, "--mode", "message"), "need --log"),
        (("--publish", PRINTED, "--log", "--ordering", "none"), "without --log"),
    ],
)
def test_a_relay_that_cannot_run(place: Place, arguments: tuple[str, ...], words: str) -> None:
    """Each is one line that says what to give instead, without the password."""
    result = place.command("relay", *arguments)

    refused(result, words)
    assert "secret" not in result.stderr


@pytest.mark.stores("postgres")
def test_a_relay_without_its_tables_says_how_to_create_them(place: Place) -> None:
    arguments = ["--store", place.target.url, "--table", "nowhere", "--publish", PRINTED, "--lease", "60"]
    result = CliRunner().invoke(app, ["relay", *arguments])

    assert result.exit_code == 2
    assert "has no table nowhere: run `idempotency outbox schema create`" in result.stderr


@pytest.mark.parametrize(
    ("publish", "shown"),
    [
        ("amqp://app:secret@rabbit:5672/orders?exchange=secret", "amqp://rabbit:5672"),
        ("https://hooks.example/secret", "https://hooks.example"),
        ("nats://secret@a:4222,b:4222", "nats://a:4222,b:4222"),
        ("shop.handlers:published", "shop.handlers:published"),
    ],
)
def test_where_a_relay_publishes_is_said_without_secrets(publish: str, shown: str) -> None:
    assert _place(publish) == shown


def test_the_lease_of_the_command_is_that_of_the_relays() -> None:
    """Doctor compares it with the delivery time-out of the publisher."""
    defaults = [inspect.signature(each).parameters["lease"].default for each in (PollingRelay, LogRelay)]

    assert defaults == [DEFAULT_LEASE, DEFAULT_LEASE]

"""What an operator sees of an outbox and does with it, by commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner, Result

from idempotency._cli import show
from idempotency._cli.commands import app
from idempotency.outbox import Outbox
from tests.kit.box import FAR, Box
from tests.kit.targets import Target

SERVERS = pytest.mark.stores("postgres", "mariadb", "sqlite")
NOBODY = "00000000-0000-7000-8000-000000000000"


class Place:
    """An outbox of one test, for commands that have an event loop of their own."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.table = f"{target.name}_out"
        self.ids: dict[str, str] = {}

    def do(self, work: Callable[[Box], Awaitable[Any]]) -> Any:
        """Do work on the outbox, and remember the ids of the messages."""

        async def main() -> Any:
            engine = create_async_engine(self.target.url)
            box = Box(engine, Outbox(self.table, notify=False))
            box.ids = self.ids
            try:
                return await work(box)
            finally:
                await engine.dispose()

        return asyncio.run(main())

    def emit(self, name: str, **values: Any) -> str:
        """Emit a message, and return its id."""
        self.do(lambda box: box.emit(name, **values))
        return self.ids[name]

    def command(self, *arguments: str, **options: Any) -> Result:
        """Run a command on the outbox."""
        return CliRunner().invoke(app, [*arguments, "--store", self.target.url, "--table", self.table], **options)


@pytest.fixture
def place(store_target: Target) -> Place:
    """An outbox that the command has created."""
    place = Place(store_target)
    created = place.command("outbox", "schema", "create")
    names = ", ".join(f"{place.table}{end}" for end in ("", "_dead", "_lease"))
    assert (created.exit_code, created.stdout) == (0, f"tables {names} and {place.table}_position are there\n")
    return place


def refused(result: Result, *words: str) -> None:
    """Assert that a command said, in one line on stderr, why it did nothing."""
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


@SERVERS
def test_messages_are_listed_without_their_payloads(place: Place) -> None:
    """A line for each, with what the operator needs for the next command."""
    assert place.command("outbox", "list").stderr == "no message waits\n"
    first = place.emit("secret")
    scheduled = place.emit("later\n", key=2, type="Paid\n", available_at=FAR)

    one, two = place.command("outbox", "list").stdout.splitlines()

    assert one.split("\t")[:2] == [first, "due"]
    assert one.endswith("\tattempts=0\tdue=now\ttype=Placed\tkey=order/1")
    assert two.split("\t")[:2] == [scheduled, "scheduled"]
    assert two.endswith("\ttype=Paid\\n\tkey=order/2")
    assert "\tdue=in " in two
    assert "secret" not in place.command("outbox", "list", "--json").stdout
    assert place.command("outbox", "list", "--key", "order/2", "--payload").stdout.endswith("\tpayload=later\\n\n")
    assert place.command("outbox", "list", "--limit", "1").stdout.count("\n") == 1


@SERVERS
def test_messages_as_json(place: Place) -> None:
    """Durations are seconds; a payload is text, or base64 where it is none, and is absent unless it is asked for."""
    place.emit("text")
    place.emit("bytes", payload=b"\xff")
    place.emit("tombstone", payload=None)

    listed = json.loads(place.command("outbox", "list", "--json", "--payload").stdout)

    assert [each["payload"] for each in listed] == ["text", "base64:/w==", None]
    [first] = json.loads(place.command("outbox", "list", "--json", "--limit", "1").stdout)
    assert 0 <= first.pop("age") < 60
    assert first == {
        "id": place.ids["text"],
        "aggregate_type": "order",
        "aggregate_id": "1",
        "type": "Placed",
        "state": "due",
        "attempts": 0,
        "due_in": None,
        "reason": None,
    }


@SERVERS
def test_dead_messages_are_listed_with_the_reason_and_redriven(place: Place) -> None:
    """By id, or all of a type. The command says that others may have gone ahead."""
    for name, type in (("one", "Placed"), ("two", "Placed"), ("three", "Paid")):
        place.emit(name, type=type)
    place.do(lambda box: box.die("one", "two", "three", reason="too\nlarge"))

    listed = place.command("outbox", "list", "--dead").stdout.splitlines()

    assert [line.split("\t")[:2] for line in listed] == [[place.ids[name], "dead"] for name in ("one", "two", "three")]
    assert listed[0].endswith("\tattempts=3\tdue=never\ttype=Placed\tkey=order/1\treason=too\\nlarge")
    result = place.command("outbox", "redrive", place.ids["two"])
    assert (result.stdout, result.stderr.split(":")[0]) == ("redriven 1 message\n", "note")
    assert place.command("outbox", "redrive", "--all", "--type", "Placed").stdout == "redriven 1 message\n"
    assert place.do(lambda box: box.waiting()) == ["two", "one"]
    assert place.command("outbox", "redrive", "--all").stdout == "redriven 1 message\n"
    nothing = place.command("outbox", "redrive", "--all")
    assert (nothing.stdout, nothing.stderr) == ("redriven 0 messages\n", "")
    refused(place.command("outbox", "redrive", place.ids["two"]), "no dead message", "nothing was moved")


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("arguments", [(), ("--all", NOBODY), ("--type", "Placed"), (NOBODY, "--type", "Placed")])
def test_what_to_redrive_must_be_clear(place: Place, arguments: tuple[str, ...]) -> None:
    refused(place.command("outbox", "redrive", *arguments), "give one ID or several, or --all")


@SERVERS
def test_stats_of_an_outbox(place: Place) -> None:
    """How many messages are in each state, and which relay has which buckets."""
    place.emit("due")
    place.emit("scheduled", available_at=FAR)
    lease = Outbox(place.table).tables.lease
    names = [*(f"bucket-{number:02}" for number in (0, 1, 2, 40)), "relay-a", "slot-orders"]
    rows = [{"name": name, "owner": "a", "until_ms": FAR * 1000} for name in names]

    assert place.command("outbox", "stats").stdout.splitlines()[-1] == "relay:     -"
    place.do(lambda box: box.execute(insert(lease).values(rows)))

    lines = place.command("outbox", "stats").stdout.splitlines()
    oldest = lines.pop(4)
    assert oldest.startswith("oldest:    ")
    assert lines == [
        "due:       1",
        "scheduled: 1",
        "blocked:   0",
        "dead:      0",
        "relay:     a buckets 0-2, 40, slot orders",
    ]
    shown = json.loads(place.command("outbox", "stats", "--json").stdout)
    assert 0 <= shown.pop("oldest_age") < 60
    assert shown == {
        "due": 1,
        "scheduled": 1,
        "blocked": 0,
        "dead": 0,
        "relays": [{"owner": "a", "buckets": [0, 1, 2, 40], "slots": ["orders"]}],
    }


@SERVERS
def test_forget_asks_before_it_deletes_a_message(place: Place) -> None:
    """Anything but a yes forgets nothing."""
    id = place.emit("one")

    for answer in ("n\n", ""):
        declined = place.command("outbox", "forget", id, input=answer)
        assert declined.exit_code == 2
        assert "--yes" in declined.stderr
    assert place.do(lambda box: box.waiting()) == ["one"]

    assert place.command("outbox", "forget", id, input="y\n").exit_code == 0
    assert place.do(lambda box: box.waiting()) == []
    refused(place.command("outbox", "forget", id, "--yes"), "there is no message", "nothing was forgotten")
    refused(place.command("outbox", "forget", "order-7", "--yes"), "is a UUID")


def test_the_statements_of_the_tables_need_no_database() -> None:
    """On PostgreSQL with the partial index, and with the options of the table."""
    shown = CliRunner().invoke(app, ["outbox", "schema", "--table", "shop.box"]).stdout

    assert "CREATE TABLE shop.box_dead (" in shown
    assert "ON shop.box (available_ms) WHERE available_ms IS NOT NULL;" in shown
    assert "ALTER TABLE shop.box SET (autovacuum_vacuum_scale_factor = 0" in shown
    assert "ENGINE=InnoDB" in CliRunner().invoke(app, ["outbox", "schema", "--dialect", "mariadb"]).stdout
    refused(CliRunner().invoke(app, ["outbox", "schema", "--dialect", "oracle7"]), "dialect must be")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "IDEMPOTENCY_STORE"),
        (("--store", "redis://:secret@localhost"), "an outbox is in a SQL database"),
        (("--store", "postgresql+nothing://app:secret@localhost/orders"), "no driver"),
        (("--store", "sqlite+aiosqlite:///nowhere.db"), "there is no SQLite database nowhere.db"),
        (("--store", "sqlite+aiosqlite://"), "in memory"),
    ],
)
def test_an_outbox_that_cannot_be_opened(arguments: tuple[str, ...], words: str) -> None:
    """Each is one line that says what to give instead, without the password."""
    result = CliRunner().invoke(app, ["outbox", "stats", *arguments], env={"IDEMPOTENCY_STORE": ""})

    refused(result, words)
    assert "secret" not in result.stderr


def test_a_file_without_an_outbox_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'orders.db'}"
    CliRunner().invoke(app, ["schema", "create", "--store", url])

    refused(CliRunner().invoke(app, ["outbox", "list", "--store", url]), "no table outbox: idempotency outbox schema")


@pytest.mark.stores("sqlite")
def test_on_a_terminal_messages_are_a_table(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole ids, which the next command needs."""
    id = place.emit("one")
    monkeypatch.setattr(show, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")

    head, line = place.command("outbox", "list").stdout.splitlines()

    assert head.split() == ["id", "state", "age", "attempts", "due", "type", "key"]
    assert line.split() == [id, "due", "0s", "0", "now", "Placed", "order/1"]


@SERVERS
def test_doctor_examines_the_outbox_that_is_named(place: Place) -> None:
    """Its findings follow those of the store, and decide the exit code too."""
    place.emit("one")
    arguments = ["doctor", "--store", place.target.url, "--table", place.target.name]
    asyncio.run(place.target.create())

    result = CliRunner().invoke(app, [*arguments, "--outbox", place.table])

    assert f"ok   table {place.target.name}: primary key and index\n" in result.stdout
    assert f"ok   {place.table}: index on available_ms\n" in result.stdout
    assert "fix  no relay runs; messages that wait: 1" in result.stdout
    assert result.exit_code == 1
    missing = CliRunner().invoke(app, [*arguments, "--outbox", "nowhere"])
    assert "fix  there is no table nowhere: idempotency outbox schema create" in missing.stdout


def test_doctor_examines_an_outbox_that_is_there(tmp_path: Path) -> None:
    """One that is not named is examined only where its tables are."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'orders.db'}"
    CliRunner().invoke(app, ["schema", "create", "--store", url])
    assert "outbox" not in CliRunner().invoke(app, ["doctor", "--store", url]).stdout

    CliRunner().invoke(app, ["outbox", "schema", "create", "--store", url])

    assert "ok   outbox: index on available_ms\n" in CliRunner().invoke(app, ["doctor", "--store", url]).stdout
    refused(CliRunner().invoke(app, ["doctor", "--store", "redis://localhost", "--outbox", "outbox"]), "SQL database")


@SERVERS
def test_an_outbox_is_examined_where_there_is_no_table_of_records(place: Place) -> None:
    """By a command of its own: in a service that only emits, nothing else is missing."""
    empty = place.command("outbox", "doctor")
    place.emit("one")
    waiting = place.command("outbox", "doctor", "--json")
    careless = place.command("outbox", "doctor", "--publish", "redis://localhost", "--lease", "10")

    assert (empty.exit_code, "fix" in empty.stdout) == (0, False)
    assert f"ok   {place.table}: index on available_ms\n" in empty.stdout
    levels = {finding["what"].split(";")[0]: finding["level"] for finding in json.loads(waiting.stdout)}
    assert (waiting.exit_code, levels["no relay runs"]) == (1, "fix")
    assert "fix  the lease of 10 s is not longer than the delivery time-out of " in careless.stdout


def test_the_configuration_of_debezium_needs_no_database() -> None:
    """It names the table, and has no password; on another database than PostgreSQL it is an error."""
    url = "postgresql+asyncpg://app:secret@db/orders"

    result = CliRunner().invoke(app, ["outbox", "debezium", "--store", url, "--table", "box"])

    assert json.loads(result.stdout)["config"]["table.include.list"] == r"public\.box"
    assert "secret" not in result.stdout
    elsewhere = ["outbox", "debezium", "--store", "mysql+aiomysql://app:secret@db/orders"]
    refused(CliRunner().invoke(app, elsewhere), "the connector is for PostgreSQL")


@pytest.mark.stores("sqlite")
def test_doctor_compares_the_lease_with_the_publisher(place: Place) -> None:
    """The publisher's delivery time-out is that of its URL."""
    asyncio.run(place.target.create())
    doctor = ["doctor", "--store", place.target.url, "--table", place.target.name, "--outbox", place.table]
    publish = ["--publish", "redis://localhost"]

    careless = CliRunner().invoke(app, [*doctor, *publish, "--lease", "10"])

    assert "fix  the lease of 10 s is not longer than the delivery time-out of " in careless.stdout
    assert "lease" not in CliRunner().invoke(app, [*doctor, *publish, "--lease", "600"]).stdout

"""What an operator sees of projections and does with them, by commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner, Result

from idempotency._cli.commands import app
from idempotency.projections import ProjectionStoppedError
from tests.kit.targets import Target
from tests.projections.kit import KINDS, Bank, open_bank

pytestmark = pytest.mark.stores(*KINDS)


class Place:
    """A bank of one test, for commands that have an event loop of their own."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def do(self, work: Callable[[Bank], Awaitable[Any]], create: bool = False) -> Any:
        async def main() -> Any:
            async with open_bank(self.target, create) as bank:
                return await work(bank)

        return asyncio.run(main())

    def command(self, *arguments: str) -> Result:
        table = f"{self.target.name}_ck"
        return CliRunner().invoke(app, ["projection", *arguments, "--store", self.target.url, "--table", table])

    def listed(self) -> list[Any]:
        found = self.command("list", "--json", "--streams", f"{self.target.name}_ev")
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)


@pytest.fixture
def place(store_target: Target) -> Place:
    """Two versions, of which the live one has stopped at the second of three events."""

    async def work(bank: Bank) -> None:
        def fail(event: Any) -> None:
            if event.data.amount == 2:
                raise ValueError("secret")

        bank.fails = fail
        await bank.append(1, 2, 3)
        await bank.readable()
        with suppress(ProjectionStoppedError):
            await bank.projection(1, attempts=1).catch_up()
        bank.fails = lambda event: None
        await bank.projection(2, batch=2).run_once()

    place = Place(store_target)
    place.do(work, create=True)
    return place


def test_list_says_where_a_projection_is_and_why(place: Place) -> None:
    """State, position, error and lag of each version, as JSON and as lines; nothing of the event."""
    stopped, running = place.listed()

    assert (stopped["name"], stopped["version"], stopped["live"], stopped["state"]) == ("balance", 1, True, "stopped")
    assert (stopped["error"], stopped["attempts"], stopped["next"]) == (
        "ValueError",
        1,
        "none: skip the event, or resume",
    )
    assert (running["version"], running["live"], running["state"], running["failed"]) == (2, False, "running", None)
    assert running["position"] == stopped["failed"] != stopped["position"]
    assert running["lag"] > 0
    lines = place.command("list").stdout.splitlines()
    assert [line.split("\t")[:3] for line in lines] == [
        ["balance/1", "stopped", "live=yes"],
        ["balance/2", "running", "live=no"],
    ]


def test_the_help_of_list_says_what_shows_the_lag() -> None:
    """It is of the table of events, which no checkpoint names."""
    shown = CliRunner().invoke(app, ["projection", "list", "--help"], env={"COLUMNS": "200"}).stdout
    assert "unknown without --streams" in " ".join(shown.split())


def test_skip_switch_and_drop(place: Place) -> None:
    """In this order, each with a refusal before."""
    stopped, _ = place.listed()
    refused = [
        place.command("skip", "balance", "1", "0.0", "--reason", "x", "--yes"),
        place.command("skip", "balance", "1", "7", "--reason", "x", "--yes"),
        place.command("resume", "balance", "2"),
        place.command("drop", "balance", "1", "--yes"),
        place.command("drop", "balance", "2"),
    ]
    assert [(each.exit_code, each.stdout.strip(), each.stderr.count("error: ")) for each in refused] == [(2, "", 1)] * 5

    skipped = place.command("skip", "balance", "1", stopped["failed"], "--reason", "a test of ours", "--yes")
    assert (skipped.exit_code, skipped.stdout) == (0, f"balance version 1 goes on after {stopped['failed']}\n")
    place.do(lambda bank: bank.projection(1).catch_up())
    behind = place.command("switch", "balance", "2")
    assert (behind.exit_code, "before the live one: let it catch up" in behind.stderr) == (2, True)
    place.do(lambda bank: bank.projection(2).catch_up())
    done = [place.command("switch", "balance", "2"), place.command("drop", "balance", "1", "--yes")]

    assert [each.stdout for each in done] == ["balance version 2 is live\n", "balance version 1 has ended\n"]
    place.do(lambda bank: bank.append(4))
    assert [(each["version"], each["live"], each["state"], each["lag"] is None) for each in place.listed()] == [
        (1, False, "dropped", True),
        (2, True, "running", False),
    ]
    assert [line.split("\t")[5] for line in place.command("list").stdout.splitlines()] == ["lag=none", "lag=unknown"]


def test_resume_tries_the_event_again(place: Place) -> None:
    """Once its cause is removed."""
    assert place.command("resume", "balance", "1").stdout == "balance version 1 tries the event again\n"
    place.do(lambda bank: bank.projection(1).catch_up())

    assert place.do(lambda bank: bank.seen(1)) == (3, 6)


def test_the_tables_are_created_or_printed(store_target: Target) -> None:
    """The command makes what projections need; before it says which table is missing."""
    place = Place(store_target)
    missing = place.command("list")
    assert (missing.exit_code, missing.stdout) == (2, "")
    name = f"{store_target.name}_ck"
    created = place.command("schema", "create")
    assert created.stdout == f"tables {name}, {name}_live and {name}_skipped are there\n"
    assert place.command("list").stderr == "there is no checkpoint\n"
    printed = CliRunner().invoke(app, ["projection", "schema", "--dialect", "sqlite"]).stdout
    assert printed.startswith("CREATE TABLE idempotency_checkpoint (")


def test_the_tables_are_created_with_those_of_the_store(store_target: Target) -> None:
    """As those of streams are, and printed with them."""
    name = store_target.name
    options = ["--table", name, "--streams", f"{name}_ev", "--projections", f"{name}_ck"]
    created = CliRunner().invoke(app, ["schema", "create", "--store", store_target.url, *options])
    assert f"{name}_ck, {name}_ck_live, {name}_ck_skipped are there\n" in created.stdout
    assert Place(store_target).command("list").stderr == "there is no checkpoint\n"
    printed = CliRunner().invoke(app, ["schema", "sql", "--dialect", "sqlite", "--projections", "progress"]).stdout
    assert [f"CREATE TABLE progress{each} (" in printed for each in ("", "_live", "_skipped")] == [True] * 3


@pytest.mark.stores("postgres")
def test_a_transaction_that_delays_projections_is_named(place: Place) -> None:
    """It is open and has written: what is committed after it began is not applied yet."""
    engine = create_engine(place.target.sync_url)
    with engine.connect() as connection:
        connection.execute(text("SELECT txid_current()"))
        end = monotonic() + 60
        while "delays those who read all events" not in place.listed()[1]["next"]:
            assert monotonic() < end
    engine.dispose()

    assert place.listed()[0]["next"] == "none: skip the event, or resume"


def test_a_store_that_is_no_database_is_refused(store_target: Target) -> None:
    """Checkpoints are in the database of what is written."""
    refused = CliRunner().invoke(app, ["projection", "list", "--store", "redis://localhost"])
    assert (refused.exit_code, "name the SQL database" in refused.stderr) == (2, True)


@pytest.mark.stores("postgres", "mariadb")
def test_a_database_that_cannot_be_reached_is_one_line(store_target: Target) -> None:
    """With what to do about it."""
    scheme = store_target.url.partition("://")[0]
    refused = CliRunner().invoke(app, ["projection", "list", "--store", f"{scheme}://127.0.0.1:1/test"])
    assert (refused.exit_code, refused.stderr.count("cannot be reached: start it, or correct the URL")) == (2, 1)


def test_doctor_names_a_projection_that_has_stopped(place: Place) -> None:
    """Where and why, and what to look at next; then that none has stopped."""
    name = place.target.name
    assert CliRunner().invoke(app, ["schema", "create", "--store", place.target.url, "--table", name]).exit_code == 0

    def doctor(checkpoints: str) -> tuple[int, list[tuple[str, str]]]:
        options = ["--table", name, "--streams", f"{name}_ev", "--projections", checkpoints]
        examined = CliRunner().invoke(app, ["doctor", "--store", place.target.url, *options, "--json"])
        found = [(each["level"], each["what"]) for each in json.loads(examined.stdout)]
        return examined.exit_code, [each for each in found if "projection" in each[1]]

    stopped, _ = place.listed()
    at = stopped["failed"]
    what = f"projection balance version 1 is stopped at {at}: ValueError; see idempotency projection list"
    assert doctor(f"{name}_ck") == (1, [("fix", what)])
    assert [level for level, _ in doctor("nowhere")[1]] == ["fix"]

    place.command("skip", "balance", "1", at, "--reason", "known", "--yes")
    assert doctor(f"{name}_ck") == (0, [("ok", f"{name}_ck: no projection has stopped")])


@pytest.mark.stores("sqlite")
def test_doctor_examines_the_checkpoints_beside_streams_if_they_are_there(store_target: Target) -> None:
    """Their table has the default name here; an application without projections has none."""
    store = ["--store", store_target.url]
    for command in (["schema", "create", "--streams", "stream_event"], ["projection", "schema", "create"]):
        examined = CliRunner().invoke(app, ["doctor", "--streams", "stream_event", *store]).stdout
        assert "projection" not in examined
        assert CliRunner().invoke(app, [*command, *store]).exit_code == 0

    examined = CliRunner().invoke(app, ["doctor", "--streams", "stream_event", *store]).stdout
    assert "idempotency_checkpoint: no projection has stopped" in examined

"""What an operator sees of sagas and does with them, by commands."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idempotency._cli import show
from idempotency._cli.commands import app
from idempotency._sagas.journal import saga_id
from idempotency.saga import AsyncSaga, SagaError, Sweeper
from idempotency.stores.sql import SQLStore
from tests.kit.targets import Target, run_on
from tests.saga.operate import trips

STORES = pytest.mark.stores("sqlite", "redis", "postgres")
ID = saga_id("book-trip", "trip-7").hex()


class Place:
    """Sagas of one store, for commands that have an event loop of their own."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.do(lambda store: store.create_saga_schema() if isinstance(store, SQLStore) else asyncio.sleep(0))

    def do(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """Do work on the store."""

        async def main(store: Any) -> Any:
            return await work(store)

        return run_on(self.target, main)

    def saga(self, *arguments: str, key: str = "trip-7", name: str = "book-trip") -> Any:
        """Run the saga as far as it goes."""

        async def run(store: Any) -> Any:
            try:
                return await trips.trips(store, name)(*arguments, key=key)
            except SagaError as error:
                return error

        return self.do(run)

    def stick(self, **named: str) -> None:
        """Let a saga be stuck at its step hotel, whose outcome is unknown."""

        async def run(store: Any) -> None:
            trips.HANGING["hotel"] = asyncio.Event()
            before = trips.DID["hotel"]
            task = asyncio.create_task(trips.trips(store, named.get("name", "book-trip"))("Rome", key="trip-7"))
            await trips.until(lambda: trips.DID["hotel"] > before)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            trips.HANGING.clear()

        self.do(run)
        self.saga("Rome", **named)

    def sweep(self) -> int:
        """Let a sweeper run what is due."""

        async def sweep(store: Any) -> int:
            saga: AsyncSaga[str] = trips.trips(store)
            return await Sweeper(store, [saga]).sweep()

        found: int = self.do(sweep)
        return found

    def command(self, *arguments: str, **options: Any) -> Result:
        """Run a command on the sagas."""
        names = [text for name, value in self.target.options.items() for text in (f"--{name}", value)]
        return CliRunner().invoke(app, ["saga", *arguments, "--store", self.target.url, *names], **options)

    def inspected(self, *options: str) -> dict[str, Any]:
        """Return what inspect says of the saga trip-7."""
        [found] = json.loads(self.command("inspect", "book-trip/trip-7", "--json", *options).stdout)
        return dict(found)


@pytest.fixture
def place(store_target: Target) -> Place:
    """A store with the tables of sagas."""
    for each in (trips.DID, trips.FAILING, trips.HANGING):
        each.clear()
    asyncio.run(store_target.create())
    return Place(store_target)


def refused(result: Result, *words: str) -> None:
    """Assert that a command said, in one line on stderr, why it did nothing."""
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


@STORES
def test_sagas_are_listed_with_the_reason_and_what_comes_next(place: Place) -> None:
    """A line for each, which names what the next command needs."""
    assert place.command("list").stderr == "no saga goes on\n"
    place.stick()
    place.saga("Rome", "sleep", key="trip\n8")

    one, two = place.command("list").stdout.splitlines()

    assert one.split("\t")[:2] == [ID, "stuck"]
    assert one.endswith(
        "\tattempts=2\tnext=-\towner=-\tstep=hotel\terror=-\tname=book-trip\tkey=trip-7"
        "\treason=the outcome of the step hotel is unknown"
    )
    assert two.split("\t")[1] == "waiting"
    assert "\tnext=run in " in two
    assert two.endswith("\tstep=sleep:cool\terror=-\tname=book-trip\tkey=trip\\n8\treason=it sleeps: cool")
    assert place.command("list", "--state", "stuck").stdout.count("\n") == 1
    assert place.command("list", "--name", "other").stderr == "no saga goes on\n"
    assert place.command("list", "--state", "undone").stderr == "no saga is undone\n"


@STORES
def test_sagas_as_json(place: Place) -> None:
    """Durations are seconds, and None is what there is not."""
    place.stick()

    [shown] = json.loads(place.command("list", "--json").stdout)

    assert 0 <= shown.pop("age") < 60
    assert shown == {
        "id": ID,
        "name": "book-trip",
        "key": "trip-7",
        "state": "stuck",
        "step": "hotel",
        "reason": "the outcome of the step hotel is unknown",
        "error": "",
        "next": "",
        "next_in": None,
        "owner": "",
        "attempts": 2,
        "crashes": 0,
        "deadline_in": None,
    }


@STORES
@pytest.mark.parametrize("named", ["book-trip/trip-7", "trip-7", ID, ID[:12]])
def test_one_command_says_where_a_saga_is_and_why(place: Place, named: str) -> None:
    """By whatever the operator has. Arguments and results are shown only with --show."""
    place.stick()

    result = place.command("inspect", named)

    lines = result.stdout.splitlines()
    shown = {name: value.strip() for name, value in (line.split(":", 1) for line in lines[:14])}
    assert "s" in shown.pop("age")
    assert shown == {
        "id": ID,
        "name": "book-trip",
        "key": "trip-7",
        "state": "stuck",
        "reason": "the outcome of the step hotel is unknown",
        "step": "hotel",
        "error": "-",
        "next": "-",
        "owner": "-",
        "attempts": "2",
        "deadline": "-",
        "input": "23 bytes",
        "result": "-",
    }
    flight, hotel = (line.split("\t") for line in lines[15:])
    assert (flight[:3], hotel[:3]) == (
        ["step:flight", "done", "attempts=1"],
        ["step:hotel", "unknown", "attempts=1"],
    )
    assert flight[-2:] == ["result=18 bytes", "note=compensatable, undo cancel_flight"]
    assert "Rome" not in result.stdout
    values = place.command("inspect", named, "--show").stdout
    assert 'input:    {"to": "Rome", "plan": ""}' in values
    assert '\tvalue="flight to Rome"\n' in values


@STORES
def test_a_stuck_saga_is_resolved(place: Place) -> None:
    """With what the step returned; a sweeper of the application goes on."""
    place.stick()

    result = place.command("resolve", "trip-7", "hotel", "done", "--result", '"by phone"', "--by", "anna")

    assert result.stdout == "book-trip/trip-7 hotel is done: the saga goes on now\n"
    assert place.sweep() == 1
    found = place.inspected("--show")
    assert (found["state"], found["result"]) == ("done", "flight to Rome, by phone")
    assert found["facts"][1]["note"].endswith("resolved by anna")
    refused(place.command("resolve", "trip-7", "hotel", "not-done"), "has ended: nothing was changed")


@pytest.mark.stores("sqlite")
def test_what_cannot_be_resolved(place: Place) -> None:
    place.stick()

    refused(place.command("resolve", "trip-9", "hotel", "done"), "there is no saga trip-9")
    refused(place.command("resolve", "trip-7", "flight", "done"), "knows its result")
    refused(place.command("resolve", "trip-7", "hotel", "done", "--result", "by phone"), "--result is JSON")
    refused(place.command("resolve", "trip-7", "hotel", "not-done", "--result", "5"), "has no result")
    place.saga("Rome", "sleep", key="trip-8")
    assert place.command("retry", saga_id("book-trip", "trip-8").hex()[:12]).stdout.startswith("book-trip/trip-8 ")
    place.stick(name="other")
    refused(place.command("retry", "trip-7"), "several sagas have the key trip-7", "book-trip/trip-7, other/trip-7")
    assert place.command("inspect", "trip-7").stdout.count("\n") == 2


@STORES
def test_a_stuck_saga_is_compensated(place: Place) -> None:
    """It asks before. The application then undoes it."""
    place.stick()
    for answer in ("n\n", ""):
        declined = place.command("compensate", "trip-7", input=answer)
        assert declined.exit_code == 2
        assert "--yes" in declined.stderr
    assert place.inspected()["state"] == "stuck"

    accepted = place.command("compensate", "trip-7", input="y\n")
    assert accepted.stdout.endswith("book-trip/trip-7 has failed, and is undone from now on\n")

    assert place.inspected()["state"] == "undoing"
    assert place.sweep() == 1
    found = place.inspected()
    assert (found["state"], found["error"]) == ("undone", "idempotency.saga.errors.CancelledByOperatorError")
    assert trips.DID["cancel flight to Rome"] == 1


@STORES
def test_a_saga_is_cancelled(place: Place) -> None:
    """One that waits is due at once."""
    place.saga("Rome", "sleep")

    result = place.command("cancel", "trip-7", "--yes", "--by", "anna")

    assert result.stdout == "book-trip/trip-7 is cancelled at its next step\n"
    assert place.sweep() == 1
    assert place.inspected()["state"] == "undone"


@STORES
def test_a_saga_is_given_a_signal(place: Place) -> None:
    """The first one counts, and it must be about what the saga asks."""
    place.saga("Rome", "approve")
    signal = ("signal", "trip-7", "approve")
    refused(place.command(*signal), "about something else")

    result = place.command(*signal, "--about", '{"price": 50}', "--value", "true", "--by", "anna")

    assert result.stdout == "book-trip/trip-7 has the signal approve\n"
    refused(place.command(*signal, "--about", '{"price": 50}'), "has a signal approve already")
    assert place.sweep() == 1
    assert place.inspected()["state"] == "done"


@STORES
def test_a_saga_is_retried(place: Place) -> None:
    """One that would wait for its next attempt goes on now."""
    trips.FAILING.add("mail")
    place.saga("Rome")
    trips.FAILING.clear()

    assert place.command("retry", "trip-7").stdout == "book-trip/trip-7 goes on now\n"

    assert place.inspected()["next_in"] == 0
    assert place.sweep() == 1
    assert place.inspected()["state"] == "done"


@pytest.mark.stores("sqlite", "postgres")
def test_purge_deletes_expired_sagas_too(place: Place) -> None:
    """Where there are any, it says so."""
    names = [text for name, value in place.target.options.items() for text in (f"--{name}", value)]
    purge = ["purge", "--store", place.target.url, *names]
    for key in ("1", "2", "3"):
        place.do(lambda store, key=key: trips.trips(store, ttl=0.001)("Rome", key=key))  # type: ignore[misc]
    place.saga("Rome", "sleep", key="4")
    while place.command("list", "--state", "done").stdout:
        pass

    result = CliRunner().invoke(app, [*purge, "--batch", "2"])

    assert result.stdout == "purged 0 records\npurged 3 sagas\n"
    assert CliRunner().invoke(app, purge).stdout == "purged 0 records\n"
    assert place.command("list", "--ended").stdout.count("\n") == 1


@pytest.mark.stores("sqlite")
def test_on_a_terminal_sagas_are_a_table(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is cut to what the next command takes."""
    place.stick()
    monkeypatch.setattr(show, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")

    head, line = place.command("list").stdout.splitlines()

    assert head.split() == ["id", "state", "age", "attempts", "next", "owner", "step", "error", "name", "key", "reason"]
    assert line.split()[:2] == [ID[:12], "stuck"]
    assert line.rstrip().endswith("the outcome of the step hotel is unknown")


def test_a_file_without_sagas_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    """Nor are its tables created by a look."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'orders.db'}"
    CliRunner().invoke(app, ["schema", "create", "--store", url])

    refused(CliRunner().invoke(app, ["saga", "list", "--store", url]), "no table idempotency_record_saga", "--sagas")
    refused(CliRunner().invoke(app, ["saga", "list"], env={"IDEMPOTENCY_STORE": ""}), "IDEMPOTENCY_STORE")


@STORES
def test_doctor_examines_sagas_that_are_there(place: Place) -> None:
    """Where there are none, it says nothing of them; their tables are examined where they are there."""
    names = [text for name, value in place.target.options.items() for text in (f"--{name}", value)]

    def doctor() -> Result:
        return CliRunner().invoke(app, ["doctor", "--store", place.target.url, *names])

    tables = place.target.name + "_saga and " + place.target.name + "_saga_entry"
    assert (f"ok   tables {tables}: the indexes\n" in doctor().stdout) is (place.target.kind != "redis")
    assert "sagas:" not in doctor().stdout
    place.saga("Rome")
    assert "ok   sagas: none is stuck, and none is late\n" in doctor().stdout

    place.stick(name="other")

    assert "note sagas that are stuck: 1; idempotency saga list --state stuck\n" in doctor().stdout


def test_doctor_says_what_is_missing_of_sagas(tmp_path: Path) -> None:
    """Without tables of sagas there is nothing to say."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'orders.db'}"
    doctor = ["doctor", "--store", url]
    CliRunner().invoke(app, ["schema", "create", "--store", url])
    assert "saga" not in CliRunner().invoke(app, doctor).stdout

    CliRunner().invoke(app, ["schema", "create", "--sagas", "--store", url])
    with closing(sqlite3.connect(tmp_path / "orders.db")) as database:
        database.execute("DROP TABLE idempotency_record_saga_entry")
        database.execute("DROP INDEX idempotency_record_saga_due")

    result = CliRunner().invoke(app, doctor)
    remedy = "idempotency schema create --sagas"
    assert f"fix  there is no table idempotency_record_saga_entry: {remedy}\n" in result.stdout
    assert f"fix  idempotency_record_saga has no index on due_ms: {remedy}\n" in result.stdout
    assert result.exit_code == 1

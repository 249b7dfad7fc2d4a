"""The file of contracts, and the command that checks it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from typer.testing import CliRunner

from idempotency import idempotent, idempotent_consumer
from idempotency._cli.commands import app
from idempotency.contracts import Checked, Contract, Contracts, check, step_of
from idempotency.contracts._schema import schema_of
from idempotency.errors import ConfigurationError
from idempotency.saga import saga
from idempotency.stores.memory import MemoryStore
from idempotency.streams import Streams, Versioned


@dataclass
class Placed:
    order: str


@dataclass
class PlacedWithNote:
    order: str
    note: str = ""


@dataclass
class PlacedWithNumber:
    order: str
    note: int = 0


@dataclass
class PlacedWithTime:
    order: str
    time: str = ""


@dataclass
class PlacedWithBoth:
    order: str
    note: str = ""
    time: str = ""


def placed(kind: type, version: int = 1, upcast: Any = None) -> list[Versioned[Any]]:
    return [Versioned(kind, name="Placed", version=version, upcast=upcast or {})]


def test_everything_that_is_stored_is_found() -> None:
    """Events, results of functions and consumers, and the arguments and the result of a saga."""
    store = MemoryStore()

    @idempotent(store, key=lambda order: order, name="charge")
    def charge(order: str) -> Placed:
        return Placed(order)

    @idempotent_consumer(store, consumer="billing", codec=placed(Placed, 2, {1: dict})[0])
    def on_placed(message: str) -> Placed:
        return Placed(message)

    @saga(store, name="trip")
    async def trip(to: str, order: Placed, back: str = "") -> None: ...

    found = Contracts([charge, [on_placed, trip], Streams([PlacedWithNote]), Placed])

    a_placed = {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]}
    assert [(each.name, each.version) for each in found] == [
        ("arguments of trip", 1),
        ("result of billing", 2),
        ("result of charge", 1),
        ("result of trip", 1),
        ("type Placed", 1),
        ("type PlacedWithNote", 1),
    ]
    arguments, _, result, *_ = found
    assert arguments.schema == {
        "type": "object",
        "properties": {"back": {"type": "string"}, "order": {"$ref": "#/$defs/Placed"}, "to": {"type": "string"}},
        "required": ["order", "to"],
        "$defs": {"Placed": a_placed},
    }
    assert result.schema == {"$ref": "#/$defs/Placed", "$defs": {"Placed": a_placed}}


def test_steps_of_a_saga_are_found() -> None:
    """The result of each, also of a child saga, and what is stored for its undo."""
    store = MemoryStore()

    async def book(to: str) -> Placed:
        return Placed(to)

    async def cancel(to: str, nights: int = 1, *, result: Placed | None = None) -> None: ...

    @saga(store, name="payment")
    async def payment(order: str) -> int:
        return 1

    @saga(store, name="trip")
    async def trip(to: str) -> None: ...

    steps = [step_of(trip, "flight", book, undo=cancel), step_of(trip, "pay", payment)]

    assert [(each.name, each.schema) for each in Contracts(steps)] == [
        (
            "arguments of the undo of step flight of trip",
            {
                "type": "object",
                "properties": {"nights": {"type": "integer"}, "to": {"type": "string"}},
                "required": ["to"],
            },
        ),
        ("result of step flight of trip", schema_of(Placed, "it")),
        ("result of step pay of trip", {"type": "integer"}),
    ]
    with pytest.raises(ConfigurationError, match=r"book is no saga"):
        step_of(book, "flight", book)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("result of step flight of trip", "Add a field with a default, or give the step another name"),
        ("result of trip", "Add a field with a default, or make a new version with an upcast: codec=Versioned(...)"),
        ("arguments of trip", "Add an argument with a default, or declare a saga of another name"),
        (
            "arguments of the undo of step flight of trip",
            "Add an argument with a default, or give the step another undo",
        ),
    ],
)
def test_each_kind_of_contract_has_a_remedy(name: str, remedy: str, tmp_path: Path) -> None:
    """It is what works for this kind."""
    file = tmp_path / "contracts.json"
    check([Contract(name, 1, {"type": "string"})], file)

    [broken] = check([Contract(name, 1, {"type": "integer"})], file).broken

    assert str(broken) == f"{name}, version 1: type changed. {remedy}"


def test_a_field_that_is_renamed_has_a_remedy(tmp_path: Path) -> None:
    """It is one field removed and another one added: both say what a new name needs."""
    file = tmp_path / "contracts.json"

    def event(field: str) -> Contract:
        return Contract("type Paid", 1, {"properties": {field: {}}, "required": [field], "type": "object"})

    check([event("cents")], file)

    version = "make a new version with an upcast: Versioned(..., version=, upcast=)"
    assert [str(each).partition("version 1: ")[2] for each in check([event("amount")], file).broken] == [
        f"amount: required field added. Give the field a default, or, if it was renamed, {version}",
        f"cents: required field removed. Keep the field, or {version}",
    ]


def test_what_has_no_contract_is_refused() -> None:
    """Something else, a codec whose form cannot be seen, and two types of one name."""

    class Latin:
        def encode(self, value: str) -> bytes:
            return value.encode("latin-1")

        def decode(self, data: bytes) -> str:
            return data.decode("latin-1")

    @idempotent(MemoryStore(), key=lambda order: order, name="charge", codec=Latin())
    def charge(order: str) -> str:
        return order

    for items, message in [
        ([5], "5 has no contract"),
        ([charge], "what Latin writes for the result of charge cannot be seen"),
        ([*placed(Placed), *placed(PlacedWithNumber)], "two contracts are named 'type Placed'"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            Contracts(items)


def test_a_change_is_compared_with_every_schema_of_the_file(tmp_path: Path) -> None:
    """A field that was added and removed cannot come back with another type: it was never seen beside the new one."""
    file = tmp_path / "contracts.json"
    for kind in (Placed, PlacedWithNote, Placed):
        assert check(placed(kind), file) == check(placed(kind), tmp_path / "other.json")
    before = file.read_text()

    broken = check(placed(PlacedWithNumber), file).broken

    assert [str(each) for each in broken] == [
        "type Placed, version 1: note: type changed. Add a field with a default, or make a new version with an upcast: "
        "Versioned(..., version=, upcast=)"
    ]
    assert file.read_text() == before
    assert check(placed(PlacedWithNumber, 2, {1: dict}), file).written == ["type Placed, version 2"]


def test_what_is_removed_or_lowered_is_refused(tmp_path: Path) -> None:
    """Stored values of it could not be read any more."""
    file = tmp_path / "contracts.json"
    check([*placed(Placed, 2, {1: dict}), PlacedWithNote], file)

    broken = check(placed(Placed), file).broken

    assert [(each.contract, each.version, each.change.rule.partition(":")[0]) for each in broken] == [
        ("type Placed", 2, "version lowered"),
        ("type PlacedWithNote", 1, "removed"),
    ]


def test_an_accepted_change_is_written_down(tmp_path: Path) -> None:
    """The file has the new schema alone, the change and the reason, and is the same at each run."""
    file = tmp_path / "contracts.json"
    check(placed(PlacedWithNote), file)

    accepted = check(placed(PlacedWithNumber), file, "never deployed")

    text = file.read_text()
    found = json.loads(text)
    assert [each.change.rule for each in accepted.broken] == ["type changed"]
    assert found["accepted"] == [
        {"changes": ["note: type changed"], "contract": "type Placed", "reason": "never deployed", "version": 1}
    ]
    [schema] = found["contracts"]["type Placed"]["1"]
    assert schema["$defs"]["PlacedWithNumber"]["properties"]["note"] == {"type": "integer"}
    assert check(placed(PlacedWithNumber), file).broken == []
    assert file.read_text() == text
    with pytest.raises(ConfigurationError, match="say why"):
        check(placed(Placed), file, " ")


def test_the_same_change_is_accepted_each_time(tmp_path: Path) -> None:
    """A reason is for one change: taken back, and made once more, it needs a reason each time."""
    file = tmp_path / "contracts.json"
    check(placed(PlacedWithNote), file)
    check(placed(PlacedWithNumber), file, "never deployed")

    for kind in (PlacedWithNote, PlacedWithNumber):
        assert [each.change.rule for each in check(placed(kind), file).broken] == ["type changed"]
        check(placed(kind), file, "never deployed either")

    assert len(json.loads(file.read_text())["accepted"]) == 3


def test_what_was_removed_comes_back_in_its_form_alone(tmp_path: Path) -> None:
    """Its removal was accepted, and still something of it may be stored: another form of the version is refused."""
    file = tmp_path / "contracts.json"
    others: list[Any] = [PlacedWithTime]
    check([*placed(PlacedWithNote, 2, {1: dict}), *others], file)
    check(others, file, "nobody writes it")
    removed = file.read_text()

    assert check(others, file) == Checked([], [])
    broken = check([*placed(PlacedWithNumber, 2, {1: dict}), *others], file).broken
    assert [str(each.change) for each in broken] == ["note: type changed"]
    assert file.read_text() == removed

    back = check([*placed(PlacedWithNote, 2, {1: dict}), *others], file)
    assert back == Checked([], ["type Placed, version 2"])
    assert json.loads(file.read_text())["removed"] == {}


def test_two_branches_that_change_one_contract_conflict_in_git(tmp_path: Path) -> None:
    """Neither of the two forms is lost: the one that is deployed is in the file that is taken."""
    file = tmp_path / "contracts.json"

    def git(*arguments: str) -> int:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@localhost", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    def commit(branch: str, kind: type) -> None:
        git("checkout", "-q", "-b", branch)
        check(placed(kind), file)
        git("add", "contracts.json")
        git("commit", "-q", "-m", branch)

    git("init", "-q")
    commit("base", Placed)
    commit("one", PlacedWithNote)
    git("checkout", "-q", "base")
    commit("other", PlacedWithTime)

    assert git("merge", "one") == 1
    with pytest.raises(ConfigurationError, match=r"contracts.json has a conflict of git: take the file"):
        check(placed(PlacedWithBoth), file)
    git("checkout", "--theirs", "contracts.json")
    assert check(placed(PlacedWithBoth), file) == Checked([], ["type Placed, version 1"])
    assert len(json.loads(file.read_text())["contracts"]["type Placed"]["1"]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of contracts"),
        ("[]", "is no file of contracts"),
        ('{"format": 2, "contracts": {}, "accepted": []}', "of format 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """It is not written over."""
    file = tmp_path / "contracts.json"
    file.write_text(text)

    with pytest.raises(ConfigurationError, match=message):
        check([Placed], file)

    assert file.read_text() == text


SHOP = """
    from dataclasses import dataclass
    from idempotency.contracts import Contracts

    @dataclass
    class Placed:
        order: str
        {field}

    contracts = Contracts([Placed])
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes what is new, and ends with 1 where a change is not safe, unless a reason is given."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run(module: str, *options: str) -> Any:
        return runner.invoke(app, ["contracts", "check", *options, f"{module}:contracts"])

    for name, field in (("first_shop", ""), ("second_shop", "note: str")):
        (tmp_path / f"{name}.py").write_text(dedent(SHOP).format(field=field))
    first, again, second = run("first_shop"), run("first_shop"), run("second_shop")
    accepted, missing = run("second_shop", "--accept", "never deployed"), run("third_shop")
    (tmp_path / "broken_shop.py").write_text("{}['SHOP_URL']")
    broken = run("broken_shop")

    assert (first.exit_code, first.stdout) == (
        0,
        "written: type Placed, version 1\ncontracts.json is up to date\n",
    )
    assert (again.exit_code, again.stdout) == (0, "contracts.json is up to date\n")
    assert (second.exit_code, second.stderr) == (
        1,
        "type Placed, version 1: note: required field added. Give the field a default, or, if it was renamed, make a "
        "new version with an upcast: Versioned(..., version=, upcast=).\n",
    )
    assert (accepted.exit_code, missing.exit_code) == (0, 2)
    assert "accepted: type Placed, version 1: note: required field added" in accepted.stdout
    assert (broken.exit_code, broken.stderr) == (
        2,
        "error: 'broken_shop:contracts' cannot be imported: KeyError: 'SHOP_URL'\n",
    )

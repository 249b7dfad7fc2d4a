"""Functions and consumers that were not given a name of their own: none has another one's results by accident."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idempotency import current, idempotent, idempotent_consumer
from idempotency.errors import ConfigurationError
from idempotency.stores.memory import MemoryStore

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")
TWICE = "would share their keys and results: give each a name="


def scope_of(function: Callable[..., Any], **options: Any) -> str:
    """Call a function once, and return the scope of its record."""
    scopes: list[str] = []

    @functools.wraps(function, assigned=["__module__", "__qualname__"])
    def noting() -> None:
        operation = current()
        assert operation is not None
        scopes.append(operation.scope)

    idempotent(MemoryStore(), key=lambda: "k", **options)(noting)()
    return scopes[0]


def of_the_order(order: str) -> str:
    """Name a call by its order alone."""
    return order


@everywhere
async def test_two_functions_do_not_share_a_key(store: Any) -> None:
    """A refund under the number of an order that was charged is no replay of the charge."""

    @idempotent(store, key=of_the_order)
    async def charge(order: str) -> str:
        return f"charged {order}"

    @idempotent(store, key=of_the_order)
    async def refund(order: str) -> str:
        return f"refunded {order}"

    assert await charge("A-1") == "charged A-1"
    assert await refund("A-1") == "refunded A-1"
    assert await charge("A-1") == "charged A-1"


@everywhere
def test_two_functions_do_not_share_a_key_in_threads(sync_store: Any) -> None:
    """The same holds for synchronous functions."""

    @idempotent(sync_store, key=of_the_order)
    def charge(order: str) -> str:
        return f"charged {order}"

    @idempotent(sync_store, key=of_the_order)
    def refund(order: str) -> str:
        return f"refunded {order}"

    assert charge("A-1") == "charged A-1"
    assert refund("A-1") == "refunded A-1"
    assert charge("A-1") == "charged A-1"


def test_a_function_goes_on_under_the_name_it_had() -> None:
    """Without ``name=`` a function that was moved or renamed begins anew; the scope is a stored contract."""
    store, mine = MemoryStore(), f"{__name__}.{test_a_function_goes_on_under_the_name_it_had.__qualname__}"

    def old() -> str:
        return "old"

    def new() -> str:
        return "new"

    assert idempotent(store, key=lambda: "k")(old)() == "old"
    assert idempotent(store, key=lambda: "k")(new)() == "new"
    assert idempotent(store, key=lambda: "k", name=f"{mine}.<locals>.old")(new)() == "old"
    assert scope_of(old) == f"function:1:{mine}.<locals>.old"
    assert scope_of(old, name="orders") == "function:1:orders"


PROGRAM = """
import functools, multiprocessing
from idempotency import current, idempotent
from idempotency.stores.memory import MemoryStore

class Till:
    def __call__(self):
        print(current().scope, flush=True)

    def charge(self):
        print(current().scope, flush=True)

def charge(currency=""):
    print(current().scope, flush=True)

once = idempotent(MemoryStore(), key=lambda *_, **__: "k")

def run():
    for each in (charge, Till(), Till().charge, functools.partial(charge, currency="EUR"), lambda: charge()):
        idempotent(MemoryStore(), key=lambda: "k")(each)()

if __name__ == "__main__":
    run()
    child = multiprocessing.get_context("spawn").Process(target=run)
    child.start()
    child.join()
"""
SCOPES = [f"function:1:shop.{name}" for name in ("charge", "Till", "Till.charge", "charge", "run.<locals>.<lambda>")]


@pytest.mark.parametrize("way", [["shop.py"], ["-m", "shop"], ["-c", "import shop; shop.run()"]])
def test_a_function_has_one_name_however_its_process_was_started(way: list[str], tmp_path: Path) -> None:
    """A script, ``-m``, an import and a spawned child agree: methods, objects, partials and lambdas too."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    paths = [str(tmp_path), *(each for each in sys.path if each)]
    done = subprocess.run(
        [sys.executable, *way],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == SCOPES * (1 if way[0] == "-c" else 2)


def charge_in(currency: str) -> Callable[[str], str]:
    """Make a function that charges in a currency."""

    def charge(order: str) -> str:
        return f"{currency} {order}"

    return charge


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function, and forget its name."""
    return lambda *args: function(*args)


class Till:
    """A till, whose method and whose objects are called."""

    def __init__(self, currency: str) -> None:
        self.currency = currency

    def charge(self, order: str) -> str:
        return f"{self.currency} {order}"

    __call__ = charge


def defaulted(currency: str) -> Callable[..., str]:
    """Make a function that was given what tells it apart as a default."""

    def charge(order: str, currency: str = currency) -> str:
        return f"{currency} {order}"

    return charge


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(charge_in("EUR"), charge_in("USD"), id="closures"),
        pytest.param(defaulted("EUR"), defaulted("USD"), id="defaults"),
        pytest.param(Till("EUR").charge, Till("USD").charge, id="bound methods"),
        pytest.param(Till("EUR"), Till("USD"), id="objects"),
        pytest.param(timed(charge_in("EUR")), timed(charge_in("USD")), id="wrappers"),
        pytest.param(lambda order: "EUR", lambda order: "USD", id="lambdas"),
        pytest.param(
            functools.partial(defaulted("EUR"), currency="EUR"),
            functools.partial(defaulted("EUR"), currency="USD"),
            id="partials",
        ),
        pytest.param(defaulted("EUR"), functools.partial(defaulted("EUR"), currency="USD"), id="a partial of one"),
    ],
)
def test_two_functions_of_one_name_are_refused(one: Any, other: Any) -> None:
    """What the same lines made with other values, or another function of the name, needs ``name=``."""
    store = MemoryStore()

    first = idempotent(store, key=lambda order: order)(one)
    with pytest.raises(ConfigurationError, match=TWICE):
        idempotent(store, key=lambda order: order)(other)
    second = idempotent(store, key=lambda order: order, name="in USD")(other)

    assert first("A-1") != second("A-1")
    assert idempotent(MemoryStore(), key=lambda order: order)(other)("A-1") == second("A-1")


def test_functions_that_a_loop_makes_need_names() -> None:
    """The currency is in neither the key nor the name, so that each would have the result of the first."""
    store, charges = MemoryStore(), []

    def charge_all() -> None:
        for currency in ("EUR", "USD"):

            @idempotent(store, key=of_the_order)
            def charge(order: str, currency: str = currency) -> str:
                return f"{currency} {order}"

            charges.append(charge)

    with pytest.raises(ConfigurationError, match=r"functions_that_a_loop_makes.*charge_all.<locals>.charge too"):
        charge_all()
    assert len(charges) == 1


def test_a_function_that_is_defined_twice_is_refused_while_both_can_be_called() -> None:
    """As two of one name in a module, one of which is in a registry."""
    store, first, second = MemoryStore(), dict[str, Any](), dict[str, Any]()
    source = "def charge(order):\n    return {!r}"
    for place, result in ((first, "first"), (second, "second")):
        exec(source.format(result), {"__name__": "shop"}, place)
    once = idempotent(store, key=of_the_order)

    kept = once(first["charge"])
    with pytest.raises(ConfigurationError, match=TWICE):
        once(second["charge"])
    assert kept("A-1") == "first"
    del kept
    assert once(second["charge"])("A-1") == "first"


def test_the_same_function_may_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is loaded again, a factory that is called again and a second policy are no other function."""
    (tmp_path / "till_of_this_test.py").write_text("def charge(order, amount=5):\n    return order\n")
    monkeypatch.syspath_prepend(tmp_path)
    module: Any = importlib.import_module("till_of_this_test")
    once = idempotent(MemoryStore(), key=lambda order: order)

    made = [once(module.charge), once(importlib.reload(module).charge)]
    made += [once(charge_in("EUR")), once(charge_in("EUR"))]
    till = Till("EUR")
    made += [once(till.charge), once(till.charge), once(till), once(till)]

    assert [each("A-1") for each in made] == ["A-1"] * 2 + ["EUR A-1"] * 6


def test_a_module_that_is_loaded_again_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had before is another version of the same functions, and not a second function of their name."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    place, source = tmp_path / "till_that_changes.py", "def charge(order):\n    return {!r} + order\n"
    once = idempotent(MemoryStore(), key=of_the_order)
    place.write_text(source.format("charged "))
    module: Any = importlib.import_module("till_that_changes")
    before = once(module.charge)
    place.write_text(source.format("charged by the next version "))
    after = once(importlib.reload(module).charge)

    assert [before("A-1"), after("A-1"), after("A-2")] == ["charged A-1"] * 2 + ["charged by the next version A-2"]


def test_two_modules_of_one_name_are_two() -> None:
    """Their functions share a name by accident, also where only one of them is to be found under it."""
    store, functions = MemoryStore(), []
    for result in ("first", "second"):
        spec = importlib.util.spec_from_loader("till_of_two", None, origin=f"/{result}/till_of_two.py")
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["till_of_two"] = module
        exec(f"def charge(order):\n    return {result!r}", module.__dict__)
        functions.append(module.charge)
        if result == "first":
            first = idempotent(store, key=of_the_order)(module.charge)
    try:
        with pytest.raises(ConfigurationError, match=TWICE):
            idempotent(store, key=of_the_order)(functions[1])
    finally:
        del sys.modules["till_of_two"]
    assert first("A-1") == "first"


PROMPT = """
from idempotency import idempotent
from idempotency.stores.memory import MemoryStore
store = MemoryStore()

@idempotent(store, key=lambda order: order)
def charge(order):
    return "charged " + order

charge("A-1")

@idempotent(store, key=lambda order: order)
def charge(order):
    return "charged again " + order

charge("A-1"), charge("A-2")
charges = []
for currency in ("EUR", "USD"):
    charges.append(idempotent(store, key=lambda order: order)(lambda order, of=currency: of))

"""


def test_a_definition_may_be_typed_again_at_a_prompt() -> None:
    """As in a notebook, where a cell is changed and run again; what a loop makes there is still refused."""
    done = subprocess.run(
        [sys.executable, "-i"],
        input=PROMPT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(each for each in sys.path if each)},
    )
    assert done.stdout.splitlines() == ["'charged A-1'", "('charged A-1', 'charged again A-2')"]
    assert done.stderr.count("ConfigurationError: ") == 1
    assert "__main__.<lambda> too" in done.stderr


def test_what_nobody_can_call_any_more_is_no_other_function() -> None:
    """An application that a test has made and thrown away refers to itself, and goes when memory is collected."""
    store = MemoryStore()

    def application(currency: str) -> list[Any]:
        @idempotent(store, key=of_the_order)
        def charge(order: str) -> str:
            return f"{currency} {order}"

        parts: list[Any] = [charge]
        parts.append(parts)
        return parts

    gc.disable()
    try:
        assert application("EUR")[0]("A-1") == "EUR A-1"
        assert application("USD")[0]("A-2") == "USD A-2"
    finally:
        gc.enable()


def test_what_is_in_the_key_tells_functions_apart() -> None:
    """Functions that are made for one call each, whose keys say for which, are not refused."""
    store = MemoryStore()

    def charge(order: str) -> Callable[[], str]:
        return idempotent(store, key=lambda: f"charge:{order}")(lambda: f"charged {order}")

    first, second = charge("A-1"), charge("A-2")

    assert [first(), second(), charge("A-1")()] == ["charged A-1", "charged A-2", "charged A-1"]


def test_two_handlers_of_one_consumer_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A message that one of them handled is none for the other; the same handler in many workers is what it is for."""
    store = MemoryStore()

    def bill(message: str) -> str:
        return "billed"

    def ship(message: str) -> str:
        return "shipped"

    consumer: Any = idempotent_consumer(store, consumer="orders", key=str)
    workers = [consumer(bill), consumer(bill)]
    other = idempotent_consumer(store, consumer="shipping", key=str)(ship)
    elsewhere = idempotent_consumer(MemoryStore(), consumer="orders", key=str)(ship)
    assert caplog.record_tuples == []
    workers.append(consumer(ship))

    assert [(name, level) for name, level, _ in caplog.record_tuples] == [("idempotency", logging.WARNING)]
    assert "two different handlers of this process are the consumer 'orders'" in caplog.text
    assert [each("1") for each in (*workers, other, elsewhere)] == ["billed"] * 3 + ["shipped"] * 2


def test_one_function_made_for_two_workers_has_one_name() -> None:
    """What only holds their state, as the list of a test, tells no functions apart: the second worker replays."""
    store = MemoryStore()

    def worker() -> tuple[Any, list[str]]:
        effects: list[str] = []

        @idempotent(store, key=of_the_order)
        def charge(order: str) -> str:
            effects.append(order)
            return order

        return charge, effects

    first, effects = worker()
    assert first("A-1") == "A-1"
    second, others = worker()
    assert second("A-1") == "A-1"
    assert (effects, others) == (["A-1"], [])

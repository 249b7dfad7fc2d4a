"""The shop of ``examples/shop``, run as ``scripts/demo --shop`` does, and what its books notice."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.adapters.rigs.rabbitmq import URL as RABBITMQ
from tests.kit.paths import EXAMPLES, ROOT, SCRIPTS
from tests.kit.servers import free_port, listening, missing

pytestmark = pytest.mark.processes

PROCESSES = ["agent", "api", "relay", "fulfilment", "inventory", "marketing", "views", "tools"]
STOCK, COUPONS = {"tea": 10, "cake": 2}, {"SPRING": 3}


def shop(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the shop with few customers to its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(ROOT)])}
    command = [sys.executable, "-m", "_shop", "--customers", "2", "--pause", "0.5", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.timeout(300)
def test_each_process_is_killed_and_the_books_agree(postgres_url: str) -> None:
    """On PostgreSQL and RabbitMQ, nothing is lost, and nothing is done twice.

    ``.ci/run`` plays it on files and a NATS of its own.
    """
    if not listening(5672):
        missing("nothing listens on port 5672")

    run = shop("--store", postgres_url, "--broker", RABBITMQ)

    assert run.returncode == 0, run.stdout + run.stderr
    killed = [line.partition("again: ")[2] for line in run.stdout.splitlines() if "kill -9" in line]
    assert killed == PROCESSES
    assert run.stdout.splitlines()[-1] == "every number agrees"
    assert "cake 3 -> 0" in run.stdout


def test_a_server_that_is_away_is_one_line() -> None:
    """The shop cannot be opened, and says so in one line."""
    run = shop("--broker", f"amqp://127.0.0.1:{free_port()}")

    assert run.returncode == 2
    assert run.stderr.startswith("scripts/demo: ")
    assert run.stderr.count("\n") == 1


async def test_a_process_whose_worker_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not go on to handle messages without its relay or sweeper: it ends with the error."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    serving = importlib.import_module("shop.serving")
    consuming, ended = asyncio.Event(), asyncio.Event()

    async def consume(*arguments: object) -> None:
        consuming.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fail() -> None:
        await consuming.wait()
        raise ValueError("no table")

    monkeypatch.setattr(serving.broker, "consume", consume)
    with pytest.raises(ExceptionGroup) as failed:
        await serving.serve_beside(SimpleNamespace(run=fail), SimpleNamespace(name="inventory"), None)

    assert [str(each) for each in failed.value.exceptions] == ["no table"]
    assert ended.is_set()


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the module that checks the books."""
    for directory in (EXAMPLES, SCRIPTS):
        monkeypatch.syspath_prepend(str(directory))
    return importlib.import_module("_shop.books")


def right(books: Any) -> Any:
    """Return books that agree: a tea with a coupon is sold, a cake is refused."""
    placed = books.OrderPlaced
    return books.Books(
        placed={"1": placed("ann", "a", "tea", "SPRING"), "2": placed("ann", "b", "cake", None)},
        states={"1": "confirmed", "2": "rejected"},
        listed={"1": "confirmed", "2": "rejected"},
        stock={"tea": 9, "cake": 2},
        moved={"1": -1},
        coupons={"SPRING": 2},
        used={"1": 1},
        mails={"1": ["OrderPlaced", "OrderConfirmed"], "2": ["OrderRejected", "OrderPlaced"]},
    )


def disagreements(books: Any, found: Any) -> list[str]:
    return list(books.disagreements(found, [("ann", "a"), ("ann", "b")], STOCK, COUPONS))


def test_books_that_agree(books: Any) -> None:
    """There is nothing to say about them."""
    assert disagreements(books, right(books)) == []


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"listed": {"1": "placed", "2": "rejected"}}, ["order 1 is confirmed, and placed in the list"]),
    ({"listed": {"2": "rejected"}}, ["order 1 is confirmed, and missing in the list"]),
    (
        {"stock": {"tea": 8, "cake": 2}, "moved": {"1": -2}},
        ["order 1 is confirmed, and moved -2 tea", "8 tea in stock, not 9: 1 of 10 are sold"],
    ),
    ({"moved": {"1": -1, "2": -1}}, ["order 2 is rejected, and moved -1 cake"]),
    ({"stock": {"tea": 9, "cake": 3}}, ["3 cake in stock, not 2: 0 of 2 are sold"]),
    (
        {"coupons": {"SPRING": 1}, "used": {"1": 2}},
        ["order 1 is confirmed, and used 2 of its coupon SPRING", "1 uses of SPRING, not 2: 1 are redeemed"],
    ),
    (
        {"mails": {"1": ["OrderPlaced", "OrderConfirmed", "OrderConfirmed"], "2": ["OrderPlaced", "OrderRejected"]}},
        ["order 1 is confirmed, and has the mails OrderPlaced, OrderConfirmed, OrderConfirmed"],
    ),
    (
        {"mails": {"1": ["OrderPlaced", "OrderConfirmed"]}},
        ["order 2 is rejected, and has the mails none"],
    ),
    ({"states": {"1": "confirmed", "2": "placed"}}, ["order 2 is still placed"]),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_books_that_do_not_agree(books: Any, wrong: dict[str, Any], said: list[str]) -> None:
    """Whatever was lost, or done twice, is said with what should be there."""
    assert disagreements(books, replace(right(books), **wrong)) == said


def test_an_order_that_is_lost_or_placed_twice(books: Any) -> None:
    """Each customer has what was ordered, once."""
    twice, lost = right(books), right(books)
    twice.placed["2"] = replace(twice.placed["2"], reference="a")
    del lost.placed["2"]

    assert disagreements(books, twice) == ["ann has 2 orders 'a', not 1", "ann has 0 orders 'b', not 1"]
    assert disagreements(books, lost) == ["ann has 0 orders 'b', not 1"]

"""The examples that no other test runs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.paths import EXAMPLES
from tests.kit.servers import listening, missing

pytestmark = [pytest.mark.processes, pytest.mark.timeout(260)]


async def test_orders_transactional(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated order is one, a refused one leaves nothing, and without a key there is none."""
    monkeypatch.setenv("ORDERS_DB", sqlite_url)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = importlib.import_module("orders_transactional").app

    async def order(client: httpx.AsyncClient, item: str, **headers: str) -> httpx.Response:
        return await client.post("/orders", json={"item": item}, headers=headers)

    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        key = {"Idempotency-Key": "1f5a"}
        first, second = await order(client, "tea", **key), await order(client, "tea", **key)
        refused = await order(client, "milk", **{"Idempotency-Key": "2"})
        missing = await order(client, "tea")
        count = await client.get("/orders/count")

    assert (first.status_code, first.json()) == (201, {"id": 1, "item": "tea"})
    assert (second.status_code, second.json()) == (201, {"id": 1, "item": "tea"})
    assert second.headers["idempotent-replayed"] == "true"
    assert (refused.status_code, missing.status_code, count.json()) == (409, 400, 1)


async def test_fastapi_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated order is one, one without a key is another, and a refused one leaves nothing."""
    monkeypatch.setenv("ORDERS_DB", f"sqlite:///{tmp_path / 'orders.db'}")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = importlib.import_module("fastapi_orders").app
    ann = {"Authorization": "Bearer token-of-ann"}

    async def order(item: str, **headers: str) -> httpx.Response:
        return await client.post("/orders", params={"item": item}, headers={**ann, **headers})

    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        key = {"Idempotency-Key": "1f5a"}
        first, second, unkeyed = await order("tea", **key), await order("tea", **key), await order("cup")
        refused = await order("milk", **{"Idempotency-Key": "2"})
        unknown = await client.post("/orders", params={"item": "tea"}, headers=key)
        orders = await client.get("/orders", headers=ann)

    assert (first.status_code, first.json()) == (201, {"id": 1, "item": "tea"})
    assert (second.json(), second.headers["idempotent-replayed"]) == ({"id": 1, "item": "tea"}, "true")
    assert (unkeyed.status_code, refused.status_code, unknown.status_code) == (201, 409, 401)
    assert orders.json() == ["tea", "cup"]


def test_flask_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated order is one, a refused one leaves nothing, and without a key there is none."""
    monkeypatch.setenv("ORDERS_DB", f"sqlite:///{tmp_path / 'orders.db'}")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("flask_orders")
    client = example.app.test_client()

    def order(item: str, **headers: str) -> Any:
        return client.post("/orders", json={"item": item}, headers=headers)

    key = {"Idempotency-Key": "1f5a"}
    first, second, refused, missing = (
        order("tea", **key),
        order("tea", **key),
        order("milk", **{"Idempotency-Key": "2"}),
        order("tea"),
    )
    count = client.get("/orders/count")
    example.engine.dispose()

    assert (first.status_code, first.json) == (second.status_code, second.json) == (201, {"id": 1, "item": "tea"})
    assert second.headers["idempotent-replayed"] == "true"
    assert (refused.status_code, missing.status_code, count.json) == (409, 400, {"orders": 1})


@pytest.mark.parametrize("broker", ["here", "none"])
async def test_orders_outbox(broker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Ten requests are five orders and five invoices, through RabbitMQ and without it."""
    if broker == "none":
        monkeypatch.setenv("AMQP_URL", "amqp://127.0.0.1:1/")
    elif not listening(5672):
        missing("nothing listens on port 5672")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("orders_outbox", None)
    await importlib.import_module("orders_outbox").main(str(tmp_path))
    assert capsys.readouterr().out.endswith("10 requests, 5 orders, 5 deliveries, 5 invoices\n")


def test_dual_write() -> None:
    """Without an outbox, a message is lost or a phantom at some line; with it, at none."""
    run = subprocess.run(
        [sys.executable, EXAMPLES / "dual_write.py"], capture_output=True, text=True, check=True, timeout=100
    )
    lost, phantom = zip(*(line.split()[-2:] for line in run.stdout.splitlines()[1:]), strict=True)
    assert [number != "0" for number in lost] == [True, False, False]
    assert [number != "0" for number in phantom] == [False, True, False]


BOOKS = (
    "Books(orders={1: 'confirmed', 2: 'rejected', 3: 'rejected', 4: 'rejected', 5: 'confirmed'},"
    " left=8, reserved=2, used=2)"
)


@pytest.mark.parametrize("style", ["orchestrated", "choreographed"])
def test_orders_of_three_services(style: str) -> None:
    """In both styles each service refuses in turn, and the books balance."""
    assert run(f"order_{style}.py")[-1] == f"{BOOKS}, balance: True"


def test_backstop() -> None:
    """Messages that the broker has lost are told again, and each order is delivered once."""
    *orders, summary = run("backstop.py")

    assert orders == [f"order {number}: told {2 if number in (2, 5) else 1} times" for number in range(1, 7)]
    assert summary == "6 orders, 2 messages lost, 6 deliveries"


def test_book_trip_agent() -> None:
    """Killed in each gap and started again, the agent has booked twice and refunded both."""
    title, *killed = run("book_trip_agent.py")

    assert title.split() == ["killed", "booked", "and", "refunded"]
    assert len(killed) == 13
    assert {line[22:] for line in killed} == {" flight, hotel"}


def test_account() -> None:
    """A repeated deposit is one entry, a reversal restores the balance, and each version has its own."""
    assert run("account.py") == [
        "refused: 50 is less than 60",
        "conflict: account-7 is not at version 3: load it again, and decide again",
        "1  Deposited(amount=80)  balance 80",
        "2  Deposited(amount=40)  balance 120",
        "3  Withdrawn(amount=70, purpose='rent')  balance 50",
        "4  Reversed(version=3, amount=70)  balance 120",
    ]


def test_order_views() -> None:
    """Each order is read by who placed it, while the list is built anew; the counts by item are right."""
    assert run("order_views.py") == [
        "51 orders, each read by who placed it, from version 1, then 2",
        "25 milk, 26 tea",
    ]


def test_expand_contract() -> None:
    """A column is renamed in four releases, each a canary that is taken back once, and no request fails."""
    lines = run("expand_contract.py")

    assert [line.partition(":")[0] for line in lines[:-1]] == [
        *("migrated", "rolled out", "filled", "rolled out", "compared", "rolled out", "rolled out", "migrated")
    ]
    assert lines[4] == "compared: 0 differ, same: True"
    assert lines[-1] == "0 failed requests, more than 1000 good ones: True"


def run(example: str) -> list[str]:
    """Run an example, and return the lines that it prints."""
    command = [sys.executable, EXAMPLES / example]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

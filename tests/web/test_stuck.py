"""What the page shows: what is stuck, why, and what happens next by itself."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency._rules import State
from idempotency.errors import StoreError
from idempotency.outbox import Outbox, OutboxOperations
from idempotency.stores.memory import MemoryStore
from idempotency.stores.sql import SQLStore
from idempotency.testing import ManualClock
from idempotency.web import _stuck, console
from tests.kit.box import Box
from tests.kit.ledger import Ledger
from tests.web.kit import claim_of, saga, stuck_saga, unknown
from tests.web.visitor import Visitor

EACH_STORE = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")
KIND, ID, NAME, STATE, WAITS, ATTEMPT, ERROR, AGE, NEXT = range(9)


def rows(answer: httpx.Response) -> list[list[str]]:
    """Return the cells of the table of a page."""
    assert answer.status_code == 200
    body = answer.text.partition("<tbody")[2].partition("</tbody>")[0]
    found = re.findall(r"<tr.*?>(.*?)</tr>", body, re.DOTALL)
    return [[_text(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)] for row in found]


def numbers(answer: httpx.Response) -> list[str]:
    """Return the numbers above the table."""
    return [_text(each) for each in re.findall(r"<dd>(.*?)</dd>", answer.text)]


def _text(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html)).strip()


@pytest.fixture
async def box(ledger: Ledger) -> Box:
    """An outbox without messages, on the database of the store."""
    outbox = Outbox(f"{ledger.name}_out"[:50], notify=False)
    assert isinstance(ledger.engine, AsyncEngine)
    await outbox.create_schema(ledger.engine)
    return Box(ledger.engine, outbox)


@EACH_STORE
async def test_what_is_stuck_is_shown_on_each_store(store: Any) -> None:
    """Records and sagas, with what they wait for; what is done, or has an owner, is not stuck."""
    if isinstance(store, SQLStore):
        await store.create_saga_schema()
    request = await unknown(store, "order-7", "request")
    waiting = await saga(store, "sleep", "trip-8")
    stuck = await stuck_saga(store)
    held = claim_of("order-8", "message", lease=0.0)
    await store.claim(held)
    done = claim_of("order-9", hold=False)
    await store.claim(done)
    await store.complete(done, b"result")
    visitor = Visitor(console(store, allow=lambda _: "ada"))

    page = await visitor.get()
    found = {row[ID]: row for row in rows(page)}

    ids = [path.partition("/")[2][:12] for path in (request, waiting, stuck)]
    assert sorted(found) == sorted([*ids, held.id.hex()[:12]])
    assert found[ids[0]][:4] == ["request", ids[0], "not known", "unknown"]
    assert found[ids[0]][WAITS] == "operator: whether its effect happened is not known"
    assert (found[ids[0]][ATTEMPT], found[ids[0]][NEXT]) == ("1", "none")
    assert found[ids[1]][:5] == ["saga", ids[1], "book-trip, sleep:cool", "waiting", "it sleeps: cool"]
    assert re.fullmatch(r"run at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found[ids[1]][NEXT])
    assert found[ids[2]][:4] == ["step", ids[2], "book-trip, hotel", "stuck"]
    assert found[ids[2]][WAITS] == "operator: the outcome of the step hotel is unknown"
    of_message = found[held.id.hex()[:12]]
    assert of_message[:4] == ["message", held.id.hex()[:12], "billing", "unknown"]
    assert of_message[WAITS].startswith("operator: its owner has vanished: its lease ended ")
    assert numbers(page)[1:] == ["3"]


@EACH_STORE
async def test_a_store_with_nothing_stuck_says_so(store: Any) -> None:
    """Also one that has no tables for sagas."""
    page = await Visitor(console(store, allow=lambda _: "ada")).get()

    assert "Nothing is stuck." in page.text
    assert numbers(page) == ["none", "0"]


async def test_rows_are_filtered_by_kind_state_and_what_comes_next(visitor: Visitor, memory: MemoryStore) -> None:
    """Together or alone; a filter that is not known is none."""
    await unknown(memory, "order-7", "request")
    await unknown(memory, "order-8", "function")
    await saga(memory, "sleep", "trip-8")
    await stuck_saga(memory)

    kinds = {kind: [row[KIND] for row in rows(await visitor.get(kind=kind))] for kind in ("request", "saga", "step")}
    states = {state: len(rows(await visitor.get(state=state))) for state in ("unknown", "waiting", "stuck", "dead")}

    assert kinds == {"request": ["request"], "saga": ["saga"], "step": ["step"]}
    assert states == {"unknown": 2, "waiting": 1, "stuck": 1, "dead": 0}
    assert len(rows(await visitor.get(next="none"))) == 3
    assert len(rows(await visitor.get(kind="no such", state="'\"<", next="x", page="-1"))) == 4
    assert "Nothing is stuck that is asked for." in (await visitor.get(kind="request", state="stuck")).text


async def test_pages_go_on_from_the_oldest() -> None:
    """With the filter that was chosen, and without the end of the pages."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    for number in range(120):
        await unknown(store, f"order-{number}", "request")
        clock.advance(1.0)
    visitor = Visitor(console(store, allow=lambda _: "ada"))

    pages = [await visitor.get(page=str(number), kind="request") for number in (1, 2, 3)]

    ids = [row[ID] for page in pages for row in rows(page)]
    assert [len(rows(page)) for page in pages] == [50, 50, 20]
    assert ids == [claim_of(f"order-{number}", "request").id.hex()[:12] for number in range(120)]
    assert 'rel="next" href="/?page=2&amp;kind=request"' in pages[0].text
    assert 'rel="next"' not in pages[2].text
    assert 'rel="prev" href="/?page=2&amp;kind=request"' in pages[2].text
    assert numbers(pages[0])[:2] == ["2m", "120"]


async def test_very_many_are_counted_up_to_a_limit(visitor: Visitor, memory: MemoryStore) -> None:
    """The page never reads them all."""
    for number in range(_stuck.COUNTED + 5):
        await unknown(memory, f"order-{number}")

    assert numbers(await visitor.get())[1] == "200+"


@pytest.mark.stores("redis", "redis62", "fakeredis")
async def test_redis_is_looked_through_a_part_at_a_time(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By links, each of which goes on where the part before has ended; together they show everything."""
    monkeypatch.setattr(_stuck, "SECONDS", 0.0)
    monkeypatch.setattr("idempotency.stores.redis._wire._SCANNED", 5)
    paths = {(await unknown(store, f"order-{number}")).partition("/")[2][:12] for number in range(30)}
    visitor = Visitor(console(store, allow=lambda _: "ada"))

    page = await visitor.get()
    found, parts = {row[ID] for row in rows(page)}, 1
    assert numbers(page)[1].endswith("+")
    while link := re.search(r'href="(/\?after=[^"]*)"', page.text):
        page = await visitor.client.get(unescape(link[1]))
        found |= {row[ID] for row in rows(page)}
        parts += 1

    assert found == paths
    assert parts > 1
    assert (await visitor.get(after="no cursor")).status_code == 400


@EACH_STORE
async def test_no_key_or_scope_is_on_any_page(store: Any) -> None:
    """Of records and of sagas; only how long a key is."""
    if isinstance(store, SQLStore):
        await store.create_saga_schema()
    paths = [
        await unknown(store, "secret-key-1", "http:1:secret-scope"),
        await stuck_saga(store, "secret-key-2"),
        await saga(store, "hold", "secret-key-3"),
    ]
    visitor = Visitor(console(store, allow=lambda _: "ada", show_keys=True))

    texts = [(await visitor.get(path)).text for path in ("", "audit", *paths)]

    assert "hidden, 12 characters" in texts[2]
    assert not any("secret" in text for text in texts)


async def test_a_record_is_found_by_how_its_id_begins(visitor: Visitor, memory: MemoryStore) -> None:
    """Also one that is not stuck."""
    claim = claim_of("order-7", hold=False)
    await memory.claim(claim)
    await memory.complete(claim, b"result", State.DONE)
    path = await saga(memory, "sleep")

    found = await visitor.get("find", id=claim.id.hex()[:12].upper())
    of_saga = await visitor.get("find", id=path.partition("/")[2][:12])

    assert found.headers["location"] == f"/record/{claim.id.hex()}"
    assert of_saga.headers["location"] == f"/{path}"
    shown = (await visitor.get(f"record/{claim.id.hex()}")).text
    assert "<dd>done</dd>" in shown
    assert "6 bytes" in shown
    assert (await visitor.get("find", id="0" * 12)).status_code == 404
    assert (await visitor.get("find", id="12")).status_code == 400
    assert (await visitor.get("find", id="'; drop --------")).status_code == 404


async def test_a_record_whose_owner_has_vanished_says_that_the_next_request_runs() -> None:
    """It is not stuck, so it is on no list."""
    clock = ManualClock()
    memory = MemoryStore(clock=clock)
    claim = claim_of("order-7", hold=False)
    await memory.claim(claim)
    clock.advance(31)
    visitor = Visitor(console(memory, allow=lambda _: "ada"))

    found = await visitor.get("find", id=claim.id.hex()[:12])
    shown = (await visitor.get(f"record/{claim.id.hex()}")).text

    assert found.headers["location"] == f"/record/{claim.id.hex()}"
    assert "<dd>lapsed</dd>" in shown
    assert "<dd>the next request with the key runs</dd>" in shown
    assert claim.id.hex()[:12] not in (await visitor.get()).text


@pytest.mark.stores("postgres", "mariadb", "sqlite")
async def test_a_store_without_sagas_is_looked_through_too(store: Any) -> None:
    """It has no tables for them."""
    path = await unknown(store, "order-7")
    visitor = Visitor(console(store, allow=lambda _: "ada"))

    assert (await visitor.get("find", id=path.partition("/")[2][:12])).headers["location"] == f"/{path}"
    assert (await visitor.get("find", id="0" * 64)).status_code == 404
    assert (await visitor.get(f"saga/{'0' * 64}")).status_code == 404


async def test_hostile_names_are_text(visitor: Visitor, memory: MemoryStore) -> None:
    """In each page, and in the audit."""
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    record = await unknown(memory, "k", f"consumer:1:{hostile}")
    path = await saga(memory, "approve", "k", f"{hostile}\u202e\x1b[2J")
    await visitor.act(record, "forget:", reason=hostile)

    texts = [(await visitor.get(each)).text for each in ("", path, "audit")]
    missing = await visitor.get(f"record/{hostile}")

    for text in (*texts, missing.text):
        assert "<script" not in text
        assert "<img" not in text
        assert "\u202e" not in text
        assert "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in texts[0]
    assert "&lt;script&gt;alert(1)" in texts[2]


async def test_links_lead_below_where_the_page_is_mounted(memory: MemoryStore) -> None:
    """Under FastAPI, and behind a proxy that removes a prefix."""
    path = await unknown(memory, "order-7")
    app = FastAPI()
    app.mount("/ops/stuck", console(memory, allow=lambda _: "ada"))
    visitor = Visitor(app, "/shop/ops/stuck", root_path="/shop")

    page = await visitor.get()
    links = set(re.findall(r'(?:href|action)="([^"]*)"', page.text))
    answer = await visitor.act(path, "forget:")

    assert links
    assert all(link.startswith("/shop/ops/stuck/") for link in links)
    assert f"/shop/ops/stuck/{path}" in links
    assert answer.headers["location"].startswith("/shop/ops/stuck/audit?done=")
    assert await memory.unresolved() == []


async def test_a_source_that_fails_does_not_hide_the_others(memory: MemoryStore) -> None:
    """The page says what was not read."""

    class Away(MemoryStore):
        async def unresolved(self, limit: int = 100) -> Any:
            raise StoreError("the table of records is away")

    store = Away()
    path = await stuck_saga(store)

    page = await Visitor(console(store, allow=lambda _: "ada")).get()

    assert "Not read: records: the table of records is away" in page.text
    assert [row[ID] for row in rows(page)] == [path.partition("/")[2][:12]]


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_messages_that_are_blocked_or_dead_are_shown(store: Any, box: Box) -> None:
    """The one that blocks its key, those behind it, the dead ones, and that no relay runs."""
    for name, key in (("retried", 1), ("behind", 1), ("refused", 2), ("due", 3)):
        await box.emit(name, key)
    await box.retry_later("retried")
    await box.die("refused", reason="given up after 3 attempts: ValueError: too large, secret")
    visitor = Visitor(console(store, allow=lambda _: "ada", outbox=box.operations))

    page = await visitor.get(kind="outbox")
    found = {row[ID]: row for row in rows(page)}

    ids = {name: id[-12:] for name, id in box.ids.items()}
    assert set(found) == {"relay", ids["retried"], ids["behind"], ids["refused"]}
    assert re.fullmatch(r"retry at 2096-\S+ \S+", found[ids["retried"]][WAITS])
    assert found[ids["behind"]][WAITS] == f"key blocked by outbox row {ids['retried']}"
    assert found[ids["refused"]][STATE : AGE - 1] == ["dead", "operator: it was given up", "3"]
    assert (found[ids["refused"]][ERROR], found[ids["refused"]][NEXT]) == ("ValueError", "none")
    assert "no relay runs, and 3 messages wait" in found["relay"][WAITS]
    assert numbers(page)[1] == "2"
    assert "secret" not in page.text
    assert f'href="/message/{box.ids["retried"]}"' in page.text


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_messages_are_sent_again_given_up_and_forgotten(store: Any, box: Box) -> None:
    """Each offers what its state allows."""
    for name, key in (("retried", 1), ("behind", 1), ("refused", 2)):
        await box.emit(name, key)
    await box.retry_later("retried")
    await box.die("refused")
    visitor = Visitor(console(store, allow=lambda _: "ada", outbox=box.operations))
    retried, behind, refused = (f"message/{box.ids[name]}" for name in ("retried", "behind", "refused"))

    assert await visitor.offers(retried) == ["retry now:", "move to dead:", "forget:"]
    assert await visitor.offers(behind) == ["move to dead:", "forget:"]
    assert await visitor.offers(refused) == ["redrive:", "forget:"]
    for path, action in (
        (retried, "retry now:"),
        (behind, "move to dead:"),
        (refused, "redrive:"),
        (retried, "forget:"),
    ):
        assert (await visitor.act(path, action, "the customer is gone")).status_code == 303

    assert await box.waiting() == ["refused"]
    [dead] = await box.operations.messages(dead=True)
    assert (dead.id, dead.reason) == (box.ids["behind"], "given up by ada: the customer is gone")
    assert [action.outcome for action in await store.actions()] == [
        "forgotten",
        "it waits again, at the end of its key",
        "it is dead",
        "a relay sends it now",
    ]
    found = await visitor.get("find", id=box.ids["behind"])
    assert found.headers["location"] == f"/{behind}"
    assert (await visitor.get("message/no-uuid")).status_code == 404


@pytest.mark.stores("sqlite", "postgres", "mariadb")
async def test_the_page_reads_a_few_statements(store: Any, ledger: Ledger) -> None:
    """However many records there are: what is not stuck is not read."""
    assert isinstance(store, SQLStore)
    assert isinstance(ledger.engine, AsyncEngine)
    visitor = Visitor(console(SQLStore(ledger.engine, table=store._table.name), allow=lambda _: "ada"))
    await visitor.get()
    statements: list[str] = []
    event.listen(ledger.engine.sync_engine, "before_cursor_execute", lambda *found: statements.append(found[2]))

    await visitor.get()

    of_records = [each for each in statements if "expires_ms IS NULL" in each]
    assert len(of_records) == 1


@pytest.mark.stores("postgres")
async def test_a_slot_that_nobody_reads_is_shown_with_what_it_retains(store: Any, box: Box) -> None:
    """As the server says; its bytes are the third number."""
    from idempotency.outbox._slot import SlotState

    class WithSlots(OutboxOperations):
        async def slots(self) -> dict[str, SlotState]:
            return {"orders": slot, "read": SlotState(**{**values, "active": True})}

    values: dict[str, Any] = {"database": "test", "plugin": "pgoutput", "active": False, "confirmed": "0/1"}
    values |= {"retained": 3 * 2**20, "safe": None, "status": "reserved", "lost": None, "inactive_since": None}
    slot = SlotState(**values)
    visitor = Visitor(console(store, allow=lambda _: "ada", outbox=WithSlots(box.engine, box.outbox)))

    page = await visitor.get()

    [row] = rows(page)
    assert (row[KIND], row[ID], row[STATE], row[NEXT]) == ("slot", "orders", "unread", "none")
    assert "3.0 MiB of log are retained" in row[WAITS]
    assert numbers(page) == ["none", "1", "6.0 MiB"]
    assert "3.0 MiB" in (await visitor.get("slot/orders")).text
    assert (await visitor.get("slot/other")).status_code == 404

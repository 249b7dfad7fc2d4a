"""Requests, mounts and stores that are not as usual."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar, asgi
from starlette.applications import Starlette
from starlette.types import Receive, Send

from idempotency.saga import SagaError, SagaOperations, hold, saga, wait_for
from idempotency.stores.base import Action
from idempotency.stores.memory import MemoryStore
from idempotency.web import console
from tests.web.kit import unknown
from tests.web.visitor import ORIGIN, Visitor


@pytest.mark.parametrize("removed", ["", "/api"])
@pytest.mark.parametrize("application", [FastAPI, Starlette])
async def test_a_proxy_may_remove_the_prefix_or_pass_it_on(memory: MemoryStore, application: Any, removed: str) -> None:
    """``root_path`` says it in both cases, and the links have it."""
    app = application()
    app.mount("/stuck", console(memory, allow=lambda _: "ada"))
    path = await unknown(memory, "order-7")

    async def proxied(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "path": scope["path"].removeprefix(removed)}, receive, send)

    visitor = Visitor(proxied, mount="/api/stuck", root_path="/api")

    page, answer = await visitor.get(), await visitor.act(path, "resolve done:")

    assert page.status_code == 200
    assert f'href="/api/stuck/{path}"' in page.text
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/api/stuck/audit?done=")


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("/t/a%3B%20Domain=shop.example/stuck", "/t/a%3B%20Domain%3Dshop.example/stuck"),
        ("/t/b%C3%BCro/stuck", "/t/b%C3%BCro/stuck"),
        ("/t/%E5%BA%97%3F/stuck", "/t/%E5%BA%97%3F/stuck"),
    ],
)
async def test_the_path_of_a_mount_is_escaped(memory: MemoryStore, asked: str, written: str) -> None:
    """In links, and in the cookie, whose attributes it must not write."""
    app = Starlette()
    app.mount("/t/{tenant}/stuck", console(memory, allow=lambda _: "ada"))

    answer = await Visitor(app).client.get(f"{asked}/")

    assert answer.headers["set-cookie"].endswith(f"; Path={written}; HttpOnly; SameSite=Strict")
    assert f'href="{written}/audit"' in answer.text


async def test_an_origin_that_is_no_url_is_refused(visitor: Visitor, memory: MemoryStore) -> None:
    """As that of another site."""
    path = await unknown(memory, "order-7")

    answer = await visitor.post(path, await visitor.form(path, "forget:") | {"reason": "so"}, origin="http://[")

    assert (answer.status_code, len(await memory.unresolved())) == (403, 1)


async def test_a_form_that_is_too_large_is_refused_as_that(visitor: Visitor, memory: MemoryStore) -> None:
    """Not as one of another browser, for which an operator would look in vain."""
    path = await unknown(memory, "order-7")

    answer = await visitor.act(path, "forget:", result="x" * 20_000)

    assert (answer.status_code, "at most 16384 bytes" in answer.text) == (413, True)
    assert len(await memory.unresolved()) == 1


async def test_a_method_that_is_not_allowed_is_answered_with_those_that_are(visitor: Visitor) -> None:
    """As RFC 9110 section 15.5.6 asks."""
    answer = await visitor.client.request("OPTIONS", "/")

    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")


@pytest.mark.parametrize("thing", ["", "order", "<b>order</b> <i>7</i>"])
async def test_an_action_of_another_program_is_shown(visitor: Visitor, memory: MemoryStore, thing: str) -> None:
    """With whatever it was done."""
    await memory.write_down(Action(id="a" * 32, operator="script", name="mend", thing=thing, reason="so"))

    answer = await visitor.get("audit")

    assert (answer.status_code, "mend" in answer.text) == (200, True)
    assert "<b>" not in answer.text
    assert "<i>" not in answer.text


async def test_an_outcome_that_no_one_can_write_down_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the store raises: the action has happened, and must not be repeated."""

    class Broken(MemoryStore):
        async def write_outcome(self, id: str, outcome: str, /) -> None:
            raise RuntimeError("order-7 is broken")

    store = Broken()
    path = await unknown(store, "order-7")

    answer = await Visitor(console(store, allow=lambda _: "ada")).act(path, "forget:")

    assert (answer.status_code, await store.unresolved()) == (303, [])
    assert "is not in the audit: RuntimeError" in caplog.text


async def test_the_key_of_another_saga_is_not_on_the_page_of_one(visitor: Visitor, memory: MemoryStore) -> None:
    """Also not the second line of one that has two."""

    @saga(memory, name="meeting")
    async def meeting() -> None:
        await hold("room")
        await wait_for("end")

    for key in ("first\nsecond-4111", "other"):
        with contextlib.suppress(SagaError):
            await meeting(key=key)
    [view] = await SagaOperations(memory).find("meeting/other")

    shown = await visitor.get(f"saga/{view.id}")

    assert "held by meeting" in shown.text
    assert "second-4111" not in shown.text


async def test_head_of_a_page_has_no_body(memory: MemoryStore) -> None:
    """And the length of that of GET."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(console(memory, allow=lambda _: "ada")), base_url=ORIGIN
    ) as client:
        got, head = await client.get("/audit"), await client.head("/audit")

    assert head.content == b""
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_litestar_mounts_the_page(memory: MemoryStore) -> None:
    """It removes the path of the mount, which is given to the page as ``root_path``."""
    page = console(memory, allow=lambda _: "ada")

    @asgi("/stuck", is_mount=True, copy_scope=True)
    async def stuck(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await page({**scope, "root_path": "/stuck"}, receive, send)

    path = await unknown(memory, "order-7")
    visitor = Visitor(Litestar([stuck]), mount="/stuck")

    answer = await visitor.act(path, "resolve done:")

    assert f'href="/stuck/{path}"' in (await visitor.get("audit")).text
    assert answer.headers["location"].startswith("/stuck/audit?done=")

"""Who may see the page, and from where its forms are accepted."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import fastapi
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.websockets import WebSocketDisconnect

from idempotency.errors import ConfigurationError
from idempotency.stores.base import Store
from idempotency.stores.memory import MemoryStore
from idempotency.web import Operator, console
from tests.web.kit import unknown
from tests.web.visitor import Visitor

PATHS = ["", "audit", "find", "find?id=abcdefabcdef", "record/00", "saga/00", "message/00", "style.css", "no/such/page"]


def nobody(_: Request) -> None:
    """Allow nobody."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "the page needs allow="),
        ({"allow": None}, "anyone could see and change records"),
        ({"allow": "ada"}, "allow must be"),
        ({"allow": nobody, "refusal": 200}, "refusal is 401, 403 or 404"),
    ],
)
def test_without_allow_there_is_no_page(options: dict[str, Any], words: str) -> None:
    """It is refused when it is made, with the remedy."""
    with pytest.raises(ConfigurationError, match=words):
        console(MemoryStore(), **options)


def test_a_store_without_an_audit_is_refused() -> None:
    """An action that cannot be written down must be impossible."""

    class Bare:
        def __getattr__(self, name: str) -> Any:
            if name in ("write_down", "write_outcome", "actions"):
                raise AttributeError(name)
            return getattr(MemoryStore(), name)

    bare: Store = Bare()  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="lacks write_down, write_outcome, actions"):
        console(bare, allow=nobody)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
async def test_nothing_is_shown_to_who_is_not_allowed(memory: MemoryStore, path: str, method: str) -> None:
    """By no route: what is there and what is not look alike."""
    visitor = Visitor(console(memory, allow=nobody))

    answer = await visitor.client.request(method, f"/{path}")

    assert answer.status_code == 404
    assert answer.text == ("" if method == "HEAD" else "Not Found")
    assert "set-cookie" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", PATHS)
async def test_every_route_asks_who_it_is(memory: MemoryStore, path: str) -> None:
    """Once for each request, with the request."""
    asked: list[str] = []

    async def allow(request: Request) -> str:
        asked.append(request.url.path)
        return "ada"

    answer = await Visitor(console(memory, allow=allow)).client.get(f"/{path}")

    assert asked == [f"/{path.partition('?')[0]}"]
    headers = answer.headers
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert (headers["x-frame-options"], headers["cache-control"]) == ("DENY", "no-store")
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("refusal", [401, 403])
async def test_how_it_is_refused_can_be_chosen(memory: MemoryStore, refusal: int) -> None:
    """With 401 a browser asks for a name and a password, which allow finds in the request."""

    def allow(request: Request) -> str | None:
        return "ada" if request.headers.get("authorization") == f"Basic {credentials}" else None

    credentials = base64.b64encode(b"ada:secret").decode()
    visitor = Visitor(console(memory, allow=allow, refusal=refusal))

    refused = await visitor.get()
    visitor.client.headers["authorization"] = f"Basic {credentials}"

    assert refused.status_code == refusal
    assert ("www-authenticate" in refused.headers) == (refusal == 401)
    assert (await visitor.get()).status_code == 200


async def test_allow_may_answer_itself(memory: MemoryStore) -> None:
    """By an exception of Starlette, with its status and headers."""

    def allow(_: Request) -> str:
        raise HTTPException(303, headers={"location": "/login"})

    answer = await Visitor(console(memory, allow=allow)).get()

    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


async def test_allow_may_answer_as_fastapi_does(memory: MemoryStore) -> None:
    """The exceptions of FastAPI may have any JSON as their detail."""

    def allow(_: Request) -> str:
        raise fastapi.HTTPException(401, {"reason": "no token"}, {"www-authenticate": "Bearer"})

    answer = await Visitor(console(memory, allow=allow)).get()

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json() == {"detail": {"reason": "no token"}}


async def test_an_allow_that_fails_shows_nothing(memory: MemoryStore) -> None:
    """Its error is the application's."""

    def allow(_: Request) -> str:
        raise RuntimeError("the directory of users is away")

    with pytest.raises(RuntimeError, match="the directory of users is away"):
        await Visitor(console(memory, allow=allow)).get()


@pytest.mark.parametrize("how", ["body", "form", "stream"])
async def test_allow_may_read_the_body(memory: MemoryStore, how: str) -> None:
    """However it does, the page reads the form again."""
    read: list[bool] = []

    async def allow(request: Request) -> str:
        if how == "stream":
            text = b"".join([part async for part in request.stream()])
        else:
            text = await request.body() if how == "body" else repr(await request.form()).encode()
        read.append(b"provider" in text)
        return "ada"

    visitor = Visitor(console(memory, allow=allow))
    path = await unknown(memory, "order-7")

    answer = await visitor.act(path, "forget:")

    assert (answer.status_code, read[-1]) == (303, True)
    assert await memory.unresolved() == []


@pytest.mark.parametrize("parts", [1, 1000])
async def test_a_form_that_is_too_large_is_refused_also_if_allow_has_read_it(memory: MemoryStore, parts: int) -> None:
    """In however many pieces it comes."""
    body = b"reason=" + b"x" * 20_000

    async def pieces() -> AsyncIterator[bytes]:
        size = len(body) // parts + 1
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def allow(request: Request) -> str:
        return "ada" if len(await request.body()) == len(body) else ""

    visitor = Visitor(console(memory, allow=allow))

    answer = await visitor.client.post(
        "/record/00", content=pieces(), headers={"content-type": "application/x-www-form-urlencoded"}
    )

    assert (answer.status_code, "at most 16384 bytes" in answer.text) == (413, True)


@pytest.mark.parametrize("answer", [True, 7, "", "x" * 256])
async def test_allow_must_return_a_name(memory: MemoryStore, answer: Any) -> None:
    """A function that returns True would write nobody into the audit."""
    with pytest.raises(ConfigurationError, match="name of"):
        await Visitor(console(memory, allow=lambda _: answer)).get()


async def test_a_reader_has_no_forms_and_can_do_nothing(memory: MemoryStore) -> None:
    """Also with the form of another operator."""
    path = await unknown(memory, "order-7")
    visitor = Visitor(console(memory, allow=lambda _: Operator(name="eve", read_only=True)))

    assert "resolve done" not in (await visitor.get(path)).text
    answer = await visitor.post(path, {"action": "resolve done:", "reason": "so", "token": "0" * 64})

    assert (answer.status_code, "may only look" in answer.text) == (403, True)
    assert len(await memory.unresolved()) == 1
    assert await memory.actions() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "none"},
        {"origin": "http://shop.example.evil.example"},
    ],
)
async def test_a_form_of_another_site_is_refused(
    visitor: Visitor, memory: MemoryStore, headers: dict[str, str]
) -> None:
    """Also one that has the right token."""
    path = await unknown(memory, "order-7")
    form = {"action": "resolve done:", "reason": "so", "token": await visitor.token(path)}

    answer = await visitor.post(path, form, **headers)

    assert (answer.status_code, "was not sent from this page" in answer.text) == (403, True)
    assert len(await memory.unresolved()) == 1
    assert await memory.actions() == []


async def test_a_form_needs_the_token_of_its_browser_and_operator(memory: MemoryStore) -> None:
    """A token of another browser, or of another operator in the same browser, is none."""
    name = "ada"
    path = await unknown(memory, "order-7")
    one, other = (Visitor(console(memory, allow=lambda _: name)) for _ in range(2))
    form = {"action": "resolve done:", "reason": "so"}
    tokens = [await each.token(path) for each in (one, other)]

    without = await one.post(path, form)
    of_other = await one.post(path, form | {"token": tokens[1]})
    name = "eve"
    of_ada = await one.post(path, form | {"token": tokens[0]})
    name = "ada"
    one.client.cookies.clear()
    without_cookie = await one.post(path, form | {"token": tokens[0]})

    assert [each.status_code for each in (without, of_other, of_ada, without_cookie)] == [403] * 4
    assert len(await memory.unresolved()) == 1
    assert await memory.actions() == []


async def test_the_cookie_is_of_the_page_alone(memory: MemoryStore) -> None:
    """It is sent to the page only, not read by scripts, and over TLS only where the page is."""
    from starlette.applications import Starlette

    app = Starlette()
    app.mount("/ops/stuck", console(memory, allow=lambda _: "ada"))

    plain = (await Visitor(app).client.get("/ops/stuck/")).headers["set-cookie"]
    secure = (await Visitor(app).client.get("https://shop.example/ops/stuck/")).headers["set-cookie"]

    assert plain.endswith("; Path=/ops/stuck; HttpOnly; SameSite=Strict")
    assert secure.endswith("; Path=/ops/stuck; HttpOnly; SameSite=Strict; Secure")


def test_a_websocket_is_refused(memory: MemoryStore) -> None:
    """There is nothing to see for one."""
    from starlette.testclient import TestClient

    with TestClient(console(memory, allow=lambda _: "ada")) as client:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
            pass
        assert client.get("/").status_code == 200


def test_without_its_packages_the_error_names_the_extra() -> None:
    """The rest of the library needs none of them."""
    program = """if True:
        import sys
        sys.modules["jinja2"] = None
        import idempotency
        try:
            import idempotency.web
        except idempotency.ConfigurationError as error:
            print(error)
    """

    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert "pip install 'asgi-idempotency[web]'" in printed

"""The page as an ASGI application: each request is first checked, then shown or done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import Message, Receive, Scope, Send

from idempotency._cli.records import LOGGED
from idempotency.errors import ConfigurationError, IdempotencyError, StoreError
from idempotency.stores.base import Action, Auditing, Searching, Store, check_store, require
from idempotency.web._audited import audited
from idempotency.web._message import Messages, Slots
from idempotency.web._operator import LARGEST_FORM, Allow, Body, Operator, operator_of, path_in_page
from idempotency.web._pages import Page, headers
from idempotency.web._record import Records
from idempotency.web._saga import Sagas
from idempotency.web._stuck import KINDS, PAGES, STATES, Sources, Wanted
from idempotency.web._things import Offer, Thing

if TYPE_CHECKING:
    from idempotency.outbox import OutboxOperations

_REFUSALS = (401, 403, 404)
_SHOW_KEY = "show key"
_LONGEST_REASON = 1000
_LOOKED_AT = 1000
"""How many actions are looked through for those on one thing."""


def console(
    store: Store,
    *,
    allow: Allow | None = None,
    outbox: OutboxOperations | None = None,
    refusal: int = 404,
    show_keys: bool = False,
) -> Console:
    """Make the page that shows what is stuck, and why.

    It is an ASGI application, to be mounted: ``app.mount("/stuck", console(store, allow=operator))``.

    ``store``: that of the records and sagas, whose verbs are awaited.
    ``allow``: required. A function, sync or async, of the request (a ``starlette.requests.Request``) that returns the
    name of the operator, an :class:`Operator`, or None for a person who must see nothing. It is asked before every
    answer, and may read the body of the request.
    ``outbox``: an :class:`~idempotency.outbox.OutboxOperations`, to show its messages and slots too. Default None.
    ``refusal``: the status for a person who is not allowed, 404 (the default), 403, or 401, by which a browser asks for
    a name and a password (HTTP Basic) that ``allow`` then finds in the request.
    ``show_keys``: whether an operator may look at a key, which is written into the audit. Default False.

    Raises :class:`~idempotency.errors.ConfigurationError` without ``allow``, and for a store that lacks what the page
    needs.
    """
    if allow is None:
        raise ConfigurationError(
            "the page needs allow=, a function of the request that returns the name of the operator, or None for"
            " a person who must see nothing: without it anyone could see and change records"
        )
    if not callable(allow):
        raise ConfigurationError(f"allow must be a function, not {allow!r}")
    if refusal not in _REFUSALS:
        raise ConfigurationError(f"refusal is 401, 403 or 404, not {refusal!r}")
    return Console(store, allow, outbox, refusal, show_keys)


class Console:
    """See :func:`console`, which makes it."""

    def __init__(
        self, store: Store, allow: Allow, outbox: OutboxOperations | None, refusal: int, show_keys: bool
    ) -> None:
        checked = check_store(store, Store)
        require(checked, Searching, "the page")
        self._auditing: Auditing = require(checked, Auditing, "the page")
        self._allow = allow
        self._refusal = refusal
        self._show_keys = show_keys
        self._sources = Sources(checked, outbox)
        self._things: dict[str, Records | Sagas | Messages | Slots] = {
            "record": Records(checked),
            "saga": Sagas(checked),
        }
        if outbox is not None:
            self._things |= {"message": Messages(outbox), "slot": Slots(outbox)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with the headers that every answer has."""
        if scope["type"] != "http":
            await _refuse_other(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in headers().items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        response = await self._checked(scope, Body(receive))
        if scope["method"] == "HEAD":
            response.body = b""
        await response(scope, receive, send_with_headers)

    async def _checked(self, scope: Scope, body: Body) -> Response:
        try:
            operator = await operator_of(self._allow, Request(scope, body.first))
        except HTTPException as error:
            return _answer_of(error)
        if operator is None:
            challenge = (
                {"www-authenticate": 'Basic realm="idempotency", charset="UTF-8"'} if self._refusal == 401 else {}
            )
            words = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}[self._refusal]
            return PlainTextResponse(words, self._refusal, challenge)
        request = Request(scope, body.again)
        page = Page(request, operator)
        try:
            return await self._answer(request, page)
        except StoreError as error:
            return page.problem(503, "The store cannot be used", str(error))
        except IdempotencyError as error:
            return page.problem(400, "This cannot be shown", str(error))

    async def _answer(self, request: Request, page: Page) -> Response:
        parts = path_in_page(request).split("/", 1)
        if request.method == "POST":
            return await self._act(request, page, parts)
        if request.method not in ("GET", "HEAD"):
            refused = page.problem(405, "Not allowed", f"The method {request.method} means nothing here.")
            refused.headers["allow"] = "GET, HEAD, POST"
            return refused
        match parts:
            case [""]:
                return await self._stuck(request, page)
            case ["audit"]:
                done = request.query_params.get("done", "")
                return page.render("audit.html", actions=await self._auditing.actions(200), done=done)
            case ["find"]:
                return await self._find(request, page)
            case [kind, id]:
                thing = await self._look(kind, id, page)
                if thing is not None:
                    return await self._show(page, thing)
        return page.problem(404, "Not found", "There is no such thing: it has ended, is expired, or was never there.")

    async def _stuck(self, request: Request, page: Page) -> Response:
        asked = request.query_params
        number = asked.get("page", "1")
        wanted = Wanted(
            kind=asked["kind"] if asked.get("kind") in KINDS else "",
            state=asked["state"] if asked.get("state") in STATES else "",
            operator=asked.get("next") == "none",
            page=min(max(1, int(number)), PAGES) if number.isdecimal() and len(number) < 4 else 1,
            after=asked.get("after", ""),
        )
        stuck = await self._sources.read(wanted, page.clock)
        return page.render("stuck.html", stuck=stuck, wanted=wanted, kinds=KINDS, states=STATES, pages=PAGES)

    async def _find(self, request: Request, page: Page) -> Response:
        id = request.query_params.get("id", "").strip().lower()
        if len(id) < LOGGED:
            return page.problem(400, "Not an id", f"Give the id of a thing, or at least its first {LOGGED} digits.")
        hexadecimal = not set(id) - set("0123456789abcdef")
        found: list[str] = []
        for kind, things in self._things.items():
            if isinstance(things, Messages) or (hexadecimal and isinstance(things, Records | Sagas)):
                found += [f"{kind}/{each}" for each in await things.ids(id)]
        if len(found) == 1:
            return RedirectResponse(page.url(found[0]), 303)
        words = "Nothing has this id." if not found else "Several things have ids that begin so: give more digits."
        return page.problem(404, "Not found", words)

    async def _look(self, kind: str, id: str, page: Page) -> Thing | None:
        things = self._things.get(kind)
        if things is None or (kind in ("record", "saga") and set(id) - set("0123456789abcdef")):
            return None
        return await things.look(id, page.clock)

    async def _show(self, page: Page, thing: Thing, clear: Mapping[str, str] | None = None) -> Response:
        actions = await self._auditing.actions(_LOOKED_AT)
        return page.render(
            "thing.html",
            thing=thing,
            clear=clear or {},
            offers=[] if page.operator.read_only else [*thing.offers, *self._key_offer(thing)],
            actions=[action for action in actions if action.thing.startswith(thing.named)],
        )

    def _key_offer(self, thing: Thing) -> list[Offer]:
        async def act(*_: object) -> str:
            return "shown"

        if not self._show_keys or not thing.secrets:
            return []
        return [Offer(name=_SHOW_KEY, help="Show what is hidden here, on the next page only.", act=act)]

    async def _act(self, request: Request, page: Page, parts: list[str]) -> Response:
        form = await _form_of(request)
        if form is None:
            words = f"A form has at most {LARGEST_FORM} bytes. Nothing was changed."
            return page.problem(413, "Too large", words)
        refused = (
            "This operator may only look." if page.operator.read_only else page.forms.refuse(form.get("token", ""))
        )
        if refused is not None:
            return page.problem(403, "Refused", f"{refused} Nothing was changed.")
        reason = form.get("reason", "").strip()
        if not 0 < len(reason) <= _LONGEST_REASON:
            words = f"Give a reason, of at most {_LONGEST_REASON} characters. Nothing was changed."
            return page.problem(422, "No reason", words)
        thing = await self._look(parts[0], parts[1], page) if len(parts) == 2 else None
        offers = [] if thing is None else [*thing.offers, *self._key_offer(thing)]
        offer = next((offer for offer in offers if offer.id == form.get("action")), None)
        if thing is None or offer is None or not offer.is_as_seen(form, page.clock.seconds):
            words = "It has changed since the page was read. Nothing was changed: look at it again."
            return page.problem(409, "Not possible", words)
        action = await self._do(page.operator, thing, offer, form, reason)
        if offer.name == _SHOW_KEY:
            return await self._show(page, thing, thing.secrets)
        return RedirectResponse(page.url("audit", done=action.id), 303)

    async def _do(self, operator: Operator, thing: Thing, offer: Offer, form: Mapping[str, str], reason: str) -> Action:
        named = f"{thing.named} {offer.target}" if offer.target else thing.named
        action = Action(id="", operator=operator.name, name=offer.name, thing=named, reason=reason)
        return await audited(self._auditing, action, lambda: offer.act(operator.name, form))


async def _form_of(request: Request) -> dict[str, str] | None:
    """Read a form, nothing of one of another type; None: it is too large, and not read to its end."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return {}
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            return None
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def _answer_of(error: HTTPException) -> Response:
    detail: object = error.detail  # that of FastAPI may be anything that is JSON
    if isinstance(detail, str):
        return PlainTextResponse(detail, error.status_code, dict(error.headers or {}))
    return JSONResponse({"detail": detail}, error.status_code, dict(error.headers or {}))


async def _refuse_other(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the lifespan events, as where the page is not mounted, and refuse a WebSocket."""
    if scope["type"] != "lifespan":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

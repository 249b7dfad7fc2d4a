"""An operator's browser without a screen: it reads pages, and sends the forms that are on them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx

ORIGIN = "http://shop.example"


class Visitor:
    """Requests to an application, with the cookies that it was given. ``mount``: where the page is.

    ``root_path``: the prefix that the server says it is under.
    """

    def __init__(self, app: Any, mount: str = "", root_path: str = "") -> None:
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path=root_path), base_url=ORIGIN)
        self.mount = mount

    async def get(self, path: str = "", **query: str) -> httpx.Response:
        """Read a page."""
        return await self.client.get(f"{self.mount}/{path}", params=query)

    async def offers(self, path: str) -> list[str]:
        """Return the actions that a page offers."""
        return [unescape(each) for each in re.findall(r'name="action" value="([^"]*)"', (await self.get(path)).text)]

    async def token(self, path: str) -> str:
        """Return the token of the forms of a page."""
        found = re.search(r'name="token" value="(\w+)"', (await self.get(path)).text)
        assert found is not None, "the page has no form"
        return found[1]

    async def act(self, path: str, action: str, reason: str = "the provider says so", **form: str) -> httpx.Response:
        """Read a page, and send its form of an action; of an action that it does not have, only a token."""
        return await self.post(path, {**await self.form(path, action), "reason": reason, **form})

    async def form(self, path: str, action: str) -> dict[str, str]:
        """Return what the form of an action on a page sends by itself."""
        text = (await self.get(path)).text
        for each in re.findall(r"<form method=\"post\".*?</form>", text, re.DOTALL):
            hidden = {
                name: unescape(value) for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', each)
            }
            if hidden["action"] == action:
                return hidden
        return {"action": action, "token": await self.token(path)}

    async def post(self, path: str, form: dict[str, str], **headers: str) -> httpx.Response:
        """Send a form, as a browser does from a page of the same origin."""
        own = {"origin": ORIGIN} | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(
            f"{self.mount}/{path}", data=form, headers={name: value for name, value in own.items() if value}
        )

"""The clients of ``docs/clients.md``: modules made from the code that stands there."""

from __future__ import annotations

import re

from tests.kit.paths import ROOT
from tests.kit.servers import LOOPBACK

_BLOCK = re.compile(r"^### ([^\n]+)\n(?:(?!^#).)*?^```(python|js)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PAGE = (ROOT / "docs" / "clients.md").read_text()
_BLOCKS = _BLOCK.findall(_PAGE[_PAGE.index("\n## Python\n") :])

PYTHON = {heading: code for heading, language, code in _BLOCKS if language == "python"}
NODE = {heading: f"{code}\nexport default placeOrder;\n" for heading, language, code in _BLOCKS if language == "js"}

KEYLESS = ("stripe", "stamina", "tenacity", "httpx with idempotency.client", "requests with idempotency.client")
"""How the names of the clients begin that make a key of their own."""


def module_of(client: str, port: int, token: str) -> str:
    """Write the module of a client that calls this port of the loopback interface."""
    code = {**PYTHON, **NODE}[client]
    for shown, real in {
        "sk_test": token,
        "https://api.example": f"http://{LOOPBACK}:{port}",
        'protocol: "https", host: "api.example", port: 443': f'protocol: "http", host: "{LOOPBACK}", port: {port}',
    }.items():
        code = code.replace(shown, real)
    assert "api.example" not in code
    return code

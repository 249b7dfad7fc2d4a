"""The clients of ``docs/clients.md``: modules made from the code that stands there."""

from __future__ import annotations

import re

from tests.kit.paths import ROOT
from tests.kit.servers import LOOPBACK

_BLOCK = re.compile(r"^### ([^\n]+)\n(?:(?!^#).)*?^```(python|js)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BLOCKS = _BLOCK.findall((ROOT / "docs" / "clients.md").read_text())

PYTHON = {heading: code for heading, language, code in _BLOCKS if language == "python"}
NODE = {heading: f"{code}\nexport default placeOrder;\n" for heading, language, code in _BLOCKS if language == "js"}


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

"""What ``scripts/docs`` makes of pages and docstrings. That the site builds is seen by ``scripts/check``."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import griffe
import pytest

from tests.kit.paths import ROOT
from tests.kit.script_modules import script_modules

MODULE = '''
    """A shop."""

    from idempotency.errors import Left

    def order(item: str, *extras: str, count: int = 1, **more: object) -> int:
        """Order an item; see :class:`~idempotency.policy.Policy` and ``count``."""

    def undocumented() -> None: ...

    def _private() -> None:
        """Do what nobody outside needs."""

    class Basket:
        """Hold items."""

        def __init__(self, size: int = 3) -> None: ...

        async def put(self, item: str, *, at: float) -> None:
            """Put an item in."""
'''


@pytest.fixture
def build_docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    module = script_modules(monkeypatch, ROOT / "scripts")("build_docs")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PAGES", tmp_path / "build" / "docs")
    (tmp_path / "build" / "docs").mkdir(parents=True)
    return module


def test_a_page_of_the_reference_has_what_a_module_offers(build_docs: Any) -> None:
    """Signatures and docstrings, as Markdown; not what is private, imported or not described."""
    module = griffe.visit("shop", filepath=Path("shop.py"), code=dedent(MODULE))

    page = "\n".join(build_docs.page_of(module))

    assert page == dedent(
        """\
        # shop

        A shop.

        ## order

        ```python
        def order(item: str, *extras: str, count: int = 1, **more: object) -> int
        ```

        Order an item; see `Policy` and `count`.

        ## Basket

        ```python
        Basket(size: int = 3)
        ```

        Hold items.

        ### Basket.put

        ```python
        async def put(item: str, *, at: float) -> None
        ```

        Put an item in.
        """
    )


def test_links_lead_to_pages_of_the_site(build_docs: Any, tmp_path: Path) -> None:
    """The README is the first page, and an example a page of its own; what is not there is found."""
    for name in ("README.md", "docs/http.md", "docs/decisions/0001-x.md", "examples/orders.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    index = tmp_path / "build" / "docs" / "index.md"
    decision = tmp_path / "build" / "docs" / "decisions" / "0001-x.md"
    decision.parent.mkdir()
    index.write_text("[a](docs/http.md#keys) [b](examples/orders.py) [c](https://x.test) [d](docs/gone.md)")
    decision.write_text("[a](../http.md) [b](../../README.md)")

    assert build_docs.with_links_of_the_site(index) == (
        "[a](http.md#keys) [b](examples/orders.md) [c](https://x.test) [d](docs/gone.md)"
    )
    assert build_docs.with_links_of_the_site(decision) == "[a](../http.md) [b](../index.md)"
    assert list(build_docs.dead_links())[-1] == "index.md: docs/gone.md is not there"


def test_a_page_outside_of_the_navigation_is_found(build_docs: Any, tmp_path: Path) -> None:
    """And an entry of the navigation without a page; the pages of a folder are listed by its index."""
    (tmp_path / "mkdocs.yml").write_text("nav: [{Start: [index.md, gone.md]}, {More: [notes/index.md]}]")
    for name in ("index.md", "stray.md", "notes/index.md", "notes/one.md"):
        (tmp_path / "build" / "docs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "build" / "docs" / name).write_text("")

    assert list(build_docs.strays()) == [
        "mkdocs.yml: gone.md is not there",
        "stray.md: is not in the navigation of mkdocs.yml",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n\nA key names a request. It is long.\n", "A key names a request."),
        ("\n```sh\npip\n```\n\n| a | b |\n\nOn one\nline: this", "On one line"),
        ("", ""),
    ],
)
def test_the_first_sentence_stands_for_a_page(build_docs: Any, text: str, sentence: str) -> None:
    """Code, tables and lists are passed over."""
    assert build_docs.first_sentence(text) == sentence

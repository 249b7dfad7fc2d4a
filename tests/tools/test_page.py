"""The code of the page about tools runs as it stands there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, Table, Text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from idempotency import current
from idempotency.errors import ApprovalNeededError
from idempotency.stores.sql import SQLStore
from tests.kit.servers import missing
from tests.test_docs_code import blocks

PAGE = blocks("tools.md")
FRAMEWORKS = {"MCP", "OpenAI Agents SDK", "LangChain and LangGraph", "Pydantic AI"}


class Provider:
    """The provider of the page, which knows its keys."""

    def __init__(self) -> None:
        self.refunds: dict[str, str] = {}
        self.fails = False

    async def refund(self, order_id: str, amount: int, idempotency_key: str) -> str:
        self.refunds[idempotency_key] = f"refunded {amount}"
        if self.fails:
            raise TimeoutError
        return self.refunds[idempotency_key]

    async def find(self, key: str) -> str | None:
        return self.refunds.get(key)


@pytest.fixture
async def page(tmp_path: Path) -> Any:
    """Run all blocks but those of frameworks in one module, with SQLite as the store."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}")
    metadata = MetaData()
    cancelled = Table("cancelled", metadata, Column("order_id", Text))
    store = SQLStore(engine)
    await store.create_schema()
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    names: dict[str, Any] = {
        "__name__": "shop",
        "provider": Provider(),
        "Session": async_sessionmaker(engine),
        "Cancelled": cancelled,
    }
    for heading, codes in PAGE.items():
        for code in codes if heading not in FRAMEWORKS else []:
            run(code, names, store)
    yield names
    await store.aclose()
    await engine.dispose()


def run(code: str, names: dict[str, Any], store: Any) -> None:
    names["open_store"] = lambda url: store
    code = code.replace("from idempotency import current, open_store", "from idempotency import current")
    exec(compile(code, "docs/tools.md", "exec"), names)


async def test_the_tools_of_the_page_take_effect_once(page: Any) -> None:
    assert await page["refund"]("7", 5) == await page["refund"]("7", 5) == "refunded 5"
    assert await page["cancel"]("7") == await page["cancel"]("7") == "cancelled 7"
    assert len(page["provider"].refunds) == 1
    assert current() is None


async def test_the_verification_of_the_page_finds_the_refund(page: Any) -> None:
    page["provider"].fails = True

    assert await page["refund_verified"]("7", 5) == "refunded 5"
    assert len(page["provider"].refunds) == 1


async def test_the_model_of_the_page_is_told_in_words(page: Any) -> None:
    page["provider"].fails = True

    assert "may have been done" in await page["answer"]("7", 5)
    assert "may have been done" in await page["call_tool"]("run", "1", {"order_id": "7", "amount": 5})


async def test_the_approval_of_the_page_is_for_one_call(page: Any) -> None:
    assert await page["refund_approved"]("1", 100) == "refunded 100"
    with pytest.raises(ApprovalNeededError):
        await page["refund_approved"]("2", 101)
    await page["on_approved"]({"order_id": "2", "amount": 101}, "ann")

    assert await page["refund_approved"]("2", 101) == "refunded 101"


async def test_the_server_of_the_page_has_an_idempotent_tool(page: Any) -> None:
    if find_spec("mcp") is None:
        missing("the SDK of MCP is not installed")
    from mcp.client.client import Client

    for code in PAGE["MCP"]:
        run(code, page, None)
    async with Client(page["server"]) as client:
        for _ in range(2):
            found = await client.call_tool("refund_order", {"order_id": "7", "amount": 5})

    assert found.structured_content == {"result": "refunded 5"}
    assert len(page["provider"].refunds) == 1

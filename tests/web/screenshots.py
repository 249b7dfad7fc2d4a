"""Make the pictures of docs/console.md: python -m tests.web.screenshots."""

from __future__ import annotations

import asyncio
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from playwright.sync_api import Page
from starlette.applications import Starlette

from idempotency.outbox import Outbox, OutboxOperations
from idempotency.stores.sql import SQLStore
from idempotency.web import console
from tests.kit.box import Box
from tests.kit.chromium import browser
from tests.kit.paths import ROOT
from tests.kit.served import served
from tests.web.kit import saga, stuck_saga, unknown

IMAGES = ROOT / "docs" / "images"
WIDTH = 1120


async def fill(url: str) -> None:
    """Let some things of a shop be stuck."""
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url)
    store, outbox = SQLStore(engine), Outbox(notify=False)
    await outbox.create_schema(engine)
    box = Box(engine, outbox)
    await unknown(store, "1f5a", "request")
    await unknown(store, "order-7", "function:1:shop.payments.charge")
    await unknown(store, "m-12", "message")
    await stuck_saga(store, "trip-7")
    await saga(store, "approve", "trip-8")
    for name, key in (("retried", 7), ("behind", 7), ("refused", 9)):
        await box.emit(name, key)
    await box.retry_later("retried", 1_796_000_000)
    await box.die("refused", reason="given up after 5 attempts: ConnectionError")
    await store.aclose()
    await engine.dispose()


def take(page: Page, name: str) -> None:
    """Write a picture of the whole page."""
    page.screenshot(path=IMAGES / name, full_page=True)


def main() -> None:
    """Write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as thread:
        url = f"sqlite+aiosqlite:///{Path(directory) / 'shop.db'}"
        thread.submit(asyncio.run, fill(url)).result()
        store = SQLStore.from_url(url)
        app = Starlette()
        app.mount("/stuck", console(store, allow=lambda _: "ada", outbox=OutboxOperations(url)))
        with served(app) as at, browser() as started:
            page = started.new_page(viewport={"width": WIDTH, "height": 100}, color_scheme="light")
            page.goto(f"{at}/stuck/")
            take(page, "console-stuck.png")
            page.locator('a[href*="/stuck/saga/"]').first.click()
            page.locator("summary").nth(1).click()
            page.get_by_label("Reason").locator("visible=true").fill("the hotel says that it is booked")
            take(page, "console-saga.png")


if __name__ == "__main__":
    main()

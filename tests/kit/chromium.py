"""A browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from tests.kit.servers import missing

NO_CHROMIUM = "no Chromium is installed (the package chromium of Debian)"


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser without a screen, and close it at the end."""
    program = shutil.which("chromium")
    if program is None:
        missing(NO_CHROMIUM)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield started
        finally:
            started.close()

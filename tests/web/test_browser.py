"""The page in a browser: by keyboard, on a phone, and without scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from starlette.applications import Starlette

from idempotency.stores.memory import MemoryStore
from idempotency.web import console
from tests.kit.chromium import browser as started_browser
from tests.kit.served import served
from tests.web.kit import saga, stuck_saga, unknown

pytestmark = pytest.mark.processes

PHONE = {"width": 390, "height": 844}
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests; each has its own profile."""
    with started_browser() as started:
        yield started


@pytest.fixture
def store(memory: MemoryStore) -> MemoryStore:
    """A store with a request of unknown outcome, a saga that waits, and one that is stuck."""

    async def fill() -> None:
        await unknown(memory, "order-7", "request")
        await unknown(memory, "m-7", f"consumer:1:{HOSTILE}{'long' * 60}")
        await saga(memory, "sleep", "trip-8")
        await stuck_saga(memory)

    # Playwright has an event loop in this thread.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, fill()).result()
    return memory


@pytest.fixture
def url(store: MemoryStore) -> Iterator[str]:
    """The URL of the page, mounted in an application behind a real server."""
    app = Starlette()
    app.mount("/stuck", console(store, allow=lambda _: "ada", show_keys=True))
    with served(app) as url:
        yield f"{url}/stuck/"


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A profile in which no script of a page runs, and anything that a page logs fails the test."""
    made = browser.new_context(java_script_enabled=False)
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text))
    yield made
    made.close()
    # A browser asks for an icon that no page names.
    assert [each for each in said if "favicon" not in each and "404" not in each] == []


@pytest.fixture
def page(context: BrowserContext, url: str) -> Page:
    """The page of what is stuck."""
    opened = context.new_page()
    opened.goto(url)
    return opened


def press(page: Page, key: str, until: str, most: int = 40) -> None:
    """Press a key until the element that has the focus matches a selector."""
    for _ in range(most):
        page.keyboard.press(key)
        if page.locator(f"{until}:focus").count():
            return
    raise AssertionError(f"{until} is not reached by {key}")


def test_what_is_stuck_is_seen_and_filtered(page: Page) -> None:
    """By a form that needs no script."""
    expect(page).to_have_title("What is stuck")
    expect(page.get_by_role("table").get_by_role("row")).to_have_count(5)

    page.get_by_label("Kind").select_option("step")
    page.get_by_role("button", name="Filter").click()

    expect(page.get_by_role("table").get_by_role("row")).to_have_count(2)
    expect(page.get_by_role("cell", name="operator: the outcome of the step hotel is unknown")).to_be_visible()


def test_the_style_of_the_page_is_applied(page: Page) -> None:
    """The policy of its content lets this one style through."""
    header = page.get_by_role("banner").bounding_box()
    who = page.get_by_text("ada", exact=True).bounding_box()

    assert header is not None
    assert who is not None
    assert who["x"] > header["width"] * 0.8


def test_an_operator_acts_by_keyboard_alone(page: Page) -> None:
    """From the list to the audit, with a reason; without one the form is not sent."""
    press(page, "Tab", 'a[href*="/stuck/record/"]')
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("record")

    press(page, "Tab", "summary")
    page.keyboard.press("Enter")
    press(page, "Tab", 'input[name="reason"]')
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("record")
    page.keyboard.type("the provider has charged it")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    expect(page.get_by_role("status")).to_contain_text("resolve done: done")
    row = page.get_by_role("row").nth(1)
    expect(row).to_contain_text("ada")
    expect(row).to_contain_text("resolve done")
    expect(row).to_contain_text("the provider has charged it")


def test_the_focus_is_seen(page: Page) -> None:
    """What has the focus has an outline."""
    page.keyboard.press("Tab")

    assert page.locator(":focus-visible").count() == 1


@pytest.mark.parametrize("path", ["", "audit", "thing", "no/such"])
def test_a_phone_scrolls_in_one_direction(context: BrowserContext, url: str, page: Page, path: str) -> None:
    """Nothing is wider than the screen, also a long name."""
    target = url + path
    if path == "thing":
        target = url.removesuffix("/stuck/") + str(page.locator('a[href*="/stuck/saga/"]').first.get_attribute("href"))
    phone = context.new_page()
    phone.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
    phone.goto(target)

    assert phone.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_a_hostile_name_is_text(browser: Browser, url: str) -> None:
    """Also where scripts would run."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)

    expect(page.get_by_role("table")).to_contain_text("<script>document.title='owned'</script>")
    expect(page).to_have_title("What is stuck")
    assert page.locator("table script, table img").count() == 0
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_reader_wants_it(browser: Browser, url: str, scheme: str) -> None:
    """By style alone."""
    context = browser.new_context(color_scheme="dark" if scheme == "dark" else "light")
    page = context.new_page()
    page.goto(url)

    color = page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert color == ("rgb(21, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    context.close()

"""The page in a real browser: no error, no request, reachable by keyboard, 360 pixels wide, dark when asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        started = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(page: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


# Elements that stand out at the right, but for those of the table, which scrolls by itself.
CUT_OFF = """() => [...document.querySelectorAll('main *')]
    .filter((e) => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)
    .map((e) => e.outerHTML.slice(0, 80))"""
DRAWN_CHARTS = """() => [...document.querySelectorAll('svg.chart')]
    .filter((e) => e.getBoundingClientRect().width > 0).length"""
FOCUSED = """() => { const e = document.activeElement; return [e.tagName, e.className.baseVal ?? e.className,
    [...document.querySelectorAll('*')].indexOf(e), e.matches(':focus-visible')] }"""
VISIBLE_POINTS = """() => [...document.querySelectorAll('a.point')]
    .filter((e) => e.getBoundingClientRect().width > 0).length"""


class Visit:
    """A page that was opened, what its console said and what it asked for."""

    def __init__(self, browser: Browser, address: str, *, width: int = 1200, scheme: str = "light") -> None:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)


@pytest.mark.parametrize("width", [1200, 720, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_an_error_or_a_request_and_fits(
    browser: Browser, address: str, width: int, scheme: str
) -> None:
    visit = Visit(browser, address, width=width, scheme=scheme)
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [address]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.evaluate(CUT_OFF) == []
    assert visit.page.evaluate(DRAWN_CHARTS) == 2  # of each chart one drawing, and one measure


def test_the_dark_scheme_is_dark(browser: Browser, address: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(Visit(browser, address, scheme="dark").page.evaluate(ground)) < 60
    assert min(Visit(browser, address).page.evaluate(ground)) > 200


def test_everything_is_reached_by_keyboard_in_the_order_of_the_page(browser: Browser, address: str) -> None:
    """The focus never goes back up the page, and passes measures, points, table, picker and maps."""
    page = Visit(browser, address).page
    reached: list[tuple[str, str, int, bool]] = []
    for _ in range(120):
        page.keyboard.press("Tab")
        tag, classes, place, visible = page.evaluate(FOCUSED)
        if tag == "BODY" or (reached and place < reached[-1][2]):
            break
        reached.append((tag, classes, place, visible))
    assert all(visible for *_, visible in reached)
    kinds = {(tag, classes.split(" ")[0]) for tag, classes, *_ in reached}
    assert {("A", "skip"), ("INPUT", ""), ("a", "point"), ("BUTTON", ""), ("SELECT", ""), ("DIV", "map")} <= kinds
    points = page.evaluate(VISIBLE_POINTS)
    assert sum(classes.startswith("point") for _, classes, *_ in reached) == points > 3


def test_a_focused_point_is_read_and_leads_to_its_policy(browser: Browser, address: str) -> None:
    page = Visit(browser, address).page
    page.locator('svg.wide a.point[data-for="fora@2"]').first.focus()
    assert page.inner_text('[data-readout="pareto"]').startswith("fora@2: 1.82×, PSNR")
    page.keyboard.press("Enter")
    assert page.inner_text("article:not([hidden]) h3") == "fora@2"
    assert page.evaluate("document.activeElement.dataset.policy") == "fora@2"
    assert page.locator('svg.wide .line.chosen[data-for="fora@2"]').count() == 1


def test_the_maps_cursor_says_what_a_block_did(browser: Browser, address: str) -> None:
    page = Visit(browser, address).page
    page.select_option("select", label="fora")
    page.locator("article:not([hidden]) .map").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    said = page.inner_text('article:not([hidden]) [data-readout="map"]')
    assert said.startswith("step 4, block 1: ")
    assert any(action in said for action in ("reuse", "evaluate"))
    page.keyboard.press("End")
    assert "step 12, block 1: " in page.inner_text('article:not([hidden]) [data-readout="map"]')


def test_the_table_sorts_both_ways_and_says_so(browser: Browser, address: str) -> None:
    page = Visit(browser, address).page
    column = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[1].textContent)"
    button = page.get_by_role("button", name="speed-up", exact=True)
    button.click()
    numbers = [float(text[:-1]) for text in page.evaluate(column) if text != "–"]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) > 3
    assert page.evaluate(column)[-1] == "–"  # what failed is last
    assert page.get_attribute("thead th:nth-child(2)", "aria-sort") == "descending"
    button.click()
    assert [float(text[:-1]) for text in page.evaluate(column) if text != "–"] == numbers[::-1]


def test_images_flip_to_the_uncached_ones_and_back(browser: Browser, address: str) -> None:
    page = Visit(browser, address).page
    page.select_option("select", label="fora")
    own = "document.querySelector('article:not([hidden]) [data-own]').src"
    before = page.evaluate(own)
    button = page.locator("article:not([hidden]) .blink button")
    button.click()
    assert page.evaluate(own) == page.get_attribute("article:not([hidden]) .grids img", "src") != before
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert page.evaluate(own) == before


def test_without_scripts_nothing_is_hidden(browser: Browser, address: str) -> None:
    page = browser.new_context(java_script_enabled=False, viewport={"width": 1200, "height": 800}).new_page()
    page.goto(address)
    assert page.locator("article.policy").count() == page.locator("article.policy:visible").count() > 3
    assert page.locator("figure[data-measure]:visible").count() >= 3
    assert not page.locator(".picker").is_visible()

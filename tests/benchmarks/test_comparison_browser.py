"""The page of a comparison in a real browser, on wide and narrow screens, light and dark."""

from __future__ import annotations

import numpy as np
import pytest

from agentropy.benchmarks.comparison.analysis import analyse
from agentropy.benchmarks.comparison.page import page
from tests.benchmarks.fabricate import MACHINE, fabricate, make_grid
from tests.browser import chromium, needs_chromium

pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
pytestmark = needs_chromium

LONG = "a_label_without_any_space_that_goes_on_and_on_for_longer_than_a_phone_is_wide"
# Least contrast of text with what lies under it, 4.5 to 1 (WCAG 2.2, 1.4.3), over all texts of the page.
CONTRAST = """() => {
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll("p, li, td, th, figcaption, a, summary, svg text")].map(each => {
    const style = getComputedStyle(each), ink = light(each.closest("svg") ? style.fill : style.color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }));
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    grid = make_grid(("grpo", LONG, "arpo"), seeds=2, tasks=16, steps=10)
    fabricate(grid, folder, np.random.default_rng(1), last_entropy={"arpo": 0.02})
    path = folder / "report.html"
    path.write_text(page(analyse(grid, folder, MACHINE)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def opened(request, browser, file):
    """The page with all of its details open, and what it asked for or complained of."""
    width, theme = request.param
    shown = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=theme)
    seen = []
    shown.on("request", lambda asked: seen.append(asked.url))
    shown.on("console", lambda said: seen.append(said.text))
    shown.goto(file.as_uri())
    shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    yield shown, width, seen
    shown.close()


def test_the_page_reads_without_scrolling_sideways_and_asks_for_nothing(opened, file):
    shown, width, seen = opened
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert seen == [file.as_uri()]


def test_every_text_stands_out_from_its_ground(opened):
    shown, _, _ = opened
    assert shown.evaluate(CONTRAST) >= 4.5


def test_names_and_figures_of_a_row_do_not_cover_each_other(opened):
    shown, _, _ = opened
    gaps = shown.evaluate("""() => [...document.querySelectorAll("svg .name")].map(name =>
        name.nextElementSibling.getBoundingClientRect().left - name.getBoundingClientRect().right)""")
    assert len(gaps) > 10 and min(gaps) > 0


def test_small_letters_stay_readable(opened):
    shown, _, _ = opened
    heights = shown.evaluate("""() => [...document.querySelectorAll("svg text:not(.mark)")].map(text =>
        text.getBoundingClientRect().height)""")
    assert min(heights) > 11

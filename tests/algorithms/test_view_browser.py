"""The page of ``agentropy view`` in a real browser: what it shows is what was saved, and every part can be reached."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.instruments.credit import Credit, credit_path, save_credit
from agentropy.algorithms.runs import RunFolder
from agentropy.algorithms.view.app import create_app
from agentropy.algorithms.view.export import export
from agentropy.algorithms.view.library import Library
from tests.algorithms.view_page import (
    CONTRAST,
    CUT,
    NAMELESS,
    SCRIPT,
    actions,
    between,
    forked,
    luminance,
    numbers,
    rows_of,
    small_run,
)
from tests.algorithms.view_runs import TOKENIZER, append, make_run, success

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
uvicorn = pytest.importorskip("uvicorn")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
THEMES = ("light", "dark")
MEASURES = ("entropy", "logprob", "advantage", "weight")
MANY = 10_000
MILLISECONDS = 20_000.0
"""To wait for what must appear; a busy machine needs many of them, and a good page none."""


@dataclass
class Site:
    """A served folder of runs."""

    address: str
    folder: Path
    problems: list[str] = field(default_factory=list)
    """What the browser complained of, and requests that left for another host."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("runs")
    small_run(folder / "forks")
    # Played the same tasks, and is not finished: what is appended to it is live.
    make_run(folder / "live", steps=2, tasks=2, total_steps=9, seed=1)
    make_run(folder / "many", steps=5, tasks=MANY // 40, group=8, turns=1)
    with served(folder) as address:
        yield Site(address, folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of the runs in ``folder``."""
    server = uvicorn.Server(uvicorn.Config(create_app(Library([folder])), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def contexts(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """A context for each theme and size, so that the browser keeps the page's files; a fresh one remembers nothing."""
    kept: dict[str, BrowserContext] = {}

    def context(theme: str, size: Any, *, fresh: bool = False) -> BrowserContext:
        key = f"{theme} {size} {len(kept) if fresh else ''}"
        if key not in kept:
            kept[key] = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce")
            kept[key].set_default_timeout(MILLISECONDS)
        return kept[key]

    yield context
    for one in kept.values():
        one.close()


@pytest.fixture
def open_page(site: Site, contexts: Callable[..., BrowserContext]) -> Iterator[Open]:
    """Opens addresses of the page; at the end no error was logged, and no request had left for another host."""
    pages = []

    def go(
        hash: str = "#/", *, size: Any = WIDE, theme: str = "light", fresh: bool = False, address: str = site.address
    ) -> Page:
        page = contexts(theme, size, fresh=fresh).new_page()
        pages.append(page)
        inside = address.removesuffix("index.html")
        page.on("console", lambda m: site.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: site.problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(inside) else site.problems.append(f"asks {r.url}"))
        page.goto(address + hash)
        ready(page)
        return page

    site.problems.clear()
    yield go
    for page in pages:
        page.close()
    assert not site.problems


def ready(page: Page) -> None:
    page.wait_for_selector("main:not([aria-busy]) h1", state="attached")


TREE = "#/run/forks/tree/3/0"
VIEWS = {
    "runs": ("#/", ".runs .spark"),
    "run": ("#/run/forks", ".plot svg"),
    "list": ("#/trajectories", ".many #row-0"),
    "episode": (TREE + "?branch=3", ".token[data-value]"),
    "advantage": (TREE + "?branch=0&colour=advantage", '[data-measure="advantage"][aria-pressed="true"]'),
    "compare": ("#/compare/forks/live", ".pair .token[data-value]"),
    "nothing": ("#/run/missing", ".notice"),
}
"""Addresses, and what is there once the view is drawn."""


def said(page: Page) -> list[str]:
    """The actions of the open branch, without the token that ends them."""
    texts = page.locator(".talk .said").all_inner_texts()
    return [re.sub(r"\s*<[a-z]+>\s*$", "", text).strip() for text in texts]


def test_every_branch_is_shown_with_exactly_the_tokens_of_its_walk(open_page: Open) -> None:
    tree, page = forked(), open_page(TREE)
    for member in range(4):
        page.goto(page.url.split("#")[0] + f"{TREE}?branch={member}")
        page.wait_for_selector(f'.lane.open[data-branch="{member}"]')
        assert said(page) == actions(tree, member)
        assert page.locator(".talk .token").count() == int(tree.mask(tree.trajectories[member].leaves[0]).sum())


def test_a_click_on_a_fork_a_leaf_or_a_turn_opens_that_branch_there(open_page: Open) -> None:
    tree, page = forked(), open_page(TREE)
    assert page.locator(".cell").count() == sum(node.role == "action" for node in tree.nodes)  # shared ones once
    for target, member, turn in (
        ('circle.reach[data-fork="3"]', 3, 2),
        ('[data-leaf="1"]', 1, 1),
        ('.lane[data-branch="2"] .cell[data-turn="3"]', 2, 3),
        ('.lane[data-branch="0"] .cell[data-turn="1"]', 0, 1),
    ):
        page.locator(target).click(force=True)
        page.wait_for_selector(f'.lane.open[data-branch="{member}"][aria-selected="true"]')
        assert page.locator(".lane.open").count() == 1
        assert said(page) == actions(tree, member)
        assert page.locator(".turn.now").get_attribute("data-turn") == str(turn)
        assert f"branch={member}" in page.url
    assert page.locator(".turn.shared").count() == 0
    page.locator(".branch-off", has_text="look on the desk").click()
    page.wait_for_selector('.lane.open[data-branch="2"]')
    assert [turn.get_attribute("data-turn") for turn in page.locator(".turn.shared").all()] == ["0"]


def test_what_the_environment_wrote_stays_text(open_page: Open) -> None:
    page = open_page(TREE)
    assert SCRIPT in page.locator(".prompt").inner_text()
    assert SCRIPT in page.locator(".heard").first.inner_text()
    assert page.locator("main img, main script, main b:has-text('bold')").count() == 0
    assert page.title() != "1"


@pytest.mark.parametrize("theme", THEMES)
def test_the_colour_of_every_token_is_that_of_its_number(open_page: Open, theme: str) -> None:
    tree, page = forked(), open_page(TREE, theme=theme)
    for key, measure in enumerate(MEASURES, 1):
        page.keyboard.press(str(key))
        page.wait_for_selector(f'.segments [data-measure="{measure}"][aria-pressed="true"]')
        stops = page.evaluate(f"agentropy.STOPS.{measure}.{theme}")
        ramp = page.locator(".legend .ramp")
        low, high = (float(ramp.get_attribute(f"data-{end}") or "nan") for end in ("low", "high"))
        expected = numbers(tree, measure, 0)
        shown = page.eval_on_selector_all(
            ".talk .token", "spans => spans.map(s => [Number(s.dataset.value), getComputedStyle(s).backgroundColor])"
        )
        assert [value for value, _ in shown] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        for value, colour in shown:
            share = (value - low) / (high - low)
            share = min(1.0, max(0.0, 1 - share if measure == "logprob" else share))
            painted = [int(channel) for channel in re.findall(r"\d+", colour)]
            assert painted == pytest.approx(between(stops, share), abs=1), (measure, value)
        if measure == "advantage":
            assert low == -high and {colour for value, colour in shown if value == 0} == {
                f"rgb({', '.join(map(str, between(stops, 0.5)))})"
            }
        if measure == "weight":
            struck = page.eval_on_selector_all(".talk .masked", "spans => spans.map(s => Number(s.dataset.value))")
            assert struck == [value for value in expected if value == 0]


def test_scales_are_ordered_by_lightness_and_keep_words_readable(open_page: Open) -> None:
    page = open_page(TREE)
    scales = page.evaluate("agentropy.STOPS")
    ink = {"light": [0x1B, 0x1D, 0x21], "dark": [255, 255, 255]}
    for (measure, themes), theme in itertools.product(scales.items(), THEMES):
        lights = [luminance(between(themes[theme], share)) for share in np.linspace(0, 1, 41)]
        halves = [lights[20::-1], lights[20:]] if measure == "advantage" else [lights]
        for half in halves:
            steps = np.diff(half)
            assert (steps < 0).all() if theme == "light" else (steps > 0).all(), (measure, theme)
        text = luminance(ink[theme])
        for light in lights:
            assert (max(text, light) + 0.05) / (min(text, light) + 0.05) >= 4.5, (measure, theme)


def test_a_token_under_the_pointer_or_with_the_focus_tells_its_numbers(open_page: Open) -> None:
    tree, page = forked(), open_page(TREE)
    node = tree.path(tree.trajectories[0].leaves[0])[1]
    page.locator(".talk .token").nth(2).hover()
    tip = page.locator("[role=tooltip]")
    assert f"{node.entropies[2]:.4f} nats" in tip.inner_text()
    assert f"{node.logprobs[2]:.4f}".replace("-", "−") in tip.inner_text()
    page.locator(".talk .token").nth(1).click()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".token:focus").get_attribute("data-place") == "0"
    assert f"{node.entropies[0]:.4f} nats" in tip.inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator(".token:focus").get_attribute("data-node") == str(
        tree.path(tree.trajectories[0].leaves[0])[3].index
    )


def test_a_run_without_credit_says_why_there_are_no_advantages(open_page: Open) -> None:
    page = open_page("#/run/live/tree/1/0")
    button = page.locator('[data-measure="advantage"]')
    assert button.get_attribute("aria-disabled") == "true"
    assert "stored no advantages" in (button.get_attribute("title") or "")
    page.keyboard.press("3")
    assert page.locator('[data-measure="entropy"]').get_attribute("aria-pressed") == "true"


def tally(page: Page, count: int, whole: int) -> None:
    text = f"{whole:,} trajectories" if count == whole else f"{count:,} of {whole:,} trajectories"
    sync_api.expect(page.locator(".tally")).to_have_text(text)


def test_filters_narrow_the_list_and_stand_in_the_address(open_page: Open, site: Site) -> None:
    rows = rows_of(RunFolder.open(site.folder / "forks"))
    page, whole = open_page("#/run/forks/trajectories"), len(rows)
    forks = {(r["step"], r["task"], r["info"]["fork"]["parent"]) for r in rows if "fork" in r["info"]}
    tally(page, whole, whole)
    page.get_by_label("Search tasks").fill("MUG desk")
    tally(page, 4, whole)
    assert "q=MUG+desk" in page.url
    page.get_by_role("radio", name="Won").check(force=True)
    tally(page, 1, whole)
    page.get_by_role("button", name="Clear").click()
    tally(page, whole, whole)
    page.get_by_label("Return from").fill("-0.2")
    page.get_by_label("Return to").fill("0.5")
    tally(page, sum(-0.2 <= row["reward"] <= 0.5 for row in rows), whole)
    page.get_by_label("Step from").fill("2")
    tally(page, sum(-0.2 <= row["reward"] <= 0.5 and row["step"] >= 2 for row in rows), whole)
    page.reload()
    ready(page)
    tally(page, sum(-0.2 <= row["reward"] <= 0.5 and row["step"] >= 2 for row in rows), whole)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("with forks").check()
    left = sum("fork" in row["info"] for row in rows)
    assert left and forks
    shown = int((page.locator(".tally").inner_text().split() or ["0"])[0].replace(",", ""))
    assert left < shown
    page.get_by_label("Search tasks").fill("no such task")
    sync_api.expect(page.locator(".notice")).to_contain_text("No trajectory passes these filters")


def test_several_runs_are_browsed_together_and_by_recipe(open_page: Open) -> None:
    page = open_page("#/trajectories")
    page.get_by_label("Every recipe").select_option("arpo")
    sync_api.expect(page.locator(".tally")).to_contain_text("20 of ")
    assert set(page.locator(".space .tag").all_inner_texts()) == {"forks"}


def test_the_last_of_ten_thousand_rows_is_reached_with_few_rows_in_the_page(open_page: Open) -> None:
    page = open_page("#/run/many/trajectories")
    tally(page, MANY, MANY)
    index = page.request.get(page.url.split("#")[0] + "api/runs/many/index").json()
    assert index["count"] == MANY
    page.keyboard.press("End")
    page.wait_for_selector(f"#row-{MANY - 1}.active")
    last = {name: column[-1] for name, column in index["columns"].items()}
    row = page.locator(f"#row-{MANY - 1}")
    assert row.locator(".c-task").inner_text() == index["tasks"][last["task"]]
    assert row.locator(".c-step").text_content() == f"step {last['step']}"
    assert row.locator(".c-tokens").text_content() == f"{last['tokens']} tokens"
    box, view = row.bounding_box(), page.locator(".scroller").bounding_box()
    assert box and view and view["y"] <= box["y"] and box["y"] + box["height"] <= view["y"] + view["height"] + 1
    assert page.locator(".space .line").count() < 120
    page.locator(".scroller").evaluate("element => element.scrollTo(0, element.scrollHeight / 2)")
    page.wait_for_selector(f"#row-{MANY // 2}")
    assert page.locator(".space .line").count() < 120


def test_columns_sort_in_both_directions_and_back(open_page: Open) -> None:
    page = open_page("#/run/many/trajectories")
    index = page.request.get(page.url.split("#")[0] + "api/runs/many/index").json()
    first = page.locator("#row-0 .c-reward")
    head = page.get_by_role("columnheader", name="Return")
    for direction, value in (
        ("descending", max(index["columns"]["reward"])),
        ("ascending", min(index["columns"]["reward"])),
    ):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        assert first.inner_text() == f"{value:.2f}".replace("-", "−")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert page.locator("#row-0 .c-task").inner_text() == index["tasks"][index["columns"]["task"][0]]


def test_from_the_runs_to_a_token_and_back_with_keys_alone(open_page: Open) -> None:
    page = open_page()

    def tab_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent.trim()") == name:
                return
        raise AssertionError(f"'{name}' cannot be reached with Tab")

    tab_to("forks")
    page.keyboard.press("Enter")
    page.wait_for_selector(".charts figure")
    page.keyboard.press("b")
    page.wait_for_selector("#row-0")
    page.keyboard.press("/")
    page.keyboard.type("mug")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".tally")).to_contain_text("4 of")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#row-2.active")
    page.keyboard.press("Enter")
    page.wait_for_selector('.lane.open[data-branch="2"]')
    page.keyboard.press("]")
    page.wait_for_selector('.lane.open[data-branch="3"]')
    page.keyboard.press("j")
    assert page.locator(".turn.now").get_attribute("data-turn") == "1"
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    focused = page.locator(".token:focus")
    assert (focused.get_attribute("data-place"), focused.inner_text().strip()) == ("1", "on")
    page.keyboard.press("b")
    assert page.locator(".lane:focus").get_attribute("data-branch") == "3"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_selector('.lane.open[data-branch="0"]')
    page.keyboard.press("?")
    sync_api.expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    for title in ("Trajectories of forks", "forks ·", "Runs"):
        page.keyboard.press("u")
        page.wait_for_function("title => document.title.startsWith(title)", arg=title)


def test_enter_on_a_link_or_a_button_is_theirs(open_page: Open) -> None:
    """Views have uses of their own for Enter; what has the focus goes first."""
    page = open_page(TREE)
    page.locator(".branch-off", has_text="look on the desk").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector('.lane.open[data-branch="2"]')
    page.get_by_role("link", name="Previous task").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash.includes('/tree/2/1')")
    page.locator("#crumbs a", has_text="Trajectories").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#row-0")
    page.locator(".tabs a", has_text="Curves").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".charts figure")


def test_the_theme_follows_the_system_until_it_is_chosen_and_then_stays(open_page: Open) -> None:
    page = open_page(theme="dark", fresh=True)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.keyboard.press("t")
    light = page.evaluate(background)
    assert dark != light
    page.reload()
    ready(page)
    assert page.evaluate(background) == light
    assert open_page(theme="light").evaluate(background) == light


@pytest.mark.parametrize(("theme", "size"), [("light", WIDE), ("light", PHONE), ("dark", WIDE)], ids=str)
def test_every_view_fits_its_window_and_all_words_can_be_read(open_page: Open, theme: str, size: Any) -> None:
    page = open_page("#/", size=size, theme=theme)
    for name, (hash, part) in VIEWS.items():
        page.evaluate("hash => { location.hash = hash }", hash)
        page.wait_for_selector(part, state="attached")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        assert not page.evaluate(CUT), name
        assert not page.evaluate(CONTRAST), name
        assert not page.evaluate(NAMELESS), name


def test_what_is_not_there_is_said_with_what_to_do(open_page: Open) -> None:
    page = open_page("#/run/missing")
    assert "There is no run 'missing'" in page.locator("main").inner_text()
    page.get_by_role("link", name="Go to all runs").click()
    page.wait_for_selector("tr[data-run]")
    assert "names nothing" in open_page("#/what/is/this").locator("main").inner_text()


def test_curves_show_the_metrics_of_the_file(open_page: Open, site: Site) -> None:
    page = open_page("#/run/forks")
    rows = [row for row in RunFolder.open(site.folder / "forks").rows() if row["phase"] == "train"]
    figure = page.locator('figure[data-metric="Success"]')
    last = figure.locator(".reading").inner_text()
    assert f"{100 * rows[-1]['success/rate']:.0f} %" in last and "valid unseen" in last
    figure.locator(".plot").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    for title, name in (("Success", "success/rate"), ("Entropy of the policy, nats", "entropy/action_mean")):
        reading = page.locator(f'figure[data-metric="{title}"] .reading').inner_text()
        value = rows[-2][name]
        when = page.locator(f'figure[data-metric="{title}"] .when').inner_text()
        assert when == "step 2" and (f"{100 * value:.0f} %" if "rate" in name else f"{value:.3g}") in reading
    page.get_by_label("Search metrics").fill("turns")
    page.get_by_role("checkbox", name="turns").uncheck()
    assert page.locator('figure[data-metric="Turns of an episode"]').count() == 0
    assert "m=success%2Frate" in page.url and "m=turns" not in page.url
    assert page.locator("figure", has_text="Entropy by turn").locator("rect").count() == 2 * 3


def test_names_of_tokens_are_no_picture_and_the_law_is_written_with_its_signs(open_page: Open, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    rows = [(0.3, 0.1), (0.5, 0.2), (0.7, 0.4), (math.nan, 0.9)]  # both rise: a is negative
    for step, (entropy, rate) in enumerate(rows, 2):
        lists = {"entropy/fork_tokens": [900, 17], "entropy/by_position": [0.5, None]}
        append(run, "train", step, success(rate) | {"entropy/action_mean": entropy, **lists})
    export(Library([tmp_path / "run"]), tmp_path / "out")
    page = open_page("#/run/run", address=(tmp_path / "out" / "index.html").as_uri())
    figure = page.locator("figure", has_text="Success against entropy")
    figure.locator("circle").first.wait_for()
    assert figure.locator("circle").count() == 4 and "−−" not in figure.inner_text()
    assert re.search(r"R = \d\S* exp\(H\) − ", figure.inner_text())
    titles = page.locator(".chart-title").all_inner_texts()
    assert "Entropy by place in the turn" in titles and not [title for title in titles if "fork_tokens" in title]


def test_a_turn_in_window_context_shows_all_that_was_read(open_page: Open, tmp_path: Path) -> None:
    run, tree = make_run(tmp_path / "run", steps=0), Tree("room", "train")
    leaves = []
    for turn, (read, seen) in enumerate([("go to the desk", "the desk"), ("go take the mug", "the mug")]):
        start = tree.add(-1, "prompt", TOKENIZER.encode(read, add_special_tokens=False), text=seen)
        tokens = TOKENIZER.encode("look", add_special_tokens=False)
        floats = {"logprobs": [-1.0] * len(tokens), "entropies": [1.0] * len(tokens)}
        leaves.append(tree.add(start, "action", tokens, sampled=True, turn=turn, text="look", **floats))
    tree.trajectories = [Trajectory(tuple(leaves), turns=2)]
    run.save_trees(1, [tree])
    credit = Credit(
        *np.array([[0, 0], [0, 0], leaves], np.int32), start=np.arange(3),
        advantage=np.array([-1, 2], np.float32), weight=np.array([0, 3], np.float32),
    )  # fmt: skip
    save_credit(credit_path(run.path, 1), credit)
    export(Library([run.path]), tmp_path / "out")
    page = open_page("#/run/run/tree/1/0?colour=advantage", address=(tmp_path / "out" / "index.html").as_uri())
    page.wait_for_selector(".token[data-value]")
    page.locator("details.context summary").click()
    assert page.locator("details.context .prompt").inner_text().strip() == "go take the mug"
    values = "tokens => tokens.map(token => Number(token.dataset.value))"
    assert page.locator(".talk .token").evaluate_all(values) == [-1, 2]
    page.keyboard.press("4")
    assert page.locator(".talk .token").evaluate_all(values) == [0, 3]


def test_a_run_that_cannot_be_read_does_not_hide_the_others(open_page: Open, tmp_path: Path) -> None:
    for name in ("broken", "whole"):
        make_run(tmp_path / name, steps=1)
    (tmp_path / "broken" / "config.toml").write_text("seed = [")
    export(Library([tmp_path]), tmp_path / "out")
    page = open_page(address=(tmp_path / "out" / "index.html").as_uri())
    assert page.locator("tr[data-run]").count() == 2
    page.get_by_role("link", name="broken", exact=True).click()
    page.wait_for_selector(".charts figure")
    assert "1 of ?" in page.locator("dl.facts").inner_text()


def test_a_live_run_grows_in_the_page(open_page: Open, site: Site) -> None:
    page = open_page("#/run/live")
    run = RunFolder.open(site.folder / "live")
    reading = page.locator('figure[data-metric="Success"] .reading')
    assert "97 %" not in reading.inner_text()
    append(run, "train", 3, success(0.97) | {"entropy/action_mean": 0.2})
    sync_api.expect(reading).to_contain_text("97 %", timeout=MILLISECONDS)
    sync_api.expect(page.locator("dl.facts").first).to_contain_text("3 of 9")


def test_a_run_that_is_opened_early_shows_its_warm_start_and_then_its_training(open_page: Open, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0, total_steps=9)
    run.metrics_file.unlink()

    def figures(*titles: str) -> None:
        sync_api.expect(page.locator(".charts .chart-title")).to_have_text(titles, timeout=MILLISECONDS)

    with served(tmp_path) as address:
        page = open_page("#/run/run", address=address)
        sync_api.expect(page.locator(".notice")).to_contain_text("No numbers yet")
        page.locator(".chooser summary").click()
        append(run, "sft", 1, {"loss": 2.0})
        figures("sft: loss")
        append(run, "train", 1, {"success/rate": 0.5, "reward": 1.0})
        figures("Success", "Return of an episode")
        assert page.locator(".chooser").get_attribute("open") is None
        page.locator(".chooser summary").click()
        boxes = page.locator(".metric-list input")
        assert [box.get_attribute("value") for box in boxes.all()] == ["reward", "success/rate", "sft: loss"]
        # What a reader has chosen stays.
        page.get_by_role("checkbox", name="success/rate").uncheck()
        append(run, "train", 2, {"success/rate": 0.5, "reward": 2.0, "turns": 4.0})
        sync_api.expect(page.get_by_role("checkbox", name="turns")).to_be_visible(timeout=MILLISECONDS)
        figures("Return of an episode")


def test_a_run_that_goes_on_later_is_asked_for_again(open_page: Open) -> None:
    page, live = open_page(), False

    def told(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={"runs": [run | {"live": live} for run in answer.json()["runs"]]})

    page.route("**/api/runs", told)
    page.clock.install()
    page.reload()
    ready(page)
    with page.expect_response("**/api/runs"):
        page.clock.run_for(3_000)
    page.clock.run_for(10_000)
    live = True
    page.get_by_role("link", name="forks", exact=True).click()
    page.wait_for_selector(".charts figure")
    with page.expect_response("**/api/runs"):
        page.clock.run_for(3_000)


def test_runs_that_come_and_go_are_shown_as_they_do(open_page: Open) -> None:
    page, there = open_page(), set[str]()

    def told(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={"runs": [run for run in answer.json()["runs"] if run["id"] in there]})

    page.route("**/api/runs", told)
    page.reload()
    sync_api.expect(page.locator(".notice")).to_contain_text("There are no runs here yet")
    for there, heading in (({"live"}, "1 run"), ({"forks", "live"}, "2 runs"), ({"live"}, "1 run"), (set(), None)):
        if heading is None:
            sync_api.expect(page.locator(".notice")).to_be_visible(timeout=MILLISECONDS)
            break
        sync_api.expect(page.locator("h1")).to_have_text(heading, timeout=MILLISECONDS)
        rows = page.locator("tr[data-run]")
        assert [row.get_attribute("data-run") for row in rows.all()] == sorted(there)
        several = len(there) > 1
        assert page.locator("table.single").count() == (not several)
        assert page.get_by_role("link", name="All trajectories").count() == several
        assert page.get_by_role("button", name="Choose").count() == several
        if several:
            page.get_by_label("Compare forks").check()
            page.get_by_label("Compare live").check()
            assert "choose=forks%2Clive" in page.url
        else:
            assert "choose=forks" not in page.url


def test_what_was_asked_for_before_a_view_was_left_leaves_the_next_one_alone(open_page: Open) -> None:
    page, held = open_page("#/run/forks/trajectories"), []

    def go(hash: str, part: str) -> None:
        page.evaluate("hash => { location.hash = hash }", hash)
        page.wait_for_selector(part)

    def hold(pattern: str, hash: str) -> None:
        page.route(pattern, lambda route: held.append(route))
        page.evaluate("hash => { location.hash = hash }", hash)
        while not held:
            page.wait_for_timeout(10)

    def release() -> None:
        while held:
            held.pop().continue_()
        page.wait_for_timeout(300)

    # What is typed last is searched for a moment later.
    page.get_by_label("Search tasks").evaluate("""search => {
      search.value = "mug";
      search.dispatchEvent(new Event("input", { bubbles: true }));
      location.hash = "#/run/forks";
    }""")
    page.wait_for_selector(".charts figure")
    page.wait_for_timeout(300)
    assert page.url.endswith("#/run/forks")
    # Another run's numbers arrive late: the charts that are shown keep their cursor.
    hold("**/api/runs/live/metrics*", "#/run/live")
    go("#/run/forks", ".charts figure .plot svg")
    release()
    page.locator('figure[data-metric="Success"] .plot').focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator('figure[data-metric="Success"] .when').inner_text() == "step 2"
    # Panes that arrive late do not take the address.
    hold("**/api/runs/live/trees/**", "#/compare/forks/live")
    go("#/run/forks", ".tabs")
    release()
    assert page.url.endswith("#/run/forks")


def test_rows_are_those_of_their_runs_while_others_are_read(open_page: Open) -> None:
    """A run goes away while another's index is on its way."""
    page, held = open_page("#/trajectories"), []

    def told(route: Any) -> None:
        answer = route.fetch()
        runs = [run | {"index": "another"} for run in answer.json()["runs"] if run["id"] != "forks"]
        route.fulfill(response=answer, json={"runs": runs})

    rows = int(page.locator(".scroller").get_attribute("aria-rowcount") or 0) - 1
    page.route("**/api/runs/live/index", lambda route: held.append(route))
    page.route("**/api/runs", told)
    while not held:
        page.wait_for_timeout(10)
    page.keyboard.press("End")
    page.wait_for_selector(f"#row-{rows - 1}.active .tag:has-text('many')")
    held.pop().continue_()
    sync_api.expect(page.locator(".scroller")).to_have_attribute("aria-rowcount", str(rows - 20 + 1))


def test_from_turn_to_turn_only_the_mark_in_the_tree_moves(open_page: Open) -> None:
    page = open_page(TREE)
    page.wait_for_selector(".lanes .here")
    page.evaluate("window.was = document.querySelector('.lanes svg')")
    same = "was === document.querySelector('.lanes svg')"
    first = page.locator(".here").bounding_box()
    page.keyboard.press("j")
    second = page.locator(".here").bounding_box()
    assert first and second and second["x"] > first["x"] and second["y"] == first["y"]
    assert page.evaluate(same)
    page.keyboard.press("2")
    assert not page.evaluate(same) and page.locator(".here").bounding_box() == second
    fill = page.locator(".cell").first.get_attribute("fill") or ""
    page.emulate_media(color_scheme="dark")
    sync_api.expect(page.locator(".cell").first).not_to_have_attribute("fill", fill)


def test_finished_runs_are_not_asked_for_again(open_page: Open) -> None:
    page = open_page()
    asked = []

    def finished(route: Any) -> None:
        asked.append(route.request.url)
        answer = route.fetch()
        route.fulfill(response=answer, json={"runs": [run | {"live": False} for run in answer.json()["runs"]]})

    page.route("**/api/runs", finished)
    page.clock.install()
    page.reload()
    ready(page)
    with page.expect_response("**/api/runs"):
        page.clock.run_for(3_000)
    before = len(asked)
    page.clock.run_for(60_000)
    page.evaluate("fetch('mode.js')")  # behind whatever was asked before
    assert len(asked) == before == 2


def test_two_runs_are_compared_with_the_same_turn_side_by_side(open_page: Open) -> None:
    page = open_page()
    for run in ("forks", "live"):
        page.get_by_label(f"Compare {run}", exact=True).check()
    page.get_by_role("button", name="Compare the two chosen runs").click()
    page.wait_for_selector(".pair .turn")
    assert page.locator('figure[data-metric="Success"] .line').count() == 2
    ends = [0, 0]
    assert page.locator(".pair.first").inner_text()
    for pair in page.locator(".pair:not(.first)").all():
        left, right = (pair.locator(f'[data-side="{side}"]') for side in (0, 1))
        tops = [pane.bounding_box() for pane in (left, right)]
        assert tops[0] and tops[1] and tops[0]["y"] == tops[1]["y"]
        turns = [
            pane.locator(".turn").get_attribute("data-turn") for pane in (left, right) if pane.locator(".turn").count()
        ]
        assert len(set(turns)) <= 1
        ends = [end + pane.locator(".ending").count() for end, pane in zip(ends, (left, right), strict=True)]
    assert ends == [1, 1]
    page.locator("summary", has_text="What differs").click()
    settings = page.locator(".settings").inner_text()
    assert "algorithm.name" in settings and '"arpo"' in settings and "seed" not in settings


def test_a_comparison_counts_the_tasks_that_both_were_evaluated_on_and_grows(open_page: Open, tmp_path: Path) -> None:
    names = [f"task-{number}" for number in range(8)]

    def evaluated(run: RunFolder, step: int, tasks: list[str], *won: list[bool]) -> None:
        """What the trainer leaves of an evaluation."""
        played = {
            "won": list(won),
            "turns": [[3] * len(one) for one in won],
            "score": [[1.0] * len(one) for one in won],
        }
        run.save_outcomes(step, "valid_unseen", {"temperature": 0.4, "tasks": tasks, **played})
        append(run, "eval", step, success(0.5) | {"split": "valid_unseen", "success/tasks": len(tasks)})

    a, b, c = (make_run(tmp_path / name, steps=1, total_steps=9) for name in "abc")
    evaluated(a, 1, names[:4], [True], [False], [True, False], [True])
    evaluated(b, 1, names[2:6], [True, True], [False], [True], [True])
    evaluated(c, 1, names[4:], [True], [True], [True], [True])
    with served(tmp_path) as address:
        page = open_page("#/compare/a/c", address=address)
        page.wait_for_selector(".pair .token[data-value]")
        assert page.locator(".paired").count() == 0
        page.goto(f"{address}#/compare/a/b")
        paired, versus = page.locator(".paired"), page.locator(".versus")
        sync_api.expect(paired).to_have_text(
            "Of the same 2 tasks of valid unseen after step 1, "
            "A is better on 1 and B on 1; both win 0 and lose 0 alike."
        )
        page.locator('figure[data-metric="Success"] .plot').focus()
        for run in (a, b):
            append(run, "train", 2, success(0.6))
            evaluated(run, 2, names[:1], [True])
        sync_api.expect(paired).to_have_text(
            "Of the same 1 task of valid unseen after step 2, "
            "A is better on 0 and B on 0; both win 1 and lose 0 alike.",
            timeout=MILLISECONDS,
        )
        sync_api.expect(versus.locator(".faint", has_text="step 2 of 9")).to_have_count(2)
        sync_api.expect(page.locator('figure[data-metric="Success"] .plot')).to_be_focused()


def test_a_comparison_says_which_numbers_neither_run_stored(open_page: Open) -> None:
    page = open_page("#/compare/live/many")
    page.wait_for_selector(".pair .token[data-value]")
    button = page.locator('[data-measure="advantage"]')
    assert button.get_attribute("aria-disabled") == "true"
    assert "Neither run stored" in (button.get_attribute("title") or "")
    assert page.locator('[data-measure="entropy"]').get_attribute("aria-disabled") is None


def test_an_exported_page_works_from_the_disk(open_page: Open, site: Site, tmp_path: Path) -> None:
    export(Library([site.folder / "forks", site.folder / "live"]), tmp_path / "out")
    page = open_page(address=(tmp_path / "out" / "index.html").as_uri())
    page.get_by_role("link", name="forks", exact=True).click()
    page.wait_for_selector(".charts figure")
    page.keyboard.press("b")
    page.wait_for_selector("#row-0")
    page.goto((tmp_path / "out" / "index.html").as_uri() + TREE)
    page.wait_for_selector(".talk .token[data-value]")
    assert said(page) == actions(forked(), 0)
    page.keyboard.press("3")
    page.wait_for_selector('[data-measure="advantage"][aria-pressed="true"]')


def test_the_page_is_files_of_its_own_and_reads_nothing_as_html() -> None:
    folder = Path(create_app.__code__.co_filename).parent / "static"
    text = {path.name: path.read_text() for path in folder.iterdir()}
    assert not [name for name in text if Path(name).suffix not in (".html", ".css", ".js", ".svg")]
    for name, code in text.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code), (
            name
        )
        assert "http" not in code.replace("http://www.w3.org/2000/svg", ""), name
    scripts = re.findall(r'src="([^"]+\.js)"', text["index.html"])
    assert scripts[0] == "mode.js" and set(scripts[1:]) == {name for name in text if name.endswith(".js")}
    assert json.dumps(text["index.html"]).count("<script src=") == len(scripts)

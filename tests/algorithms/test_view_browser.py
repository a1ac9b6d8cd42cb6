"""The page of ``agentropy view`` in a real browser: what it shows is what was saved, and every part can be reached."""

from __future__ import annotations

import itertools
import json
import math
import re
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
)
from tests.algorithms.view_runs import TOKENIZER, append, make_run, success
from tests.algorithms.view_site import MANY, PHONE, TREE, WIDE, Open, Site, ready
from tests.browser import needs_chromium

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium

THEMES = ("light", "dark")
MEASURES = ("entropy", "logprob", "advantage", "weight")


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
    # A view that appears takes the focus, so what comes next waits for it.
    before = page.title()
    page.get_by_role("link", name="Previous task").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.title !== before", arg=before)
    assert "/tree/2/1" in page.url
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

"""The page of ``agentropy view`` while runs come, grow, end and go away, and while one view gives way to the next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agentropy.algorithms.runs import RunFolder
from tests.algorithms.view_runs import append, make_run, success
from tests.algorithms.view_site import MILLISECONDS, TREE, Open, Site, ready, served
from tests.browser import needs_chromium

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium


def until(page: Page, held: list[Any]) -> None:
    """Wait until a request is held back."""
    deadline = time.monotonic() + MILLISECONDS / 1000
    while not held:
        assert time.monotonic() < deadline, "nothing was asked for"
        page.wait_for_timeout(10)


def still(open_page: Open, state: dict[str, bool]) -> tuple[Page, list[str]]:
    """The list of runs, all in ``state``, whose time stands still since it asked again; and what it asked for."""
    page = open_page()
    asked: list[str] = []

    def told(route: Any) -> None:
        asked.append(route.request.url)
        answer = route.fetch()
        route.fulfill(response=answer, json={"runs": [run | state for run in answer.json()["runs"]]})

    page.route("**/api/runs", told)
    page.clock.install()
    page.reload()
    ready(page)
    with page.expect_response("**/api/runs"):
        page.clock.run_for(3_000)
    return page, asked


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
    state = {"live": False}
    page, _ = still(open_page, state)
    page.clock.run_for(10_000)
    state["live"] = True
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
        until(page, held)

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
    until(page, held)
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
    page, asked = still(open_page, {"live": False})
    before = len(asked)
    page.clock.run_for(60_000)
    page.evaluate("fetch('mode.js')")  # behind whatever was asked before
    assert len(asked) == before == 2


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

"""The report of a comparison, written from fabricated runs: its figures, its sentences, and its page."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.benchmarks.comparison.analysis import analyse
from agentropy.benchmarks.comparison.findings import findings, panel_findings
from agentropy.benchmarks.comparison.markdown import escaped, markdown
from agentropy.benchmarks.comparison.page import page
from agentropy.benchmarks.comparison.svg import LABEL_GAP, LINE_SIZE, Series, lines, ticks
from tests.benchmarks.fabricate import MACHINE, RISE, START, fabricate, make_grid

RECIPES = ("grpo", "epo", "arpo", "aepo")


def report_of(folder, grid, seed=1, **model):
    fabricate(grid, folder, np.random.default_rng(seed), **model)
    return analyse(grid, folder, MACHINE)


@pytest.fixture(scope="module")
def effect(tmp_path_factory):
    """Four recipes, of which epo is 15 points above the others, and arpo costs half."""
    grid = make_grid(RECIPES, tasks=128)
    return report_of(
        tmp_path_factory.mktemp("effect"), grid, effect={"epo": 0.15}, seed_sd=0.01, cost={"arpo": 0.5}, spread=0.1
    )


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Two environments with one panel, and recipes that do not differ."""
    grid = make_grid(RECIPES[:3], environments=("alfworld", "textworld"), panels=1, samples=1)
    return report_of(tmp_path_factory.mktemp("alike"), grid, seed=2)


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    return report_of(tmp_path_factory.mktemp("one"), make_grid(RECIPES[:2], seeds=1), effect={"epo": 0.4})


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The baseline and epo are finished on two seeds, arpo on none."""
    grid = make_grid(RECIPES[:3], seeds=3, panels=1)
    left = [f"arpo, alfworld, seed {seed}" for seed in range(3)] + [f"{name}, alfworld, seed 2" for name in RECIPES[:2]]
    return report_of(tmp_path_factory.mktemp("half"), grid, unfinished=left)


@pytest.fixture(scope="module")
def no_baseline(tmp_path_factory):
    grid = make_grid(RECIPES[:3], seeds=2, panels=1)
    left = [f"grpo, alfworld, seed {seed}" for seed in range(2)]
    return report_of(tmp_path_factory.mktemp("bare"), grid, unfinished=left)


@pytest.fixture(scope="module", params=["effect", "alike", "one_seed", "half", "no_baseline"])
def any_report(request):
    return request.getfixturevalue(request.param)


def tables_of(text):
    """Every table of a Markdown text, as lists of rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if "---" not in line]
        for table in found
    ]


def figures_of(cell):
    return [float(number) for number in re.findall(r"[-+]?[\d.]+", cell.replace("−", "-").replace(",", ""))]


def test_fabricated_runs_follow_the_model_that_they_were_drawn_from(effect):
    for panel in effect["environments"][0]["panels"]:
        for entry in panel["recipes"]:
            assert abs(entry["curve"][0]["value"] - START) < 0.12
            end = START + RISE + (0.15 if entry["recipe"] == "epo" else 0)
            assert abs(entry["curve"][-1]["value"] - end) < 0.07
    arpo, grpo = (
        next(each["costs"] for each in effect["environments"][0]["recipes"] if each["recipe"] == name)
        for name in ("arpo", "grpo")
    )
    assert arpo["episodes"] == grpo["episodes"] and arpo["seconds"] < 0.6 * grpo["seconds"]


def test_every_number_of_the_main_table_is_the_reports(effect):
    environment = effect["environments"][0]
    tables = [table for table in tables_of(markdown(effect)) if "q" in table[0]]
    assert len(tables) == len(environment["panels"]) == 2
    costs = {each["recipe"]: each["costs"] for each in environment["recipes"]}
    for panel, (_, *rows) in zip(environment["panels"], tables, strict=True):
        compared = {each["recipe"]: each for each in panel["comparisons"]}
        assert [row[0] for row in rows] == list(RECIPES)
        for entry, (name, final, difference, q, better, area, *spent) in zip(panel["recipes"], rows, strict=True):
            percents = [100 * entry["final"][part] for part in ("value", "low", "high")]
            assert figures_of(final) == pytest.approx(percents, abs=0.0501)
            assert figures_of(area) == pytest.approx([100 * entry["area"]["value"]], abs=0.0501)
            assert [figures_of(cell)[0] for cell in spent] == pytest.approx(
                [costs[name][part] for part in ("env_steps", "tokens", "seconds")], abs=0.501
            )
            if name == "grpo":
                assert (difference, q, better) == ("baseline", "–", "–")
                continue
            against = compared[name]
            assert difference.startswith("**") == against["differs"]
            points = [100 * against["difference"][part] for part in ("value", "low", "high")]
            assert figures_of(difference.strip("*")) == pytest.approx(points, abs=0.0501)
            assert figures_of(q) == pytest.approx([against["q"]], abs=1e-3)
            chances = [against["improvement"][part] for part in ("value", "low", "high")]
            overlapping = chances[1] < chances[2]  # else the bootstrap has no interval, and certainty is not claimed
            assert figures_of(better) == pytest.approx(chances if overlapping else chances[:1], abs=0.00501)


def test_repeated_episodes_of_the_table_are_the_reports(effect):
    table = next(table for table in tables_of(markdown(effect)) if "pass@2, %" in table[0])
    panel = effect["environments"][0]["panels"][0]
    for entry, row in zip(panel["recipes"], table[1:], strict=True):
        cells = dict(zip(table[0], row, strict=True))
        for name, kind in (("@", "pass_at_k"), ("^", "pass_hat_k")):
            for found in entry[kind]:
                if (name, found["k"]) != ("^", 1):  # the same as pass@1
                    assert figures_of(cells[f"pass{name}{found['k']}, %"]) == pytest.approx(
                        [100 * found["value"]], abs=0.0501
                    )
        assert cells["reached by"] == f"{entry['to_target']['reached']} of 5"


def test_an_effect_is_named_and_nothing_else_is(effect):
    sentences = [each.text for each in findings(effect) if "distribution" in each.about]
    assert len(sentences) == 2
    for sentence in sentences:
        assert "epo is above grpo: +" in sentence
        assert "arpo and aepo cannot be told apart from grpo." in sentence
        assert "below" not in sentence and "1 time in 5" in sentence


def test_a_recipe_that_is_worse_is_said_to_be_below(effect):
    panel = copy.deepcopy(effect["environments"][0]["panels"][0])
    entry = next(each for each in panel["comparisons"] if each["recipe"] == "epo")
    entry["difference"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    assert "epo is below grpo: −20.0 [−30.0, −10.0] points" in panel_findings("grpo", panel)[0]


def test_the_smallest_effects_of_a_panel_span_the_sentence(effect):
    panel = effect["environments"][0]["panels"][0]
    sizes = [100 * each["smallest_effect"]["among_all"] for each in panel["comparisons"]]
    told = next(sentence for sentence in panel_findings("grpo", panel) if "1 time in 5" in sentence)
    assert figures_of(re.search(r"difference of (.*) points", told)[1]) == pytest.approx(
        [min(sizes), max(sizes)], abs=0.0501
    )


def test_where_nothing_differs_the_report_says_so(alike):
    told = [each.text for each in findings(alike) if "distribution" in each.about]
    assert len(told) == 2 and all("No recipe can be told apart from grpo." in text for text in told)
    text = markdown(alike)
    assert "is above" not in text and "**+" not in text and "**−" not in text


def test_several_environments_are_summed_up_by_the_interquartile_mean(alike, effect):
    table = tables_of(markdown(alike))[-1]
    for entry, (name, cell) in zip(alike["aggregate"], table[1:], strict=True):
        assert name == entry["recipe"]
        assert figures_of(cell) == pytest.approx([100 * entry[part] for part in ("value", "low", "high")], abs=0.0501)
    assert "interquartile" not in markdown(effect)


def test_costs_that_differ_are_told_with_their_recipes(effect, alike):
    told = next(each.text for each in findings(effect) if each.about == "Costs")
    costs = {each["recipe"]: each["costs"]["tokens"] for each in effect["environments"][0]["recipes"]}
    assert f"{costs['arpo']:,.0f} (arpo) to {max(costs.values()):,.0f}" in told
    equal = copy.deepcopy(alike["environments"][0])
    for recipe in equal["recipes"]:
        recipe["costs"] = equal["recipes"][0]["costs"]
    told = [each.text for each in findings({**alike, "environments": [equal]}) if each.about == "Costs"]
    assert told and "less than a tenth" in told[0]


def test_one_seed_says_that_nothing_can_be_told_however_large_the_difference(one_seed):
    for each in findings(one_seed):
        if "distribution" in each.about:
            assert each.text.startswith("Nothing can be told apart from grpo: with one seed")
    assert "is above" not in markdown(one_seed) and "▲ +" not in page(one_seed)


def test_a_half_finished_grid_names_what_is_missing(half):
    told = next(each.text for each in findings(half) if each.about == "Not finished")
    assert "5 runs of 9" in told
    assert "arpo, alfworld: seeds 0, 1, 2" in told and "grpo, alfworld: seed 2" in told
    assert "4 of 9 runs finished" in markdown(half) and told in markdown(half)


def test_without_its_baseline_nothing_is_compared_and_no_column_pretends_to(no_baseline):
    text = markdown(no_baseline)
    assert "Nothing was compared, since the baseline grpo has no finished run." in text
    assert "P(better) |" not in text and "difference from" not in text
    assert "Dashed: grpo" not in page(no_baseline) and "Differences from" not in page(no_baseline)


def test_alarms_are_told_and_drawn(tmp_path):
    grid = make_grid(RECIPES[:2], seeds=2, panels=1, steps=12, tasks=16)
    report = report_of(tmp_path, grid, last_entropy={"epo": 0.02})
    told = next(each.text for each in findings(report) if each.about == "Alarms")
    assert told == "entropy collapse in 2 of 2 runs of epo."
    assert page(report).count('class="alarm"') == 2


def test_a_law_of_success_that_never_moved_is_not_claimed(effect):
    report = copy.deepcopy(effect)
    for recipe in report["environments"][0]["recipes"]:
        recipe["law"] |= {"a": 0.0, "r2": 1.0}
    table = next(table for table in tables_of(markdown(report)) if "R²" in table[0])
    assert all(row[table[0].index("R²")] == "–" for row in table[1:])
    assert "The law of entropy" not in page(report)


def test_columns_of_the_raw_text_stand_under_each_other(any_report):
    for table in re.findall(r"(?:^\|.*\|\n)+", markdown(any_report), re.MULTILINE):
        places = {tuple(found.start() for found in re.finditer(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(places) == 1
        rule = table.splitlines()[1]
        assert all(re.fullmatch(r"-{2,}[-:]", cell.strip()) for cell in rule.strip("|").split("|"))


class Reader(HTMLParser):
    """Collects what a browser would see: tags with their attributes, and whether all of them are closed."""

    VOID = ("meta", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing_outside(any_report):
    text = page(any_report)
    seen = Reader(text)
    assert not seen.open
    tags = {tag for tag, _ in seen.tags}
    assert not tags & {"script", "img", "iframe", "object", "image", "use", "video", "form"}
    for _, attributes in seen.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href", "srcset") or value.startswith(("#", "data:,"))
    assert "url(" not in text and "@import" not in text
    policy = next(found for tag, found in seen.tags if tag == "meta" and "http-equiv" in found)
    assert policy["content"].startswith("default-src 'none'")


def test_links_of_the_page_lead_somewhere(any_report):
    seen = Reader(page(any_report))
    places = {found["id"] for _, found in seen.tags if "id" in found}
    links = {found["href"].removeprefix("#") for tag, found in seen.tags if tag == "a"}
    assert links and links <= places


def test_every_figure_has_a_name_and_a_caption_and_finite_coordinates(any_report):
    text = page(any_report)
    seen = Reader(text)
    drawings = [found for tag, found in seen.tags if tag == "svg"]
    assert len(drawings) == text.count("<figcaption>") >= 4
    assert all(re.search(r"\d", found["aria-label"]) or "told apart" in found["aria-label"] for found in drawings)
    shapes = re.findall(r' (?:d|x|y|cx|cy|x1)="([^"]*)"', text)
    assert shapes and not re.search("nan|inf", " ".join(shapes))


def test_all_figures_of_seven_recipes_fit_in_a_small_page(tmp_path):
    names = ("grpo", "gigpo", "epo (paper)", "epo (corridor)", "arpo", "aepo", "empg")
    grid = make_grid(names, seeds=2, tasks=8, steps=40, every=4)
    assert len(page(report_of(tmp_path, grid)).encode()) < 1_500_000


HOSTILE = '</td><script>alert("1")</script>|`x` [a](http://b) **c** & \\'


def renamed(value, old, new):
    """``value`` with every string ``old`` in it replaced."""
    if isinstance(value, dict):
        return {key: renamed(each, old, new) for key, each in value.items()}
    if isinstance(value, list):
        return [renamed(each, old, new) for each in value]
    return new if value == old else value


def test_labels_cannot_become_markup(effect):
    report = renamed(renamed(effect, "epo", HOSTILE), "alfworld", HOSTILE)
    report["machine"]["cpu"] = report["grid"] = HOSTILE
    html = page(report)
    seen = Reader(html)
    assert not seen.open and "script" not in {tag for tag, _ in seen.tags}
    assert html.count("&lt;script&gt;") > 10
    shown = markdown(report)
    assert "<script" not in shown and "](http" not in shown
    for table in re.findall(r"(?:^\|.*\|\n)+", shown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@given(st.text())
def test_escaped_text_stays_on_one_line_and_opens_nothing(text):
    shown = escaped(text)
    assert "\n" not in shown and "\r" not in shown
    assert not re.search(r"<[A-Za-z/!?]", shown)
    assert not re.search(r"[\\`*|]", re.sub(r"\\[\\`*|(]", "", shown))


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_few_round_and_within_the_range(low, span, most):
    found = ticks(low, low + span, most)
    assert len(found) <= most
    slack = 1e-6 * span + 1e-9
    assert all(low - slack <= tick <= low + span + slack for tick in found)
    gaps = np.diff(found)
    assert len(found) < 3 or np.allclose(gaps, gaps[0], rtol=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_labels_of_curves_never_cover_each_other(values):
    series = [Series("own", [0, 1], [0.5, value], label=str(number)) for number, value in enumerate(values)]
    drawing = lines("t", series, (0, 1), (0, 1), x_label="x", y_format=str)
    places = sorted(float(y) for y in re.findall(r'class="end own" x="[^"]*" y="([^"]*)"', drawing))
    assert len(places) == len(values)
    assert all(gap > LABEL_GAP - 0.2 for gap in np.diff(places))
    assert places[-1] < LINE_SIZE[1]


@pytest.mark.parametrize("name", ["words", "svg", "markdown"])
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(f"agentropy.benchmarks.comparison.{name}")
    result = doctest.testmod(module)
    assert result.attempted and not result.failed

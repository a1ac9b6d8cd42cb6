"""From run folders to figures: what is read, in which order it stands, and what stands for what is missing."""

import json
import math

import numpy as np
import pytest

from agentropy.benchmarks.comparison.analysis import analyse
from agentropy.benchmarks.comparison.grid import cells, starts
from agentropy.benchmarks.comparison.markdown import markdown
from agentropy.benchmarks.comparison.page import page
from agentropy.benchmarks.comparison.results import read_evaluations
from agentropy.errors import UsageError
from tests.benchmarks.fabricate import MACHINE, fabricate, make_grid

SPLIT = "valid_unseen"


def evaluation(cell, step, split=SPLIT):
    return cell.folder / "evaluations" / f"step-{step:06d}-{split}.json"


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def win(path, share):
    """Let every episode of the first ``share`` of tasks win, and no other."""

    def change(data):
        count = len(data["won"])
        return data | {"won": [[index < share * count] * len(won) for index, won in enumerate(data["won"])]}

    rewrite(path, change)


@pytest.fixture
def three(tmp_path):
    """Two recipes on three seeds, evaluated after steps 0, 2, 4 and 6."""
    grid = make_grid(("grpo", "epo"), seeds=3, panels=1, tasks=8, target=0.9)
    fabricate(grid, tmp_path, np.random.default_rng(0))
    return grid, tmp_path


def panel_of(report, recipe):
    (panel,) = report["environments"][0]["panels"]
    return panel, next(each for each in panel["recipes"] if each["recipe"] == recipe)


@pytest.mark.parametrize("reaching", [0, 1, 2, 3])
def test_the_cost_of_a_target_counts_the_seeds_that_never_reach_it(three, reaching):
    """One lucky seed of three is no cost that a run can be expected to have."""
    grid, folder = three
    spent = []
    for cell in [each for each in cells(grid, folder) if each.recipe.title == "epo"]:
        step = 2 * (cell.seed + 1)
        for each in (0, 2, 4, 6):
            if each:
                win(evaluation(cell, each), 1.0 if cell.seed < reaching and each >= step else 0.5)
        rows = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
        spent.append(sum(row["env/steps"] for row in rows if row["phase"] == "train" and row["step"] <= step))
    _, entry = panel_of(analyse(grid, folder, MACHINE), "epo")
    expected = sorted([*spent[:reaching], *[math.inf] * (3 - reaching)])[1]
    assert entry["to_target"] == {
        "reached": reaching,
        "seeds": 3,
        "env_steps": pytest.approx(expected) if math.isfinite(expected) else None,
    }


def test_a_target_above_a_good_start_can_be_reached(tmp_path):
    grid = make_grid(("grpo", "epo"), seeds=2, panels=1, tasks=8)
    fabricate(grid, tmp_path, np.random.default_rng(0))
    (start,) = starts(grid, tmp_path)
    win(evaluation(start, 0), 1.0)
    panel, _ = panel_of(analyse(grid, tmp_path, MACHINE), "grpo")
    assert panel["target"] == 1.0


def test_recipes_stand_in_the_order_of_the_grid(tmp_path):
    """Whichever was finished first."""
    grid = make_grid(("grpo", "epo", "arpo"), seeds=2, panels=1, tasks=8)
    left = ["grpo, alfworld, seed 0", "epo, alfworld, seed 0"]
    fabricate(grid, tmp_path, np.random.default_rng(0), unfinished=left)
    report = analyse(grid, tmp_path, MACHINE)
    (environment,) = report["environments"]
    for entries in (environment["recipes"], environment["panels"][0]["recipes"]):
        assert [each["recipe"] for each in entries] == ["grpo", "epo", "arpo"]


def test_the_area_under_uneven_evaluations_weighs_them_by_steps(tmp_path):
    """After steps 0, 4 and 5: trapezoids of four steps and of one."""
    grid = make_grid(("grpo", "epo"), seeds=2, panels=1, tasks=8, steps=5, every=4)
    fabricate(grid, tmp_path, np.random.default_rng(0))
    (start,) = starts(grid, tmp_path)
    win(evaluation(start, 0), 0.0)
    for cell in cells(grid, tmp_path):
        win(evaluation(cell, 4), 0.5)
        win(evaluation(cell, 5), 1.0)
    panel, entry = panel_of(analyse(grid, tmp_path, MACHINE), "epo")
    assert panel["steps"] == [0, 4, 5]
    assert entry["area"]["value"] == pytest.approx((4 * 0.25 + 1 * 0.75) / 5)
    assert entry["final"]["value"] == pytest.approx(0.75)


def test_runs_that_were_evaluated_otherwise_are_named(three):
    grid, folder = three
    first, *_, last = cells(grid, folder)
    evaluation(last, 4).unlink()
    with pytest.raises(UsageError) as caught:
        analyse(grid, folder, MACHINE)
    told = str(caught.value)
    assert str(last.folder) in told and str(first.folder) in told and SPLIT in told
    assert "array" not in told and len(told) < 600


def test_a_split_is_not_taken_for_one_that_ends_alike(tmp_path):
    (tmp_path / "evaluations").mkdir()
    for split in ("test", "hard-test", "test[1]"):
        found = {"step": 1, "tasks": [split], "won": [[True]], "turns": [[3]]}
        (tmp_path / "evaluations" / f"step-000001-{split}.json").write_text(json.dumps(found))
    for split in ("test", "hard-test", "test[1]"):
        assert [each.tasks for each in read_evaluations(tmp_path, split)] == [(split,)]


def test_a_step_whose_entropy_is_unknown_is_left_out(three):
    grid, folder = three
    metrics = cells(grid, folder)[0].folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in lines:
        if (row["phase"], row["step"]) == ("train", 3):
            row["entropy/action_mean"] = None
    metrics.write_text("".join(json.dumps(row) + "\n" for row in lines))
    report = analyse(grid, folder, MACHINE)
    json.dumps(report, allow_nan=False)
    grpo, epo = report["environments"][0]["recipes"]
    assert [each["step"] for each in grpo["entropy"]] == [each["step"] for each in grpo["success"]] == [1, 2, 4, 5, 6]
    assert len(epo["entropy"]) == 6


def test_a_run_without_entropies_costs_no_report(three):
    grid, folder = three
    for cell in cells(grid, folder)[:1]:
        metrics = cell.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines = [row | ({"entropy/action_mean": None} if row["phase"] == "train" else {}) for row in lines]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in lines))
    report = analyse(grid, folder, MACHINE)
    grpo, epo = report["environments"][0]["recipes"]
    assert not grpo["entropy"] and epo["entropy"]
    assert "Entropy while training" in page(report)
    for each in (grpo, epo):
        each["entropy"] = each["success"] = []
    assert "Entropy while training" not in page(report)


def test_what_has_no_test_is_not_corrected_for(tmp_path):
    """While a grid is half finished, comparisons of one seed make the others no less sure."""
    grid = make_grid(("grpo", "epo", "arpo", "aepo"), seeds=3, panels=1, tasks=16)
    single = [f"{name}, alfworld, seed {seed}" for name in ("arpo", "aepo") for seed in (1, 2)]
    fabricate(grid, tmp_path, np.random.default_rng(0), unfinished=single)
    (panel,) = analyse(grid, tmp_path, MACHINE)["environments"][0]["panels"]
    epo, arpo, aepo = panel["comparisons"]
    assert epo["q"] == epo["p"] and epo["smallest_effect"]["alone"] == epo["smallest_effect"]["among_all"] > 0
    for each in (arpo, aepo):
        assert (each["seeds"], each["q"], each["differs"]) == (1, 1.0, False)


@pytest.mark.parametrize("per", ["environment", "seed"])
def test_a_report_says_where_all_seeds_share_a_start(tmp_path, per):
    grid = make_grid(("grpo", "epo"), seeds=2, panels=1, tasks=8, warm_start={"per": per})
    fabricate(grid, tmp_path, np.random.default_rng(0))
    told = markdown(analyse(grid, tmp_path, MACHINE))
    assert ("what another start would have given" in told) == (per == "environment")

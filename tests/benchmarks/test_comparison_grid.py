"""A grid says at once what is wrong with it, and spans runs that differ in nothing but what they compare."""

import re
from pathlib import Path

import pytest

from agentropy.benchmarks.comparison.command import check_recipes
from agentropy.benchmarks.comparison.grid import cells, load_grid, starts, to_toml
from agentropy.cli import main
from agentropy.config import SmallModelConfig
from agentropy.errors import UsageError

ROOT = Path(__file__).parents[2]
FILES = ("laptop", "gpu", "cluster")

GRID = """
name = "small"
seeds = [3, 5]
baseline = "grpo"
options = {aggregation = "turn-mean", clip_high = 0.3}
[run.train]
steps = 2
lr = 1e-4
[[environment]]
id = "alfworld"
in_distribution = "valid_seen"
out_of_distribution = "valid_unseen"
[[recipe]]
name = "grpo"
[[recipe]]
name = "epo"
preset = "corridor"
options = {clip_high = 0.2}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def test_cells_differ_in_seed_and_recipe_alone(grid, tmp_path):
    loaded = load_grid(grid)
    runs = cells(loaded, tmp_path)
    assert [cell.title.rpartition(",")[2].strip() for cell in runs] == ["seed 3"] * 2 + ["seed 5"] * 2

    def common(cell):
        return cell.config.model_dump(exclude={"seed", "run_dir", "algorithm"})

    assert all(common(cell) == common(runs[0]) for cell in runs)
    assert len({cell.folder for cell in runs}) == 4
    assert runs[0].config.algorithm.overrides == {"aggregation": "turn-mean", "clip_high": 0.3}
    assert runs[1].config.algorithm.overrides == {"aggregation": "turn-mean", "clip_high": 0.2}
    assert (runs[1].config.algorithm.name, runs[1].config.algorithm.preset) == ("epo", "corridor")
    config = runs[0].config
    assert (config.env.eval_split, config.eval.also) == ("valid_unseen", ["valid_seen"])
    assert config.sft.tasks == 0 and not config.eval.before


def test_cells_begin_from_the_one_warm_start(grid, tmp_path):
    loaded = load_grid(grid)
    (start,) = starts(loaded, tmp_path)
    assert (start.config.train.steps, start.config.eval.before, start.config.sft.tasks > 0) == (0, True, True)
    for cell in cells(loaded, tmp_path):
        assert isinstance(cell.config.model, SmallModelConfig)
        assert cell.config.model.start == str(start.folder)


def test_a_start_for_each_seed(grid, tmp_path):
    loaded = load_grid(grid, ["warm_start.per=seed"])
    assert [start.seed for start in starts(loaded, tmp_path)] == [3, 5]
    assert [cell.config.model.start for cell in cells(loaded, tmp_path)[::2]] == [
        str(start.folder) for start in starts(loaded, tmp_path)
    ]


def test_no_start_evaluates_each_run_before_its_first_step(grid, tmp_path):
    loaded = load_grid(grid, ["warm_start.per=none", "run.sft.tasks=0"])
    assert starts(loaded, tmp_path) == []
    assert all(cell.config.eval.before for cell in cells(loaded, tmp_path))


def test_a_pretrained_model_begins_from_the_checkpoint_of_the_start(grid, tmp_path):
    loaded = load_grid(grid, ["run.model.path=some/model"])
    (start,) = starts(loaded, tmp_path)
    assert start.config.model.path == "some/model"
    assert {cell.config.model.path for cell in cells(loaded, tmp_path)} == {str(start.checkpoint)}


def test_the_resolved_grid_reads_back(grid, tmp_path):
    again = tmp_path / "again.toml"
    again.write_text(to_toml(load_grid(grid)))
    assert load_grid(again) == load_grid(grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("baselin=x", "unknown option 'baselin'; did you mean 'baseline'?"),
        ("baseline=grp", "baseline: there is no recipe called 'grp'; did you mean 'grpo'?"),
        ("seeds=[1, 1]", "names a seed twice"),
        ("seeds=[]", "seeds"),
        ("resources.job=2", "unknown option 'resources.job'; did you mean 'jobs'?"),
        ('recipe=[{name="grpo"}, {name="grpo"}]', "2 entries of [[recipe]] are called 'grpo'"),
        ('recipe=[{name="grpo"}, {name="epo", label="GRPO"}]', "would share a folder"),
        ('recipe=[{nam="grpo"}]', "unknown option 'recipe.0.nam'; did you mean 'name'?"),
        ('environment=[{id="alfworld"}]', "names no split"),
    ],
)
def test_a_wrong_grid_is_refused(grid, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_grid(grid, [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.train.step=3", "unknown option 'train.step'; did you mean 'steps'?"),
        ("options.clip_hig=0.1", "grpo, alfworld, seed 3: recipe 'grpo' has no option 'clip_hig'"),
        ('recipe=[{name="grpo"}, {name="eop"}]', "unknown recipe 'eop'; did you mean 'epo'?"),
        ('recipe=[{name="grpo"}, {name="epo", preset="papr"}]', "has no preset 'papr'; did you mean 'paper'?"),
    ],
)
def test_a_wrong_run_is_found_before_any_starts(grid, tmp_path, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        check_recipes(cells(load_grid(grid, [change]), tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_the_grids_that_ship_start(name, tmp_path, capsys):
    path = str(ROOT / "benchmarks" / f"{name}.toml")
    assert main(["bench", "algorithms", "--config", path, "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    assert "epo (corridor)" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_the_laptop_grid_is_the_one_that_was_promised():
    grid = load_grid(ROOT / "benchmarks" / "laptop.toml")
    titles = {entry.title for entry in grid.recipe}
    assert titles == {"grpo", "gigpo", "epo (paper)", "epo (corridor)", "arpo", "aepo", "empg"}
    assert len(grid.seeds) == 5
    config = cells(grid, Path("x"))[0].config
    assert config.eval.tasks is not None and config.eval.tasks >= 128
    assert {config.env.eval_split, *config.eval.also} == {"valid_seen", "valid_unseen"}

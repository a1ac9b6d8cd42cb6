"""A grid says at once what is wrong with it, and spans runs that differ in nothing but what they compare."""

import importlib
import inspect
import re
from pathlib import Path

import gymnasium
import pytest

import agentropy.envs  # noqa: F401 - registers them
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.agents.engines.vllm_engine import VLLMEngine
from agentropy.benchmarks.comparison.cell import write_work
from agentropy.benchmarks.comparison.command import check_recipes
from agentropy.benchmarks.comparison.grid import cells, load_grid, starts, to_toml
from agentropy.cli import main
from agentropy.config import SmallModelConfig, load_config
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


def test_cells_whose_names_run_together_have_files_of_their_own(grid, tmp_path):
    """Of environment ``a`` and recipe ``b-c``, and of ``a-b`` and ``c``."""
    environments = ", ".join(f'{{id="alfworld", label="{name}", in_distribution="train"}}' for name in ("a", "a-b"))
    recipes = '{name="grpo", label="b-c"}, {name="epo", label="c"}'
    loaded = load_grid(grid, [f"environment=[{environments}]", f"recipe=[{recipes}]", "baseline=c"])
    found = [*starts(loaded, tmp_path), *cells(loaded, tmp_path)]
    work = [write_work(cell, tmp_path) for cell in found]
    for cell, each in zip(found, work, strict=True):
        assert load_config(each.config) == cell.config
    assert len({each.log for each in work}) == len({each.folder for each in work}) == len(found)


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
        ('environment=[{id="alfworld", in_distribution="train", out_of_distribution="train"}]', "names 'train' twice"),
        ('recipe=[{name="grpo"}, {name="epo", label=".."}]', "no folder can be called after '..'"),
        ('recipe=[{name="grpo"}, {name="epo", label="方法"}]', "no folder can be called after '方法'"),
        ("run.seed=3", "run: 'seed' is for the grid to decide; expected it in seeds"),
        ("run.algorithm.name=epo", "run: 'algorithm' is for the grid to decide"),
        ("warm_start.run.run_dir=x", "warm_start.run: 'run_dir' is for the grid to decide; expected it in --out"),
        ('recipe=[{name="grpo", run={eval={also=["train"]}}}]', "run of 'grpo': 'eval.also' is for the grid"),
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
        ("run.train.steps=0", "grpo, alfworld, seed 3: train.steps is 0, so there is nothing to compare"),
        (
            'recipe=[{name="grpo"}, {name="epo", run={eval={every=2}}}]',
            "epo, alfworld, seed 3: eval.every is 2, and 0 for grpo, alfworld, seed 3",
        ),
        (
            'recipe=[{name="grpo"}, {name="epo", run={train={steps=3}}}]',
            "epo, alfworld, seed 3: train.steps is 3, and 2 for grpo, alfworld, seed 3",
        ),
        (
            'recipe=[{name="grpo"}, {name="epo", run={env={kwargs={max_turns=9}}}}]',
            "epo, alfworld, seed 3: env.kwargs.max_turns is 9, and None for grpo, alfworld, seed 3",
        ),
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


@pytest.mark.parametrize("name", FILES)
def test_the_grids_that_ship_ask_for_what_there_is(name, tmp_path):
    """A dry run builds neither engines nor environments, so what they would refuse is asked here."""
    grid = load_grid(name)
    for cell in [*starts(grid, tmp_path), *cells(grid, tmp_path)]:
        config = cell.config
        module, _, kind = gymnasium.spec(config.env.id).entry_point.partition(":")
        world = getattr(importlib.import_module(module), kind)
        assert {config.env.train_split, config.env.eval_split, *config.eval.also} <= set(world.splits)
        assert hasattr(world, "snapshot") and hasattr(world, "restore")  # arpo and aepo fork
        engine = VLLMEngine if config.engine.type == "vllm" else TorchEngine
        assert config.engine.options.keys() <= inspect.signature(engine).parameters.keys()
        longest = config.engine.options.get("max_model_len", config.agent.max_context_tokens)
        assert longest >= config.agent.max_context_tokens > config.agent.max_action_tokens
        assert (config.env.workers or 0) <= grid.resources.cpus or grid.resources.jobs == 1


def test_the_laptop_grid_is_the_one_that_was_promised():
    grid = load_grid(ROOT / "benchmarks" / "laptop.toml")
    titles = {entry.title for entry in grid.recipe}
    assert titles == {"grpo", "gigpo", "epo (paper)", "epo (corridor)", "arpo", "aepo", "empg"}
    assert len(grid.seeds) == 5
    config = cells(grid, Path("x"))[0].config
    assert config.eval.tasks is not None and config.eval.tasks >= 128
    assert {config.env.eval_split, *config.eval.also} == {"valid_seen", "valid_unseen"}

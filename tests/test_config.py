"""The configuration: one schema, TOML in and out, and errors that name the nearest key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.config import PretrainedModelConfig, RunConfig, SmallModelConfig, load_config, to_toml
from agentropy.errors import UsageError
from agentropy.registry import ENV_IDS


def test_defaults_are_valid_and_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(RunConfig()))
    assert load_config(path) == RunConfig()


@given(
    data=st.dictionaries(
        st.text(min_size=1), st.one_of(st.text(), st.integers(-(2**53), 2**53), st.booleans(), st.lists(st.text()))
    ),
    run_dir=st.text(min_size=1),
)
def test_any_values_survive_a_round_trip(data: dict[str, object], run_dir: str) -> None:
    config = RunConfig.model_validate({"env": {"kwargs": data}, "run_dir": run_dir})
    assert RunConfig.model_validate(tomllib.loads(to_toml(config))) == config


def test_later_overrides_win_and_values_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\n[train]\nsteps = 5\nlr = 0.5\n")
    config = load_config(path, ["train.steps=6", "train.steps=7", "env.kwargs.source=pack", "algorithm.name=grpo"])
    assert (config.seed, config.train.steps, config.train.lr) == (1, 7, 0.5)
    assert config.env.kwargs == {"source": "pack"}
    assert config.algorithm.name == "grpo"


def test_the_model_section_is_small_unless_it_names_a_path() -> None:
    assert isinstance(load_config(None, ["model.hidden=64"]).model, SmallModelConfig)
    assert isinstance(load_config(None, ["model.path=some/model"]).model, PretrainedModelConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "unknown option 'train.stps'; did you mean 'steps'"),
        ("trian.steps=3", "unknown option 'trian'; did you mean 'train'"),
        ("model.hiden=64", "unknown option 'model.hiden'; did you mean 'hidden'"),
        ("model.type=smal", "expected 'small' or 'pretrained'"),
        ("train.lr=-1", "option 'train.lr': input should be greater than 0, not -1"),
        ("train=3", "option 'train'"),
        ("seed.x.y=3", "option 'seed'"),
        ("steps", "is not an override; expected section.key=value"),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_the_way_out(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(broken)


def test_what_suits_alfworld_is_no_argument_of_other_worlds() -> None:
    assert load_config(None).env.train_kwargs == {
        "max_turns": 30,
        "invalid_penalty": 0.05,
        "progress_reward": 2.0,
        "reward_scale": 0.5,
    }
    assert load_config(None, ["env.train_kwargs={}"]).env.train_kwargs == {}
    other = load_config(None, ["env.id=my_worlds:Echo-v0"])
    assert other.env.train_kwargs == {} and other.sft.expert == {}
    assert (other.sft.noise, other.sft.slips) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["scienceworld", "ScienceWorld", "agentropy/ScienceWorld-v0"])
def test_worlds_of_this_package_go_by_their_short_names(name: str) -> None:
    config = load_config(None, [f"env.id={name}"])
    assert config.env.id == "agentropy/ScienceWorld-v0" and config.env.eval_split == "dev"
    assert load_config(None, [f"env.id={name}", "env.eval_split=test"]).env.eval_split == "test"


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    for world in ENV_IDS:
        config = load_config(None, [f"env.id={world}", "sft.noise=0.3"])
        (tmp_path / "config.toml").write_text(to_toml(config))
        assert load_config(tmp_path / "config.toml") == config


def test_none_among_the_overrides_of_a_recipe_survives_the_file(tmp_path):
    config = RunConfig(algorithm={"name": "grpo", "overrides": {"dual_clip": None, "clip_high": 0.3}})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path).algorithm.overrides == {"dual_clip": "none", "clip_high": 0.3}


def test_a_run_sets_options_that_suit_its_world_unless_a_preset_or_the_user_says():
    def overrides(*texts):
        return load_config(None, texts).algorithm.overrides

    assert overrides()["turn_credit"] == 4.0
    assert overrides("algorithm.name=gigpo+empg") == {"aggregation": "turn-mean"}
    assert overrides("algorithm.name=ppo") == {} == overrides("algorithm.preset=paper")
    assert overrides("algorithm.overrides.alpha=1") == {"alpha": 1}

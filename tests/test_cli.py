"""The command line: wrong input is one sentence before anything expensive starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.runs import RunFolder
from agentropy.cli import main
from agentropy.config import load_config


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentropy", *arguments], capture_output=True, text=True, input=stdin, timeout=300
    )


def test_a_dry_run_prints_a_configuration_that_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--algorithm", "grpo", "--steps", "7", "--set", "train.lr=0.01", "--dry-run"]) == 0
    path = tmp_path / "run.toml"
    path.write_text(capsys.readouterr().out)
    config = load_config(path)
    assert (config.algorithm.name, config.train.steps, config.train.lr) == ("grpo", 7, 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--set", "train.stps=3"], "did you mean 'steps'"),
        (["train", "--algorithm", "egpo"], "did you mean 'epo'"),
        (["train", "--algorithm", "epo", "--preset", "papr"], "did you mean 'paper'"),
        (["train", "--set", "algorithm.overrides.alfa=1"], "did you mean 'alpha'"),
        (["train", "--env", "agentropy/ALFWord-v0"], "did you mean 'agentropy/ALFWorld-v0'"),
        (["train", "--env", "ALF world"], "ALF world"),
        (["train", "--set", "env.kwargs.num_games.trian=9"], "did you mean 'train'"),
        (["train", "--set", "env.train_split=trian"], "did you mean 'train'"),
        (["train", "--set", "env.kwargs.sauce=1"], "sauce"),
        (["train", "--source", "pack", "--data", "/nowhere/games.jsonl.xz"], "/nowhere/games.jsonl.xz"),
        (["train", "--model", "/nowhere/model"], "/nowhere/model"),
        (["train", "--resume", "/nowhere"], "holds no run"),
        (["train", "--resume", "/nowhere", "--steps", "3"], "--resume takes no other options"),
        (["eval", "/nowhere", "--split", "valid_seen"], "/nowhere"),
        (["eval", "/nowhere", "--split", "valid_sen"], "did you mean 'valid_seen'"),
        (["play", "--agent", "expert", "--task", "pick_nothing"], "pick_nothing"),
        (["data", "pack", "/nowhere", "/nowhere/out"], "/nowhere"),
        (["data", "pack", "/nowhere", "/nowhere/games.zip"], "ends in .jsonl.xz or .jsonl.gz"),
        (["recipes", "show", "grop"], "did you mean 'grpo'"),
        (["view", "/nowhere"], "'/nowhere' holds no run"),
        (["view", "/nowhere", "--text"], "holds no run"),
        (["view", "/nowhere", "/nowhere", "--text"], "--text draws a tree of one run, and 2 folders were named"),
        (["view", "/nowhere", "--step", "3"], "--step goes with --text"),
        (["view", "/nowhere", "--text", "--export", "page"], "choose one of them"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing_behind(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("agentropy: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_split_is_a_required_word() -> None:
    done = run("eval", "somewhere")
    assert done.returncode == 2 and "--split" in done.stderr


def test_the_expert_wins_in_the_terminal() -> None:
    done = run("play", "--agent", "expert", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert "won after" in done.stdout and "Your task is to:" in done.stdout


def test_a_person_can_play_ask_for_commands_and_leave() -> None:
    done = run("play", stdin="?\nlook\nfly away\n")
    assert done.returncode == 0, done.stderr
    assert "Nothing happens." in done.stdout and "left the game" in done.stdout


def test_recipes_are_listed_and_shown() -> None:
    listed = run("recipes")
    assert {"grpo", "epo"} <= {line.split()[0] for line in listed.stdout.splitlines()}
    shown = run("recipes", "show", "epo").stdout
    assert "2509.22576" in shown and "aggregation" in shown and "entropy_coef=0.001" in shown


def test_a_tree_of_a_run_is_drawn_without_colours_where_nobody_looks(tmp_path: Path) -> None:
    tree = Tree("put-mug-on-desk", "train")
    prompt = tree.add(-1, "prompt", [1, 2], text="A room.")
    for command in ("go to desk", "look"):
        floats = {"logprobs": [-1.0], "entropies": [0.25]}
        leaf = tree.add(prompt, "action", [3], sampled=True, turn=0, text=command, **floats)
        tree.trajectories.append(Trajectory((leaf,)))
    folder = RunFolder(tmp_path, load_config())
    folder.make()
    folder.save_trees(3, [tree])
    done = run("view", str(tmp_path), "--text", "--step", "3", "--task", "put-mug-on-desk", "--depth", "1")
    assert done.returncode == 0, done.stderr
    assert "put-mug-on-desk  train, step 3, tree 0 of 1" in done.stdout and "│ go to desk" in done.stdout
    assert "\x1b" not in done.stdout
    wrong = run("view", str(tmp_path), "--text", "--task", "put-mug-on-dsk")
    assert wrong.returncode == 2 and "did you mean 'put-mug-on-desk'" in wrong.stderr


def test_a_dataset_is_packed_and_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "json_2.1.1" / "train" / "pick_and_place_simple-Mug-None-Desk-301" / "trial"
    folder.mkdir(parents=True)
    game = {
        "pddl_domain": "(define (domain alfred))",
        "grammar": "Your task is to: put a mug in desk.",
        "pddl_problem": "(define (problem mug))",
        "walkthrough": ["look"],
        "solvable": True,
    }
    (folder / "game.tw-pddl").write_text(json.dumps(game))
    assert main(["data", "pack", str(tmp_path), str(tmp_path / "pack")]) == 0
    assert capsys.readouterr().out.startswith("train: 1 games in ")
    assert (tmp_path / "pack" / "games.jsonl.xz").is_file()


def test_a_model_that_no_run_made_gets_the_defaults_of_pretrained_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "org/model", "--env", "search", "--split", "test", "--dry-run"]) == 0
    evaluated = capsys.readouterr().out
    assert 'path = "org/model"' in evaluated and "max_action_tokens = 512" in evaluated
    assert main(["play", "--env", "search", "--dry-run"]) == 0
    assert "max_action_tokens = 64" in capsys.readouterr().out


def test_flags_are_text_also_where_they_look_like_dates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run-dir", "2026-01-01", "--dry-run"]) == 0
    assert 'run_dir = "2026-01-01"' in capsys.readouterr().out


def test_what_can_be_served_is_listed_only_where_it_is_asked_for() -> None:
    done = run("serve", "--help")
    assert done.returncode == 0 and "envs" in done.stdout and "retriever" in done.stdout
    assert "--max-sessions" in run("serve", "envs", "--help").stdout
    assert "--passages" in run("serve", "retriever", "--help").stdout

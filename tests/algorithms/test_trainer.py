"""Whole runs on the real ALFWorld: repeatable, resumable after SIGKILL, and readable afterwards."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentropy.agents.tree import Tree
from agentropy.algorithms.checkpoint import latest_checkpoint
from agentropy.algorithms.report import write_report
from agentropy.algorithms.runs import TIME_PREFIX, RunFolder

TINY = """
seed = 3
device = "cpu"
threads = 1

[env.kwargs]
max_turns = 6

[env]
workers = 2

[model]
hidden = 32
layers = 1
heads = 2
intermediate = 32

[sft]
tasks = 6
episodes_per_task = 2
epochs = 2
batch_episodes = 4

[train]
steps = 3
tasks_per_step = 3
group_size = 2
keep_checkpoints = 1

[eval]
tasks = 6
every = 2
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentropy", *arguments]


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = folder.with_suffix(".toml")
    config.write_text(TINY)
    return subprocess.run(
        command("train", "--config", str(config), "--run-dir", str(folder), *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the figures that depend on the machine's speed."""
    return [
        {key: value for key, value in row.items() if not key.startswith(TIME_PREFIX)}
        for row in RunFolder.open(folder).rows()
    ]


def trajectories(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "trajectories").iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, train(folder).stdout


def test_a_run_prints_its_rise_and_leaves_a_whole_folder(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    number = r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]"
    assert re.search(rf"success {number} → {number} on 6 held-out tasks \(valid_unseen\)", printed)
    assert {path.name for path in folder.iterdir()} >= {
        "config.toml",
        "metrics.jsonl",
        "trajectories",
        "checkpoints",
        "events",
        "report.html",
    }
    phases = [(row["phase"], row["step"]) for row in rows(folder) if row["phase"] != "sft"]
    assert phases == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None and newest.name == "step-000003"


def test_the_same_seed_gives_the_same_metrics_and_trajectories(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    train(tmp_path / "again")
    assert rows(tmp_path / "again") == rows(folder)
    assert trajectories(tmp_path / "again") == trajectories(folder)


def test_another_seed_gives_another_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    train(tmp_path / "other", "--seed", "4", "--steps", "1")
    assert rows(tmp_path / "other")[0] != rows(folder)[0]


@pytest.mark.parametrize("moment", ["warm start", "step 1", "step 2"])
def test_killed_at_any_moment_and_resumed_it_equals_the_undisturbed_run(
    finished: tuple[Path, str], tmp_path: Path, moment: str
) -> None:
    folder, _ = finished
    killed = tmp_path / "killed"
    (tmp_path / "killed.toml").write_text(TINY)
    process = subprocess.Popen(
        command("train", "--config", str(tmp_path / "killed.toml"), "--run-dir", str(killed)),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    reached = {"warm start": ("sft", 2), "step 1": ("train", 1), "step 2": ("train", 2)}[moment]
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (killed / "config.toml").exists() and any(
            (row["phase"], row["step"]) == reached for row in RunFolder.open(killed).rows()
        ):
            break
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command("train", "--resume", str(killed)), stdout=subprocess.DEVNULL, timeout=300, check=True)
    assert rows(killed) == rows(folder)
    assert trajectories(killed) == trajectories(folder)


def test_a_finished_run_resumes_to_the_same_summary(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    before = rows(folder)
    again = subprocess.run(
        command("train", "--resume", str(folder)), capture_output=True, text=True, timeout=300, check=True
    )
    summary = re.search(r"success .* held-out tasks", printed)
    assert summary is not None and summary.group() in again.stdout
    assert rows(folder) == before


def test_saved_trajectories_are_trees_whose_masks_mark_sampled_tokens(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with gzip.open(folder / "trajectories" / "step-000001.jsonl.gz", "rt") as file:
        trees = [Tree.from_dict(json.loads(line)) for line in file]
    assert len(trees) == 3
    assert all(len(tree.trajectories) == 2 for tree in trees)
    for tree in trees:
        for trajectory in tree.trajectories:
            (leaf,) = trajectory.leaves
            assert tree.mask(leaf).sum() == sum(len(node.tokens) for node in tree.path(leaf) if node.sampled) > 0


def test_the_report_shows_the_curves_and_needs_nothing_else(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    page = write_report(RunFolder.open(folder)).read_text()
    assert page.count("<svg") >= 5
    assert "Held-out tasks" in page and "Entropy of the policy" in page
    # Nothing is loaded from elsewhere; the namespaces of SVG are names, not addresses to fetch.
    assert not re.search(r"(?:src|href)=[\"']?https?:", re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", page))


def test_evaluation_of_a_checkpoint_names_its_panel_and_repeats(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    results = []
    for name in ("a.json", "b.json"):
        arguments = ("--split", "valid_seen", "--tasks", "5", "--out", str(tmp_path / name))
        done = subprocess.run(
            command("eval", str(folder), *arguments), capture_output=True, text=True, timeout=300, check=True
        )
        results.append(json.loads((tmp_path / name).read_text()))
        assert f"panel {results[-1]['panel']}: 5 tasks of valid_seen" in done.stdout
    assert results[0] == results[1]
    assert results[0]["success/tasks"] == 5

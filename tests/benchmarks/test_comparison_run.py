"""A real grid: it runs, goes on after a kill, leaves no process behind, and reports what it found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agentropy.algorithms.runs import TIME_PREFIX
from agentropy.benchmarks.comparison.analysis import analyse
from agentropy.benchmarks.comparison.grid import cells, load_grid
from agentropy.benchmarks.machine import descendants

GRID = """
name = "real"
seeds = [0]
baseline = "grpo"
last = 1
[resources]
jobs = 2
[run]
threads = 1
env = {workers = 1, kwargs = {max_turns = 6}, train_kwargs = {max_turns = 6}}
engine = {workers = 1}
eval = {tasks = 3, every = 1, samples = 2}
train = {steps = 2, tasks_per_step = 2, group_size = 2, minibatches = 1, keep_checkpoints = 1}
model = {hidden = 32, layers = 1, heads = 2, intermediate = 64}
[warm_start.run]
sft = {tasks = 8, epochs = 1}
[[environment]]
id = "alfworld"
label = "ALFWorld"
in_distribution = "valid_seen"
out_of_distribution = "valid_unseen"
[[recipe]]
name = "grpo"
[[recipe]]
name = "arpo"
# No prompt fits: it fails, and the others must not mind.
[[recipe]]
name = "epo"
label = "broken"
run = {agent = {max_context_tokens = 32}}
"""


def bench(grid, out, *arguments, **options):
    words = [sys.executable, "-m", "agentropy", "bench", "algorithms", "--config", str(grid), "--out", str(out)]
    return subprocess.Popen(
        [*words, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def begun(pid):
    """When a process was started, in ticks; None where it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] == "Z" else stat[19]


def end(process, how, path):
    """Send a signal when ``path`` is there. Returns what had been started by then, and what of it does not end."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    started = {pid: begun(pid) for pid in descendants(process.pid)}
    process.send_signal(how)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    left = list(started)
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in left if started[pid] is not None and begun(pid) == started[pid]]
    return started, left


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIME_PREFIX)} for line in lines]


def sound(grid, out):
    """The cells that do not fail."""
    return cells(load_grid(grid), out)[:2]


def like(whole, folder, *parts):
    """A folder that holds these parts of the whole one already."""
    for part in parts:
        shutil.copytree(whole / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A grid that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    grid, out = folder / "grid.toml", folder / "out"
    grid.write_text(GRID)
    process = bench(grid, out, "--results", str(folder / "results"))
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 1, printed
    return grid, out, printed


@pytest.fixture(scope="module")
def disturbed(whole, tmp_path_factory):
    """The same, interrupted before its first step, killed after it, and then run to the end."""
    grid, first_out, _ = whole
    out = like(first_out, tmp_path_factory.mktemp("disturbed") / "out", "start")
    first = sound(grid, out)[0].folder
    interrupted = end(bench(grid, out), signal.SIGINT, first / "checkpoints" / "step-000000" / "state.json")
    killed = end(bench(grid, out), signal.SIGKILL, first / "checkpoints" / "step-000001" / "state.json")
    process = bench(grid, out)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 1, printed
    return out, interrupted, killed


@pytest.mark.parametrize("how", [1, 2], ids=["interrupted", "killed"])
def test_no_process_outlives_a_comparison(disturbed, how):
    """Which had started at least a tracker of resources, a server that forks, and a run."""
    started, left = disturbed[how]
    assert len(started) >= 3 and left == []


def test_a_disturbed_comparison_gives_what_an_undisturbed_one_does(whole, disturbed):
    grid, out, _ = whole
    for ours, theirs in zip(sound(grid, out), sound(grid, disturbed[0]), strict=True):
        assert rows(ours.folder) == rows(theirs.folder)
    first, second = (analyse(load_grid(grid), folder, {"cpu": "any"}) for folder in (out, disturbed[0]))

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if k != "seconds"}
        return [untimed(each) for each in value] if isinstance(value, list) else value

    assert untimed(first) == untimed(second)


def test_the_report_counts_what_the_runs_hold(whole):
    grid, out, printed = whole
    report = json.loads((out / "report.json").read_text())
    assert (grid.parent / "results" / "algorithms-real.json").read_text() == (out / "report.json").read_text()
    (environment,) = report["environments"]
    assert [panel["split"] for panel in environment["panels"]] == ["valid_seen", "valid_unseen"]
    for cell, recipe in zip(sound(grid, out), environment["recipes"], strict=True):
        trained = [row for row in rows(cell.folder) if row["phase"] == "train"]
        assert recipe["costs"]["env_steps"] == sum(row["env/steps"] for row in trained)
        assert recipe["costs"]["tokens"] == sum(row["tokens/sampled"] for row in trained)
        for panel in environment["panels"]:
            (scores,) = [entry for entry in panel["recipes"] if entry["recipe"] == recipe["recipe"]]
            assert [point["step"] for point in scores["curve"]] == [0, 1, 2]
            (last,) = [row for row in rows(cell.folder) if row.get("split") == panel["split"] and row["step"] == 2]
            stored = cell.folder / "evaluations" / f"step-000002-{panel['split']}.json"
            won = json.loads(stored.read_text())["won"]
            assert scores["final"]["value"] == pytest.approx(np.mean(won))
            assert np.mean([first for first, _ in won]) == pytest.approx(last["success/rate"])
            assert [point["k"] for point in scores["pass_at_k"]] == [1, 2]
            assert panel["hash"] == last["panel"]
    assert "grpo" in printed and "arpo" in printed


def test_a_run_that_was_not_evaluated_before_its_first_step_claims_no_rise(whole):
    _, out, _ = whole
    logs = [
        (out / "logs" / f"{name}.log").read_text() for name in ("start/alfworld/seed-0", "cells/alfworld/grpo/seed-0")
    ]
    start, run = (next(line for line in log.splitlines() if line.startswith("success")) for log in logs)
    assert "→" in start and "→" not in run


def test_a_run_that_fails_leaves_the_others_alone(whole):
    _, out, printed = whole
    report = json.loads((out / "report.json").read_text())
    assert (report["planned"], report["finished"]) == (3, 2)
    assert report["missing"] == ["broken, ALFWorld, seed 0"]
    (told,) = [line for line in printed.splitlines() if line.startswith("failed broken, ALFWorld, seed 0: ")]
    assert "32" in told


def test_ray_runs_what_is_missing(whole, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    grid, first_out, _ = whole
    out = like(first_out, tmp_path / "out", "start", "cells/alfworld/grpo")
    process = bench(grid, out, "--backend", "ray", "--jobs", "1", env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "failed broken, ALFWorld, seed 0" in printed, printed
    for ours, theirs in zip(sound(grid, out), sound(grid, first_out), strict=True):
        assert ours.done and rows(ours.folder) == rows(theirs.folder)

"""A real grid: it runs, goes on after a kill, leaves no process behind, and reports what it found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentropy.algorithms.runs import TIME_PREFIX
from agentropy.benchmarks.comparison.analysis import analyse
from agentropy.benchmarks.comparison.grid import cells, load_grid

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
"""


def bench(grid, out, *arguments, **options):
    words = [sys.executable, "-m", "agentropy", "bench", "algorithms", "--config", str(grid), "--out", str(out)]
    return subprocess.Popen(
        [*words, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIME_PREFIX)} for line in lines]


def alive(folder):
    """Processes whose command line names the folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in command and int(pid) != os.getpid():
            found.append(pid)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid that was killed in its first run, and then ran to its end."""
    folder = tmp_path_factory.mktemp("comparison")
    grid, out = folder / "grid.toml", folder / "out"
    grid.write_text(GRID)
    process = bench(grid, out)
    first = cells(load_grid(grid), out)[0]
    deadline = time.monotonic() + 120
    while not (first.folder / "checkpoints" / "step-000001" / "state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while alive(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = alive(out)
    again = bench(grid, out, "--results", str(folder / "results"))
    printed, _ = again.communicate(timeout=240)
    assert again.returncode == 0, printed
    return folder, grid, out, left, printed


def test_no_process_outlives_a_killed_comparison(finished):
    assert finished[3] == []


def test_a_killed_comparison_gives_what_an_undisturbed_one_does(finished, tmp_path):
    _, grid, out, _, _ = finished
    process = bench(grid, tmp_path / "out")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    loaded = load_grid(grid)
    for ours, theirs in zip(cells(loaded, out), cells(loaded, tmp_path / "out"), strict=True):
        assert rows(ours.folder) == rows(theirs.folder)
    machine = {"cpu": "any"}
    first, second = (analyse(loaded, folder, machine) for folder in (out, tmp_path / "out"))

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if k != "seconds"}
        return [untimed(each) for each in value] if isinstance(value, list) else value

    assert untimed(first) == untimed(second)


def test_the_report_counts_what_the_runs_hold(finished):
    folder, grid, out, _, printed = finished
    report = json.loads((out / "report.json").read_text())
    assert (folder / "results" / "algorithms-real.json").read_text() == (out / "report.json").read_text()
    assert (report["planned"], report["finished"], report["missing"]) == (2, 2, [])
    (environment,) = report["environments"]
    assert [panel["split"] for panel in environment["panels"]] == ["valid_seen", "valid_unseen"]
    for cell, recipe in zip(cells(load_grid(grid), out), environment["recipes"], strict=True):
        trained = [row for row in rows(cell.folder) if row["phase"] == "train"]
        assert recipe["costs"]["env_steps"] == sum(row["env/steps"] for row in trained)
        assert recipe["costs"]["tokens"] == sum(row["tokens/sampled"] for row in trained)
        for panel in environment["panels"]:
            (scores,) = [entry for entry in panel["recipes"] if entry["recipe"] == recipe["recipe"]]
            assert [point["step"] for point in scores["curve"]] == [0, 1, 2]
            (last,) = [row for row in rows(cell.folder) if row.get("split") == panel["split"] and row["step"] == 2]
            assert abs(scores["final"]["value"] - last["success/rate"]) <= 0.5
            assert [point["k"] for point in scores["pass_at_k"]] == [1, 2]
            assert panel["hash"] == last["panel"]
    assert "grpo" in printed and "arpo" in printed


def test_a_folder_of_another_comparison_is_refused(finished):
    _, grid, out, _, _ = finished
    process = bench(grid, out, "--set", "run.train.lr=0.5")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "its [run] differs" in printed


def test_a_run_that_fails_leaves_the_others_alone(finished, tmp_path):
    """A world that breaks in one recipe's runs only: the report is of the other, and the status says so."""
    _, grid, _, _, _ = finished
    text = grid.read_text().replace('name = "arpo"', 'name = "arpo"\nrun = {agent = {max_context_tokens = 32}}')
    broken = tmp_path / "grid.toml"
    broken.write_text(text)
    process = bench(broken, tmp_path / "out")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "failed" in printed and "arpo, ALFWorld, seed 0" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["missing"] == ["arpo, ALFWorld, seed 0"]


def test_ray_runs_the_same_grid(finished, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    _, grid, out, _, _ = finished
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = bench(grid, tmp_path / "out", "--backend", "ray", env=environment)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    loaded = load_grid(grid)
    for ours, theirs in zip(cells(loaded, out), cells(loaded, tmp_path / "out"), strict=True):
        assert rows(ours.folder) == rows(theirs.folder)

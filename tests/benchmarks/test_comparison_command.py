"""A comparison's folder holds one grid, run by one process; what fails is told, and leaves alone what does not."""

import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from agentropy.benchmarks.comparison import cell as one_cell
from agentropy.benchmarks.comparison import running
from agentropy.benchmarks.comparison.cell import CellProcess, Outcome, Work
from agentropy.benchmarks.comparison.claim import alone, claim, starts_are_whole
from agentropy.benchmarks.comparison.grid import Resources, cells, load_grid, starts, to_toml
from agentropy.cli import main
from agentropy.errors import UsageError
from tests.benchmarks.fabricate import fabricate, make_grid


def planned(grid, folder):
    return [*starts(grid, folder), *cells(grid, folder)]


def changed(grid, **changes):
    return grid.model_validate(grid.model_dump() | changes)


@pytest.fixture
def small():
    return make_grid(("grpo", "epo"), seeds=2, panels=1, tasks=8)


@pytest.fixture
def held(small, tmp_path):
    """A folder of the grid's finished runs."""
    folder = tmp_path / "held"
    fabricate(small, folder, np.random.default_rng(0))
    claim(small, folder, planned(small, folder), report_only=False)
    return folder


def bench(grid, folder, *arguments):
    """The command, in this process."""
    file = folder.parent / "asked.toml"
    file.write_text(to_toml(grid))
    return main(["bench", "algorithms", "--config", str(file), "--out", str(folder), *arguments])


def test_a_folder_of_other_runs_is_refused(small, held, capsys):
    run = {"train": small.run["train"] | {"lr": 0.5}, "eval": small.run["eval"]}
    assert bench(changed(small, run=run), held) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "holds another run as 'warm start, alfworld, seed 0': its train.lr is 0.001, not 0.5" in told


def test_a_recipe_that_was_dropped_cannot_come_back_as_another(small, held):
    """The grid that the folder remembers is the last one, but its runs are those of all of them."""
    fewer = changed(small, recipe=small.model_dump()["recipe"][:1])
    claim(fewer, held, planned(fewer, held), report_only=False)
    assert [entry.title for entry in load_grid(held / "grid.toml").recipe] == ["grpo"]
    first, second = small.model_dump()["recipe"]
    other = changed(small, recipe=[first, second | {"options": {"clip_high": 0.3}}])
    with pytest.raises(
        UsageError, match=r"'epo, alfworld, seed 0': its algorithm.overrides.clip_high is None, not 0.3"
    ):
        claim(other, held, planned(other, held), report_only=False)


def test_seeds_recipes_and_what_concerns_the_report_may_change(small, held):
    more = changed(small, seeds=[0, 1, 2], last=1, recipe=[*small.model_dump()["recipe"], {"name": "arpo"}])
    claim(more, held, planned(more, held), report_only=False)
    assert load_grid(held / "grid.toml") == more


def test_another_start_is_another_run(small, held):
    other = changed(small, warm_start={"per": "seed"})
    with pytest.raises(UsageError, match=r"'grpo, alfworld, seed 1': its model.start is "):
        claim(other, held, planned(other, held), report_only=False)


def test_a_folder_that_was_moved_is_the_same(small, held, tmp_path):
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(held, moved)
    claim(small, moved, planned(small, moved), report_only=False)


def test_a_wrong_option_does_not_claim_the_folder(small, tmp_path, capsys):
    """What was mistyped can be put right and run in the same folder."""
    wrong = changed(small, options={"clip_hig": 0.3})
    assert bench(wrong, tmp_path / "out") == 2
    assert "has no option 'clip_hig'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_changes_nothing_of_the_grid(small, held, capsys):
    """Also one of fewer recipes, while the others are being run."""
    before = (held / "grid.toml").read_bytes()
    assert bench(changed(small, last=1), held, "--report") == 0
    assert (held / "grid.toml").read_bytes() == before
    assert json.loads((held / "report.json").read_text())["last"] == 1


def test_a_start_is_not_made_again_under_runs_that_began_from_it(small, held):
    before, runs = starts(small, held), cells(small, held)
    starts_are_whole(before, runs)
    shutil.rmtree(before[0].checkpoint)
    with pytest.raises(UsageError, match="'grpo, alfworld, seed 0' began from"):
        starts_are_whole(before, runs)
    shutil.rmtree(held / "cells")
    starts_are_whole(before, runs)


def test_two_processes_cannot_run_one_folder(tmp_path):
    hold = (
        "import sys, pathlib\n"
        "from agentropy.benchmarks.comparison.claim import alone\n"
        "with alone(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process is running the comparison"), alone(tmp_path):
            pass
        process.kill()
    with alone(tmp_path):
        pass


def test_who_is_refused_does_not_claim_the_folder(small, held, capsys):
    before = (held / "grid.toml").read_bytes()
    with alone(held):
        assert bench(changed(small, last=1), held) == 2
    assert "another process is running the comparison" in " ".join(capsys.readouterr().err.split())
    assert (held / "grid.toml").read_bytes() == before


def test_a_start_that_fails_stops_its_own_environment_alone(tmp_path, monkeypatch, capsys):
    grid = make_grid(("grpo", "epo"), seeds=1, environments=("alfworld", "textworld"), panels=1, tasks=8)
    whole = tmp_path / "whole"
    fabricate(grid, whole, np.random.default_rng(0))
    asked = []

    def played(work, resources):
        asked.append([each.folder for each in work])
        for index, each in enumerate(work):
            if "/start/textworld/" in each.folder:
                yield index, Outcome(1, 0.0, "agentropy: no Java")
            else:
                shutil.copytree(each.folder.replace("/out/", "/whole/"), each.folder)
                yield index, Outcome(0, 0.0)

    monkeypatch.setattr(running, "processes", played)
    assert bench(grid, tmp_path / "out") == 1
    assert len(asked[0]) == 2 and len(asked[1]) == 2 and all("/alfworld/" in folder for folder in asked[1])
    assert "failed warm start, textworld, seed 0: agentropy: no Java" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [each["label"] for each in report["environments"]] == ["alfworld"]


def test_where_nothing_could_be_run_the_reason_is_told(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "processes", lambda work, resources: unable(len(work)))
    assert bench(small, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "failed warm start, alfworld, seed 0: no memory" in told.out and not told.err


def unable(count):
    yield from ((index, Outcome(1, 0.0, "no memory")) for index in range(count))


def test_what_was_started_is_ended_when_the_comparison_breaks_off(small, tmp_path, monkeypatch):
    ended = []

    def played(work, resources):
        try:
            yield 0, Outcome(0, 0.0)
        finally:
            ended.append(len(work))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "processes", played)
    console = Console(quiet=True)
    monkeypatch.setattr(console, "print", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        running.run_all(cells(small, tmp_path), tmp_path, Resources(), "processes", console)
    assert ended == [4] and caught.tb is not None


def test_a_signal_that_ended_a_cell_is_told(tmp_path):
    """The last line of the log was written before the kernel ran out of memory."""
    (tmp_path / "log").write_text("loading …\n")
    process = object.__new__(CellProcess)
    process.work, process._started = Work("", "", str(tmp_path / "log")), one_cell.time.monotonic()
    process._process = SimpleNamespace(join=lambda: None, exitcode=-signal.SIGKILL)
    assert process.outcome().message == "ended by SIGKILL; the last it said: loading …"


class FakeRay(SimpleNamespace):
    """One machine of two processors, on which every task raises what a worker would."""

    class exceptions:
        class RayError(Exception):
            cause = None

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda work: work)

    def wait(self, running, num_returns):
        return running[:1], running[1:]

    def get(self, work):
        raise self.error


def fake_ray(error):
    nothing = dict.fromkeys(("init", "shutdown", "cancel"), lambda *arguments, **options: None)
    return FakeRay(error=error, nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}], **nothing)


def test_an_error_of_a_task_is_told_by_its_cause(monkeypatch):
    error = FakeRay.exceptions.RayError("ray::run_cell() (pid=1)\nTraceback …")
    error.cause = FileNotFoundError("no such folder: /shared")
    monkeypatch.setitem(sys.modules, "ray", fake_ray(error))
    ((index, outcome),) = running.ray_tasks([Work("a", "b", "c")], Resources(cpus=2))
    assert (index, outcome.status, outcome.message) == (0, 1, "no such folder: /shared")


@pytest.mark.parametrize(("resources", "told"), [({"cpus": 2}, False), ({"cpus": 3}, True), ({"gpus": 1}, True)])
def test_a_cluster_without_room_for_a_run_says_so(monkeypatch, caplog, resources, told):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(FakeRay.exceptions.RayError("lost")))
    list(running.ray_tasks([Work("a", "b", "c")], Resources(**resources)))
    assert ("no machine of the Ray cluster has" in caplog.text) == told

"""The index says of every trajectory what the trees say, whoever made it, and never of other trees than are there."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.runs import RunFolder
from agentropy.algorithms.view import index as index_module
from agentropy.algorithms.view.index import (
    StepIndex,
    describe,
    index_file,
    load_index,
    pack,
    read_entry,
    step_files,
)
from agentropy.algorithms.view.text import _View, load_trees
from agentropy.config import load_config
from agentropy.errors import UsageError
from tests.algorithms.view_runs import make_run, random_tree

PLAIN = {"reward", "score", "turns", "won", "truncated", "failed"}


def reference(trees: list[Tree]) -> list[dict[str, Any]]:
    """The same from the trees themselves, one trajectory after the other and each compared with all before it."""
    rows = []
    for tree in trees:
        walks = [[node.index for leaf in t.leaves for node in tree.path(leaf)] for t in tree.trajectories]
        lefts = []
        for number, (trajectory, walk) in enumerate(zip(tree.trajectories, walks, strict=True)):
            left = (-1, -1)
            shared = max((common(walk, other) for other in walks[:number]), default=0)
            if 1 < shared < len(walk):
                rivals = [n for n in range(number) if walks[n][:shared] == walk[:shared] and len(walks[n]) > shared]
                turns = [tree.nodes[node].turn for node in walk[shared:] if tree.nodes[node].role == "action"]
                if rivals:
                    left = rivals[0], turns[0] if turns else -1
            if "fork" in trajectory.info:
                left = trajectory.info["fork"]["parent"], trajectory.info["fork"]["turn"]
            lefts.append(left)
        for number, (trajectory, walk) in enumerate(zip(tree.trajectories, walks, strict=True)):
            sampled = [tree.nodes[node] for node in sorted(set(walk)) if tree.nodes[node].sampled]
            entropies = np.concatenate([np.empty(0), *(node.entropies.astype(np.float64) for node in sampled)])
            rows.append(
                {name: getattr(trajectory, name) for name in PLAIN}
                | {
                    "forks": sum(left == number for left, _ in lefts),
                    "left": lefts[number][0],
                    "left_at": lefts[number][1],
                    "tokens": len(entropies),
                    "entropy": pytest.approx(entropies.mean(), abs=1e-6) if len(entropies) else None,
                }
            )
    return rows


def common(a: list[int], b: list[int]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def rows_of(index: StepIndex) -> list[dict[str, Any]]:
    names = list(index.columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*index.columns.values(), strict=True)]


def forest(seed: int) -> list[Tree]:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, f"task-{n}", int(rng.integers(1, 7)), 4, forks=bool(n % 2)) for n in range(4)]
    for tree in trees[2:]:  # as a world does that notes nothing
        for trajectory in tree.trajectories:
            trajectory.info.pop("fork", None)
    trees[0].trajectories.append(Trajectory((), failed=True))
    return trees


def saved(folder: Path, trees: list[Tree], step: int = 1) -> tuple[RunFolder, Path]:
    run = RunFolder(folder, load_config())
    run.make()
    run.save_trees(step, trees)
    return run, step_files(folder)[step]


def test_the_index_says_what_the_trees_say_written_or_made_again(tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    run = RunFolder(tmp_path, load_config())
    run.make()
    for step in range(8):
        trees = forest(seed + step)
        run.save_trees(step, trees)
        path = step_files(tmp_path)[step]
        written = load_index(path, rebuild=False)
        assert written is not None
        assert rows_of(written) == reference(trees)
        assert written.tasks == [tree.task for tree in trees] and set(written.splits) == {"train"}
        assert written.trajectories == [len(tree.trajectories) for tree in trees]
        index_file(path).unlink()
        assert load_index(path, rebuild=False) is None
        assert load_index(path) == written


def test_forks_are_those_that_the_terminal_draws() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        tree = random_tree(rng, "task", 8, 5, forks=True)
        for trajectory in tree.trajectories:
            trajectory.info.clear()
        columns = describe(tree.to_dict())
        assert sum(columns["forks"]) == _View(tree).forks
        assert sum(columns["forks"]) == sum(left >= 0 for left in columns["left"])


def test_in_window_context_the_turns_of_an_episode_are_one_walk() -> None:
    tree = Tree("room", "train")
    acts = []
    for turn in range(2):
        prompt = tree.add(-1, "prompt", [1], text=f"room {turn}")
        acts.append(
            tree.add(prompt, "action", [2, 3], sampled=True, logprobs=[-1, -1], entropies=[0.5, turn], turn=turn)
        )
    other = tree.add(tree.nodes[acts[1]].parent, "action", [4], sampled=True, logprobs=[-1], entropies=[2.0], turn=1)
    tree.trajectories = [Trajectory(tuple(acts)), Trajectory((acts[0], other))]
    columns = describe(tree.to_dict())
    assert columns["left"] == [-1, 0] and columns["left_at"] == [-1, 1] and columns["forks"] == [1, 0]
    assert columns["tokens"] == [4, 3]
    assert columns["entropy"] == [pytest.approx((0.5 + 0 + 0.5 + 1) / 4), pytest.approx((0.5 + 0 + 2) / 3)]


def test_an_entropy_that_is_not_finite_is_none() -> None:
    tree = Tree("room", "train")
    start = tree.add(-1, "prompt", [1])
    leaf = tree.add(start, "action", [2], sampled=True, logprobs=[math.nan], entropies=[math.nan])
    tree.trajectories = [Trajectory((leaf,))]
    assert describe(tree.to_dict())["entropy"] == [None]


def test_a_tree_is_read_without_the_others_and_the_index_without_any(tmp_path: Path) -> None:
    trees = forest(3)
    _, path = saved(tmp_path, trees)
    index = load_index(path)
    assert index is not None and index.offsets is not None
    data = bytearray(path.read_bytes())
    for number in (0, 1, 3):  # what is between the first bytes and the last ones of a member is lost
        start, stop = index.offsets[number : number + 2]
        data[start + 12 : stop - 8] = bytes(stop - 8 - start - 12)
    path.write_bytes(data)
    assert load_index(path, rebuild=False) == index
    assert read_entry(path, index, 2) == trees[2].to_dict()
    with pytest.raises(UsageError, match="cannot read"):
        read_entry(path, index, 1)


def test_the_file_of_trees_is_what_any_reader_of_gzip_reads(tmp_path: Path) -> None:
    trees = forest(4)
    run, path = saved(tmp_path, trees)
    with gzip.open(path, "rt") as file:
        assert [json.loads(line) for line in file] == [tree.to_dict() for tree in trees]
    first = path.read_bytes()
    run.save_trees(2, trees)
    assert step_files(tmp_path)[2].read_bytes() == first, "equal trees give equal files"
    assert len(load_trees(run)[1]) == len(trees)


def test_runs_of_one_member_a_step_are_read_too(tmp_path: Path) -> None:
    trees = forest(6)
    _, path = saved(tmp_path, trees)
    expected = load_index(path)
    lines = "".join(json.dumps(tree.to_dict()) + "\n" for tree in trees)
    path.write_bytes(gzip.compress(lines.encode()))
    index = load_index(path)
    assert index is not None and expected is not None
    assert index.offsets is None and index.columns == expected.columns and index.check != expected.check
    assert [read_entry(path, index, number) for number in range(4)] == [tree.to_dict() for tree in trees]


def test_members_are_found_wherever_chunks_of_the_file_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = saved(tmp_path, forest(7))
    expected = load_index(path)
    index_file(path).unlink()
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(index_module, "_CHUNK", chunk)
        assert load_index(path) == expected


def test_an_index_of_other_trees_is_not_believed(tmp_path: Path) -> None:
    run, path = saved(tmp_path, forest(8))
    stale = index_file(path).read_bytes()
    old = load_index(path)
    assert old is not None
    trees = forest(9)
    run.save_trees(1, trees)
    index_file(path).write_bytes(stale)
    new = load_index(path)
    assert new is not None and rows_of(new) == reference(trees)
    assert read_entry(path, old, 0) is None
    for damaged in (b"", b"{", b"[]", b'{"version": 1}', stale.replace(b'"version":1', b'"version":99')):
        index_file(path).write_bytes(damaged)
        assert load_index(path) == new


def test_a_step_that_was_killed_between_its_trees_and_their_index_has_no_index_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = saved(tmp_path, forest(10))
    import agentropy.algorithms.runs as runs

    write = runs.write_atomically

    def dies(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(runs, "write_atomically", dies)
    trees = forest(11)
    with pytest.raises(KeyboardInterrupt):
        run.save_trees(1, trees)
    assert not index_file(path).exists()
    index = load_index(path)
    assert index is not None and rows_of(index) == reference(trees)


def test_a_resumed_run_keeps_what_was_saved_of_the_steps_that_it_keeps(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=5, credit=True)
    for step, split in ((0, "valid_seen"), (3, "valid_seen"), (4, "valid_unseen")):
        run.save_outcomes(step, split, {"tasks": []})
    (tmp_path / "trajectories" / "step-notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "trajectories").iterdir()}
    run.rewind(4)  # the first evaluation and three steps
    run.close()
    left = {path.name: path.read_bytes() for path in (tmp_path / "trajectories").iterdir()}
    assert sorted(step_files(tmp_path)) == [1, 2, 3]
    kept = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert kept == ["step-000000-valid_seen.json", "step-000003-valid_seen.json"]
    assert left == {name: data for name, data in before.items() if "000004" not in name and "000005" not in name}
    run.rewind(1)
    run.close()
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == ["step-notes.txt"]


def test_no_trees_are_an_empty_file_with_an_empty_index(tmp_path: Path) -> None:
    _, path = saved(tmp_path, [])
    index = load_index(path, rebuild=False)
    assert index is not None and len(index) == 0
    index_file(path).unlink()
    assert load_index(path) is not None and gzip.decompress(pack([])[0]) == b""


@pytest.mark.parametrize("cut", [1, 20, 2000])
def test_a_file_that_ends_too_soon_is_named(tmp_path: Path, cut: int) -> None:
    _, path = saved(tmp_path, forest(12))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UsageError, match=r"cannot read .*step-000001"):
        load_index(path)

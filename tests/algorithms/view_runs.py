"""Runs to look at: real trees, written by the real run folder, with a tokenizer that knows their words.

- ``make_run``: a run of any size. ``random_tree``: one of its trees. ``WORDS``: what is said in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.instruments.credit import Credit, credit_path, save_credit
from agentropy.algorithms.runs import RunFolder
from agentropy.config import load_config

WORDS = (
    *(
        "go",
        "take",
        "put",
        "open",
        "look",
        "heat",
        "cool",
        "clean",
        "to",
        "in",
        "on",
        "with",
        "from",
        "the",
        "a",
        "and",
    ),
    *("mug", "desk", "shelf", "lamp", "fridge"),
)
TOKENIZER = build_word_tokenizer(WORDS)


def make_run(
    folder: Path,
    *,
    steps: int = 3,
    tasks: int = 2,
    group: int = 4,
    turns: int = 5,
    forks: bool = False,
    credit: bool = False,
    total_steps: int | None = None,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
) -> RunFolder:
    """A run that has done ``steps`` of ``total_steps`` steps of ``tasks`` trees, each with ``group`` trajectories."""
    rng = np.random.default_rng(seed)
    config = load_config(overrides=(f"train.steps={steps if total_steps is None else total_steps}", *overrides))
    run = RunFolder(folder, config)
    run.make()
    (run.checkpoints / "step-000000").mkdir()
    TOKENIZER.save_pretrained(str(run.checkpoints / "step-000000"))
    held_out = {"split": "valid_unseen", "panel": "0123456789ab", "success/tasks": 20, "turns": 20.0}
    append(run, "eval", 0, success(0.25) | held_out)
    for step in range(1, steps + 1):
        trees = [random_tree(rng, f"task-{step}-{number}", group, turns, forks=forks) for number in range(tasks)]
        run.save_trees(step, trees)
        if credit:
            save_credit(credit_path(folder, step), random_credit(rng, trees))
        entropy = {"entropy/action_mean": 0.9 - 0.1 * step, "entropy/by_turn": [0.5, 0.4]}
        append(run, "train", step, success(step / (steps + 1)) | entropy)
    append(run, "eval", steps, success(0.5) | held_out)
    return run


def append(run: RunFolder, phase: str, step: int, metrics: dict[str, Any]) -> None:
    """A row as ``RunFolder.log`` writes it, without TensorBoard."""
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")


def success(rate: float) -> dict[str, float]:
    return {"success/rate": rate, "success/low": max(0.0, rate - 0.1), "success/high": min(1.0, rate + 0.1)}


def random_tree(rng: np.random.Generator, task: str, group: int, turns: int, *, forks: bool = False) -> Tree:
    """Episodes of up to ``turns`` turns; with ``forks`` the later half leaves earlier ones on their way."""
    tree = Tree(task, "train")
    tree.info = {"initial": group}
    text, tokens = said(rng, 12)
    start = tree.add(-1, "prompt", tokens, text=text)
    walks: list[list[int]] = []  # the observation before each turn of an episode
    for member in range(group):
        fork: dict[str, Any] = {}
        place, first, walk = start, 0, [start]
        if forks and member >= max(1, group // 2):
            parent = int(rng.integers(member))
            first = int(rng.integers(len(walks[parent])))
            place, walk = walks[parent][first], walks[parent][: first + 1]
            fork = {"fork": {"parent": parent, "turn": first, "delta_entropy": 0.2, "probability": 0.6}}
        leaf, reward, last = place, 0.0, first + int(rng.integers(1, turns + 1))
        for turn in range(first, last):
            text, tokens = said(rng, int(rng.integers(1, 6)))
            entropies = rng.exponential(0.5, len(tokens))
            paid = float(np.round(rng.normal(), 2))
            floats = {"logprobs": -rng.exponential(1.0, len(tokens)), "entropies": entropies}
            leaf = tree.add(
                place, "action", tokens, sampled=True, turn=turn, reward=paid, text=text, version=1, **floats
            )
            reward += paid
            if turn < last - 1:
                text, tokens = said(rng, int(rng.integers(4, 12)))
                place = tree.add(leaf, "observation", tokens, turn=turn, text=text)
                walk.append(place)
        walks.append(walk)
        won = bool(rng.random() < 0.4)
        seed = 2919813369553411398
        ended = {"won": won, "score": float(won), "turns": last, "truncated": not won and bool(rng.random() < 0.5)}
        tree.trajectories.append(Trajectory((leaf,), reward=reward, seed=seed, info=fork, **ended))
    return tree


def random_credit(rng: np.random.Generator, trees: list[Tree]) -> Credit:
    rows = [
        (number, place, trajectory.leaves[0], int(tree.mask(trajectory.leaves[0]).sum()))
        for number, tree in enumerate(trees)
        for place, trajectory in enumerate(tree.trajectories)
    ]
    names, counts = np.array([row[:3] for row in rows], np.int32), [row[3] for row in rows]
    start = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    advantage, weight = rng.normal(size=(2, int(start[-1]))).astype(np.float32)
    return Credit(names[:, 0], names[:, 1], names[:, 2], start, advantage, np.abs(weight))


def said(rng: np.random.Generator, words: int) -> tuple[str, list[int]]:
    text = " ".join(str(word) for word in rng.choice(WORDS, words))
    return text, TOKENIZER.encode(text, add_special_tokens=False)

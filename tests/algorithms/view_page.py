"""What the tests of the page need: a forked run, its numbers, and what to ask of a page that is shown.

- ``forked``: a tree whose episodes leave each other. ``credit_of``: its credit. ``small_run``: a run that saved both.
- ``actions``, ``numbers``, ``rows_of``: what the page must show of them. ``between``, ``luminance``: its colours.
- ``CONTRAST``, ``NAMELESS``, ``CUT``: JavaScript that lists what cannot be read, has no name, or is cut off.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.instruments.credit import Credit, credit_path, save_credit
from agentropy.algorithms.runs import RunFolder
from agentropy.algorithms.view.text import load_trees
from tests.algorithms.view_runs import TOKENIZER, append, make_run, success

SCRIPT = '<img src=x onerror="document.title=1"><script>document.title=1</script> & <b>bold</b>'

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!words || !box.width || !box.height || element.closest(".unseen, noscript, option")) continue;
    const ink = light(rgba(element instanceof SVGElement ? style.fill : style.color)), paper = light(ground(element));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) poor.push([element.tagName, element.getAttribute("class"), element.textContent, ratio]);
  }
  return poor;
}"""
"""Words whose contrast with what is behind them is less than WCAG's AA."""

NAMELESS = """() => {
  const named = (element) =>
    element.getAttribute("aria-label") || element.textContent.trim() || element.closest("label");
  const parts = "a, button, input, select, [role=slider], [role=treeitem], [role=grid], [role=img]";
  return [...document.querySelectorAll(parts)].filter((element) => !element.closest("[hidden], noscript"))
    .filter((element) => !named(element)).map((element) => element.outerHTML);
}"""

CUT = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  const clipped = element.closest(".sideways, .unseen, pre, .space a, #crumbs, .skip");
  return box.width && !clipped && (box.right > innerWidth + 1 || box.left < -1);
}).map((element) => [element.tagName, element.getAttribute("class")])"""
"""What reaches over the edges of the window, apart from what scrolls or ends in dots by itself."""


def forked() -> Tree:
    """Two episodes; #2 leaves #0 before its second turn, and #3 leaves #2 before the third."""
    tree = Tree("put-mug-on-desk/7", "train")
    start = tree.add(-1, "prompt", [3, 4], text=f"You are in a room. {SCRIPT}")
    shelf = walk(tree, start, 0, "go to the shelf", f"You see a mug. {SCRIPT}", entropy=0.2)
    take = walk(tree, shelf, 1, "take mug from shelf", "You have it.", entropy=0.9, paid=0.5)
    won = walk(tree, take, 2, "put mug on desk", entropy=0.1, paid=1.0)
    words = "look on the desk and the shelf and in the fridge with a lamp from the shelf"
    look = walk(tree, shelf, 1, words, "A desk.", entropy=0.4)
    late = walk(tree, look, 2, "take a lamp", "You have it.", "go to desk", entropy=0.3)
    open_ = walk(tree, look, 2, "open the fridge", entropy=0.7, paid=-0.25)
    lamp = walk(tree, start, 0, "go to lamp", "Nothing.", "heat mug", entropy=0.6, paid=-0.1)
    decided = {"turn": 1, "delta_entropy": 0.7, "probability": 0.64, "forks": 1}
    left = {"delta_entropy": 0.7, "probability": 0.64}
    tree.trajectories = [
        Trajectory((won,), reward=1.5, won=True, score=1.0, turns=3, info={"branching": [decided]}),
        Trajectory((lamp,), reward=-0.2, turns=2),
        Trajectory((late,), turns=4, truncated=True, info={"fork": {"parent": 0, "turn": 1, **left}}),
        Trajectory((open_,), reward=-0.25, turns=3, info={"fork": {"parent": 2, "turn": 2, **left}}),
    ]
    return tree


def walk(tree: Tree, parent: int, turn: int, *said: str, paid: float = 0.0, entropy: float = 0.5) -> int:
    """Actions and observations in turn, an action first."""
    for number, text in enumerate(said):
        tokens = TOKENIZER.encode(text if "<" not in text else "look", add_special_tokens=False)
        if number % 2:
            parent = tree.add(parent, "observation", tokens, turn=turn, text=text)
            turn += 1
        else:
            place = np.arange(len(tokens))
            floats = {"entropies": entropy * (1 + place), "logprobs": -0.3 * entropy * (2 + place)}
            parent = tree.add(parent, "action", tokens, sampled=True, turn=turn, reward=paid, text=text, **floats)
    return parent


def credit_of(tree: Tree) -> Credit:
    """Advantages of both signs with exact zeros, and weights from 0 to above 2, for each sampled token of a walk."""
    leaves = [trajectory.leaves[0] for trajectory in tree.trajectories]
    sizes = [int(tree.mask(leaf).sum()) for leaf in leaves]
    start = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    place = np.arange(start[-1])
    members = np.arange(len(leaves), dtype=np.int32)
    advantage = (((place % 7) - 3) * 0.4).astype(np.float32)
    weight = (place % 5 * 0.55).astype(np.float32)
    return Credit(np.zeros_like(members), members, np.array(leaves, np.int32), start, advantage, weight)


def small_run(folder: Path) -> None:
    run = make_run(folder, steps=2, tasks=2, forks=True, credit=True, overrides=("algorithm.name=arpo",))
    run.save_trees(3, [forked()])
    save_credit(credit_path(folder, 3), credit_of(forked()))
    append(run, "train", 3, success(0.6) | {"entropy/action_mean": 0.4, "entropy/by_turn": [0.5, 0.3], "turns": 4.0})


def actions(tree: Tree, member: int) -> list[str]:
    return [node.text for node in tree.path(tree.trajectories[member].leaves[0]) if node.role == "action"]


def numbers(tree: Tree, measure: str, member: int) -> list[float]:
    leaf = tree.trajectories[member].leaves[0]
    if measure in ("entropy", "logprob"):
        return (tree.entropies if measure == "entropy" else tree.logprobs)(leaf)[tree.mask(leaf)].tolist()
    credit = credit_of(tree)
    return getattr(credit, measure)[credit.start[member] : credit.start[member + 1]].tolist()


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    """What the list must know of each trajectory, straight from the saved trees."""
    folder = run.path / "trajectories"
    return [
        {"step": step, "task": tree.task, "won": own.won, "reward": own.reward, "info": own.info}
        for step in sorted(int(path.name[5:11]) for path in folder.glob("*.jsonl.gz"))
        for tree in load_trees(run, step)[1]
        for own in tree.trajectories
    ]


def between(stops: list[str], share: float) -> list[int]:
    """The scale, written again: straight between equally spaced colours."""
    colours = np.array([[int(stop[at : at + 2], 16) for at in (1, 3, 5)] for stop in stops], float)
    places = np.linspace(0, 1, len(colours))
    return [math.floor(np.interp(share, places, colours[:, channel]) + 0.5) for channel in range(3)]


def luminance(colour: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

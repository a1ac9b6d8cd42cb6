"""One tree as the page is told of it.

- ``tree_answer``: nodes with the texts, log-probabilities and entropies of their tokens, and what came of each episode.
- ``credit_answer``: what learning made of the tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..instruments.credit import Credit
from .index import describe
from .pieces import Pieces

_DIGITS = 4
"""Significant digits of what is told of a token: it is drawn, not computed with."""
_IN_INDEX = ("forks", "left", "left_at", "tokens", "entropy")


def tree_answer(entry: Mapping[str, Any], pieces: Pieces | None) -> dict[str, Any]:
    """A tree of ``Tree.to_dict`` with its tokens as places in one vocabulary of ids and texts.

    One id may stand in it with several texts: what a token adds depends on the one before.
    """
    vocabulary: dict[tuple[int, str | None], int] = {}
    nodes = []
    for node in entry["nodes"]:
        tokens = node["tokens"]
        texts = pieces.split(tokens) if pieces is not None else [None] * len(tokens)
        nodes.append(
            {name: node[name] for name in ("parent", "role", "turn", "text", "reward", "version", "sampled")}
            | {
                "tokens": [vocabulary.setdefault(pair, len(vocabulary)) for pair in zip(tokens, texts, strict=True)],
                "logprobs": _decoded(node["logprobs"]) if node["sampled"] else None,
                "entropies": _decoded(node["entropies"]) if node["sampled"] else None,
            }
        )
    columns = describe(entry)
    trajectories = [
        # A number of 64 bits would lose its last digits in the browser.
        trajectory | {"seed": str(trajectory["seed"])} | {name: columns[name][place] for name in _IN_INDEX}
        for place, trajectory in enumerate(entry["trajectories"])
    ]
    return {
        **{name: entry[name] for name in ("task", "split", "info")},
        "pieces": pieces is not None,
        "vocabulary": [list(pair) for pair in vocabulary],
        "nodes": nodes,
        "trajectories": trajectories,
    }


def credit_answer(credit: Credit | None, number: int, entry: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of tree ``number`` in a step's credit; None without any, or where it is of other trees."""
    if credit is None:
        return None
    answer = []
    for row in np.flatnonzero(credit.tree == number).tolist():
        trajectory, leaf = int(credit.trajectory[row]), int(credit.leaf[row])
        start, stop = credit.start[row : row + 2].tolist()
        if stop - start != _sampled(entry, trajectory, leaf):
            return None
        part = slice(start, stop)
        answer.append(
            {
                "trajectory": trajectory,
                "leaf": leaf,
                "advantage": _floats(credit.advantage[part]),
                "weight": _floats(credit.weight[part]),
            }
        )
    return answer


def _sampled(entry: Mapping[str, Any], trajectory: int, leaf: int) -> int:
    """Sampled tokens on the walk to a leaf of a trajectory; -1 where it has no such leaf."""
    trajectories, nodes = entry["trajectories"], entry["nodes"]
    if not 0 <= trajectory < len(trajectories) or leaf not in trajectories[trajectory]["leaves"]:
        return -1
    count = 0
    while leaf != -1:
        count += len(nodes[leaf]["tokens"]) if nodes[leaf]["sampled"] else 0
        leaf = nodes[leaf]["parent"]
    return count


def _decoded(text: str) -> list[float | None]:
    return _floats(np.frombuffer(base64.b64decode(text), "<f4"))


def _floats(values: NDArray[np.float32]) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]

"""Where in its episodes a policy is uncertain, from the entropies that the sampler stored in trees.

- ``TokenTable``: every sampled token of some trees, each node once, as flat arrays. ``token_table``: makes it.
- ``entropy_metrics``: entropy by turn, by position, after observations, by outcome; forking tokens; consistency.

Everything is over all sampled tokens of a step, so it depends on neither micro-batches nor the order of the trees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...agents.tree import Tree

TURNS = 64
"""Entries of ``entropy/by_turn``; later turns are left out of it."""
POSITIONS = 32
"""Entries of ``entropy/by_position``."""
HEAD_TOKENS = 20
"""Most tokens of an action that count as the first after an observation (ARPO's k, 2507.19849)."""
HEAD_SHARE = 4
"""One in so many tokens of an action counts as one of the first, rounded up: actions may be a few tokens long."""
FORKS = 0.2
"""Share of tokens, those of highest entropy, at which reasoning forks (Beyond the 80/20 Rule, 2506.01939)."""
FORK_TOKENS = 16
"""Entries of ``entropy/fork_tokens``."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """``N`` sampled tokens, in the order of trees and nodes; a node that trajectories share stands once."""

    token: NDArray[np.int32]
    entropy: NDArray[np.float64]
    """Nats."""
    logprob: NDArray[np.float64]
    """Nats, of the token itself."""
    turn: NDArray[np.int32]
    position: NDArray[np.int32]
    """In the action, from 0."""
    length: NDArray[np.int32]
    """Tokens of the action."""
    won: NDArray[np.bool_]
    """Whether a trajectory that was won went through it."""
    lost: NDArray[np.bool_]
    """Whether one that was lost did. A shared token may be both; neither, where the world failed."""

    def __len__(self) -> int:
        return len(self.token)

    def select(self, keep: NDArray[np.bool_]) -> TokenTable:
        """The tokens where ``keep`` ``[N]`` is set."""
        if keep.all():
            return self
        return TokenTable(**{item.name: getattr(self, item.name)[keep] for item in fields(self)})


def token_table(trees: Sequence[Tree]) -> TokenTable:
    """All sampled tokens of ``trees``."""
    nodes, outcomes = [], []
    for tree in trees:
        passed = _passed(tree)
        for node in tree.nodes:
            if node.sampled and len(node.tokens):
                nodes.append(node)
                outcomes.append(passed[node.index])
    counts = np.asarray([len(node.tokens) for node in nodes], np.int64)
    starts = np.cumsum(counts) - counts

    def joined(name: str, dtype: type) -> NDArray[Any]:
        return np.concatenate([getattr(node, name) for node in nodes] or [np.empty(0)]).astype(dtype)

    def spread(values: Sequence[Any] | NDArray[Any], dtype: type) -> NDArray[Any]:
        return np.repeat(np.asarray(values, dtype), counts)

    return TokenTable(
        token=joined("tokens", np.int32),
        entropy=joined("entropies", np.float64),
        logprob=joined("logprobs", np.float64),
        turn=spread([node.turn for node in nodes], np.int32),
        position=(np.arange(counts.sum()) - np.repeat(starts, counts)).astype(np.int32),
        length=spread(counts, np.int32),
        won=spread([won for won, _ in outcomes], np.bool_),
        lost=spread([lost for _, lost in outcomes], np.bool_),
    )


def entropy_metrics(
    table: TokenTable, first: Mapping[str, Any] | None = None, *, exact: bool = True
) -> dict[str, float | list[Any]]:
    """Metrics of one step, in nats a token; what no token speaks of is left out.

    - ``entropy/by_turn``, ``entropy/by_position``: lists, by the turn and by the place in the action, from 0; None
      where there was no token.
    - ``entropy/after_observation``: the first tokens of actions after the first turn, which answer an observation: a
      quarter of the action rounded up, ``HEAD_TOKENS`` at most. ``entropy/later``: the rest of those actions.
    - ``entropy/won``, ``entropy/lost``: tokens on the way of a trajectory that was won, or lost.
    - ``entropy/fork_threshold``: the entropy that the top 20 % of tokens exceeded in the run's first step;
      ``entropy/fork_share``: tokens above it now; ``entropy/p80``: where the top 20 % begin now.
    - ``entropy/fork_tokens``: ids of the tokens that were most often sampled above the threshold;
      ``entropy/fork_overlap``: share of the first step's that are still among them.
    - ``entropy/consistency``: mean of -log p - H, 0 in expectation exactly when tokens are drawn from the distribution
      whose entropy is told; ``entropy/consistency_z``: its distance from 0 in standard errors. Not for estimates.

    Tokens whose entropy the engine did not tell (NaN) do not count.

    Args:
        table: of all trees of the step.
        first: metrics of the first step of the run that had any of these; None in that step.
        exact: whether the entropies are those of the whole distribution.
    """
    table = table.select(np.isfinite(table.entropy))
    entropy = table.entropy
    if not len(table):
        return {}
    after = table.turn > 0
    head = after & (table.position < np.minimum(-(-table.length // HEAD_SHARE), HEAD_TOKENS))
    split = {"after_observation": head, "later": after & ~head, "won": table.won, "lost": table.lost}
    metrics: dict[str, float | list[Any]] = {
        "entropy/by_turn": _means(entropy, table.turn, TURNS),
        "entropy/by_position": _means(entropy, table.position, POSITIONS),
        **{f"entropy/{name}": float(entropy[where].mean()) for name, where in split.items() if where.any()},
    }
    metrics |= _forks(table, first)
    surprise = -table.logprob - entropy
    if exact and len(surprise) > 1 and np.isfinite(surprise).all():
        error = float(surprise.std(ddof=1)) / math.sqrt(len(surprise))
        metrics["entropy/consistency"] = float(surprise.mean())
        metrics["entropy/consistency_z"] = float(surprise.mean()) / error if error > 0 else 0.0
    return metrics


def _forks(table: TokenTable, first: Mapping[str, Any] | None) -> dict[str, float | list[Any]]:
    limit = float(np.quantile(table.entropy, 1 - FORKS))
    threshold = float((first or {}).get("entropy/fork_threshold", limit))
    above = table.entropy > threshold
    counts = np.bincount(table.token[above])
    # Stable: of tokens that are equally frequent, the lower id.
    names = [int(token) for token in np.argsort(-counts, kind="stable")[:FORK_TOKENS] if counts[token]]
    before = (first or {}).get("entropy/fork_tokens", names)
    metrics: dict[str, float | list[Any]] = {
        "entropy/fork_threshold": threshold,
        "entropy/fork_share": float(above.mean()),
        "entropy/p80": limit,
        "entropy/fork_tokens": names,
    }
    return metrics | ({"entropy/fork_overlap": len({*before} & {*names}) / len(before)} if before else {})


def _means(values: NDArray[np.float64], index: NDArray[np.int32], size: int) -> list[float | None]:
    """Mean of ``values`` at each index below ``size``, up to the last that occurs."""
    known = (index >= 0) & (index < size)
    counts = np.bincount(index[known])
    sums = np.bincount(index[known], values[known])
    return [round(float(total / count), 6) if count else None for total, count in zip(sums, counts, strict=True)]


def _passed(tree: Tree) -> list[tuple[bool, bool]]:
    """For each node, whether a won and whether a lost trajectory went through it."""
    passed = [[False, False] for _ in tree.nodes]
    for trajectory in tree.trajectories:
        if trajectory.failed:
            continue
        kind = 0 if trajectory.won else 1
        for leaf in trajectory.leaves:
            index = leaf
            while index != -1 and not passed[index][kind]:
                passed[index][kind] = True
                index = tree.nodes[index].parent
    return [(won, lost) for won, lost in passed]

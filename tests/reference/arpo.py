"""ARPO (2507.19849): where rollouts branch, and how tokens that several of them share are credited."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trajectories import PerToken, Trajectory


def truncated_entropy(chances: Sequence[float]) -> float:
    """``-Σ p log p`` over the tokens that a server reports, not renormalised (released code)."""
    return float(-sum(p * np.log(p) for p in chances if p > 0))


def divisor(scale: str, tokens: int, vocabulary: int) -> float:
    """What a sum of entropies is divided by: the vocabulary's size (the paper), its logarithm (released code), or the
    number of tokens in the sum."""
    return {"vocab": vocabulary, "log_vocab": float(np.log(vocabulary)), "tokens": tokens}[scale]


def statistic(entropies: Sequence[float], scale: str, vocabulary: int, probe: int = 20) -> float:
    """Scaled sum over the first ``probe`` tokens of one action."""
    first = entropies[:probe]
    return sum(first) / divisor(scale, len(first), vocabulary)


def rise(
    now: Sequence[float], initial: Sequence[float], scale: str = "vocab", vocabulary: int = 1, probe: int = 20
) -> float:
    """``ΔH = Σ_{i≤k} (H_t,i - H_initial,i) / V`` (Eq. 4), as far as both actions go."""
    pairs = list(zip(now, initial, strict=False))[:probe]
    return sum(h - root for h, root in pairs) / divisor(scale, len(pairs), vocabulary)


def rises(actions: list[Sequence[float]], scale: str, vocabulary: int, probe: int = 20) -> list[float]:
    """ΔH of every decision of one episode, from the entropies of its actions: after each observation the first tokens
    of the action that answers it are compared with those of the episode's first action."""
    return [rise(action, actions[0], scale, vocabulary, probe) for action in actions[1:]]


def official_rises(
    actions: list[Sequence[float]], vocabulary: int, probe: int = 20, remembered: float | None = None
) -> list[float]:
    """The released code's: it looks at the action *before* the observation, and compares its statistic with the first
    one that was ever ``remembered`` for this place of a batch."""
    values = [statistic(action, "log_vocab", vocabulary, probe) for action in actions]
    first = values[0] if remembered is None else remembered
    return [value - first for value in values[:-1]]


def probability(delta: float, alpha: float = 0.5, beta: float = 0.2) -> float:
    """``P = α + β ΔH`` (Eq. 5)."""
    return alpha + beta * delta


def branches(delta: float, alpha: float = 0.5, beta: float = 0.2, tau: float = 0.5) -> bool:
    """Branch iff P > τ (Eq. 5)."""
    return probability(delta, alpha, beta) > tau


def official_branches(draw: float, delta: float, alpha: float = 0.5, beta: float = 0.2) -> bool:
    """The released code's decision for a uniform ``draw``: passed over if ``clip(draw - β ΔH, 0, 1) > α``."""
    return not min(max(draw - beta * delta, 0.0), 1.0) > alpha


def hard_credit(trajectories: list[Trajectory], advantages: PerToken) -> PerToken:
    """A token that stands in d trajectories gets the mean of their advantages there."""
    found: dict[tuple[int, int], list[float]] = {}
    named = {}
    for trajectory in trajectories:
        for turn in trajectory.turns:
            within: dict[int, int] = {}
            for token in turn.tokens:
                position = within[token.node] = within.get(token.node, -1) + 1
                named[token.place] = (token.node, position)
                found.setdefault((token.node, position), []).append(advantages[token.place])
    return {place: float(np.mean(found[name])) for place, name in named.items()}


def sharers(trajectories: list[Trajectory]) -> dict[int, int]:
    """Number of trajectories that each message of the tree stands in."""
    count: dict[int, int] = {}
    for trajectory in trajectories:
        for node in {token.node for token in trajectory.tokens}:
            count[node] = count.get(node, 0) + 1
    return count


def shared_weights(trajectories: list[Trajectory]) -> PerToken:
    """1/d for a token that stands in d trajectories, so that each message counts once."""
    count = sharers(trajectories)
    return {token.place: 1 / count[token.node] for trajectory in trajectories for token in trajectory.tokens}

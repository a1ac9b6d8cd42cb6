"""EPO (2509.22576 v2): an entropy bonus, and a corridor around the entropy of earlier steps.

The released code (WujiangXu/EPO) differs from the paper; both are here, by option.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .loss import Loss, aggregate, slope
from .trajectories import Trajectory

ByTurn = dict[int, float]


def phase_weight(step: int, total_steps: int, gamma: float = 3.0) -> float:
    """``β_k = 1 + exp(-γ k / k_mid)``, ``k_mid = ⌊K/2⌋`` (Eq. 5)."""
    return float(1 + np.exp(-gamma * step / (total_steps // 2)))


def official_phase_weight(step: int) -> float:
    """The released code's, for 150 steps."""
    if step <= 75:
        return float(1 - 0.2 * (1 - np.exp(-2 * step / 75)))
    return float(0.8 * np.exp(-3 * (step - 75) / 75))


def step_entropy(trajectories: list[Trajectory], *, per_turn: bool = False, pad: int | None = None) -> ByTurn:
    """``H̄_k``: mean entropy of all tokens of an RL step, at key 0; or ``per_turn`` of those at each turn index.

    ``pad``: shifted so that the last turn stands at index ``pad - 1``, with 0 for those in front (released code).
    """
    found: dict[int, list[float]] = {}
    for trajectory in trajectories:
        for turn in trajectory.turns:
            for token in turn.tokens:
                found.setdefault(turn.index if per_turn else 0, []).append(token.old_entropy)
    means = {turn: float(np.mean(entropies)) for turn, entropies in found.items()}
    if pad is None:
        return means
    shift = max(pad - (max(means) + 1), 0)
    return dict.fromkeys(range(shift), 0.0) | {turn + shift: mean for turn, mean in means.items()}


def reference_entropy(
    history: list[ByTurn],
    kind: Literal["cumulative", "window", "ema"] = "cumulative",
    window: int = 10,
    decay: float = 0.9,
) -> ByTurn:
    """``H̄_W``: the mean over all steps so far (the paper's), over the last ``window`` ones, or
    ``h ← decay h + (1 - decay) H̄``; at each turn, of the steps that reached it."""
    result = {}
    for turn in sorted({turn for entry in history for turn in entry}):
        steps = history[-window:] if kind == "window" else history
        reached = [entry[turn] for entry in steps if turn in entry]
        if kind == "ema":
            mean = reached[0]
            for value in reached[1:]:
                mean = decay * mean + (1 - decay) * value
            result[turn] = mean
        elif reached:
            result[turn] = float(np.mean(reached))
    return result


def hinge(entropy: float, low: float, high: float) -> tuple[float, float]:
    """``P = (low - H)₊ + (H - high)₊`` and its derivative by H (Eq. 3, both ends already times the reference)."""
    if entropy < low:
        return low - entropy, -1.0
    if entropy > high:
        return entropy - high, 1.0
    return 0.0, 0.0


def indicator(entropy: float, low: float, high: float) -> tuple[float, float]:
    """1 outside the open band, without a derivative (released code)."""
    return (0.0 if low < entropy < high else 1.0), 0.0


@dataclass
class EPO:
    """The term and its memory."""

    total_steps: int
    coefficient: float = 0.001
    """λ."""
    alpha: float = 0.1
    kappa_low: float = 0.0
    kappa_high: float = 2.0
    gamma: float = 3.0
    penalty: Literal["hinge", "indicator"] = "hinge"
    per_turn: bool = False
    append: Literal["after", "before"] = "after"
    beta: Literal["paper", "official", "constant"] = "paper"
    gate_turn: int | None = None
    mode: str = "turn-mean"
    pad: int | None = None
    history_kind: Literal["cumulative", "window", "ema"] = "cumulative"
    history_window: int = 10
    history_decay: float = 0.9
    history: list[ByTurn] = field(default_factory=list)
    """``H̄_k`` of every step so far."""
    first: int = 0
    """k of the first of them."""

    def phase(self, step: int) -> float:
        if self.beta == "paper":
            return phase_weight(step, self.total_steps, self.gamma)
        return official_phase_weight(step) if self.beta == "official" else 1.0

    def step(self, trajectories: list[Trajectory]) -> Loss:
        """``-λ (L^H - β_k L^smooth)`` of RL step k (Eq. 2, 4, 6); then the step joins the history."""
        beta = self.phase(self.first + len(self.history))
        now = step_entropy(trajectories, per_turn=self.per_turn, pad=self.pad)
        known = [*self.history, now] if self.append == "before" else self.history
        reference = reference_entropy(known, self.history_kind, self.history_window, self.history_decay)
        last_turn = max(turn.index for trajectory in trajectories for turn in trajectory.turns)
        gated = self.gate_turn is not None and last_turn < self.gate_turn
        measure = hinge if self.penalty == "hinge" else indicator
        losses, slopes = {}, {}
        for trajectory in trajectories:
            for turn in trajectory.turns:
                for token in turn.tokens:
                    loss, derivative = -token.entropy, -1.0
                    mean = reference.get(turn.index if self.per_turn else 0)
                    if mean is not None and not gated:
                        p, by_entropy = measure(token.entropy, self.kappa_low * mean, self.kappa_high * mean)
                        loss += beta * self.alpha * p
                        derivative += beta * self.alpha * by_entropy
                    losses[token.place] = self.coefficient * loss
                    slopes[token.place] = self.coefficient * derivative
        self.history.append(now)
        return Loss(aggregate(trajectories, losses, self.mode), entropy=slope(trajectories, slopes, self.mode))

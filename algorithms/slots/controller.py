"""Slot 10, controllers: what a recipe remembers and schedules.

- ``EntropyHistory``: EPO's reference entropy and phase weight.
- ``phase_weight``, ``official_phase_weight``: β_k of the paper and of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batch import Minibatch
from ..selectors import reaches_turn
from ..signals import turn_entropy
from .registry import register


def phase_weight(step: int, total_steps: int, gamma: float) -> float:
    """``β_k = 1 + exp(-γ k / ⌊K/2⌋)``, falling from 2 towards 1 (EPO v2, Eq. 5)."""
    return 1 + math.exp(-gamma * step / max(total_steps // 2, 1))


def official_phase_weight(step: int) -> float:
    """The released code's weight for its fixed 150 steps, which falls to 0 and jumps down after step 75."""
    if step <= 75:
        return 1 - 0.2 * (1 - math.exp(-2 * step / 75))
    return 0.8 * math.exp(-3 * (step - 75) / 75)


@register("controller", "entropy_history")
@dataclass(kw_only=True)
class EntropyHistory:
    """Mean action entropy of every RL step so far, and the weight β of its corridor.

    Supplies ``epo/beta``, ``epo/where`` (``[B, L]`` bool) and ``epo/reference``: ``[B, L]``, NaN for turns
    that no earlier step reached, or None while the history is empty.
    """

    name: ClassVar[str] = "entropy_history"
    total_steps: int
    gamma: float = 3.0
    beta: Literal["paper", "official", "constant"] = "paper"
    reference: Literal["scalar", "per_turn"] = "scalar"
    append: Literal["after", "before"] = "after"
    """``before``: the reference already includes the current batch."""
    kind: Literal["cumulative", "window", "ema"] = "cumulative"
    """Which steps the reference is a mean of: all, the last ``window``, or all with weights that fall by ``decay``. A
    step in which nobody reached a turn says nothing about it; one that nobody reached in ``window`` steps has no
    reference."""
    window: int = 10
    decay: float = 0.9
    gate_turn: int | None = None
    """The penalty is off unless some row of the batch reaches this turn."""
    pad_turns: int | None = None
    """Shift each step's turns to the end of a vector of this length and fill its front with 0 (released
    code)."""
    history: list[list[float]] = field(default_factory=list, init=False, repr=False)
    """One vector over turns per step, or of one entry in scalar mode; NaN where nobody acted."""
    pending: list[list[float]] = field(default_factory=lambda: [[], []], init=False, repr=False)
    """Sums and numbers of token entropies in this step's batches."""

    def begin(self, batch: Minibatch, step: int) -> dict[str, Any]:
        sums, counts = turn_entropy(batch, self.reference == "per_turn")
        self.pending = [_add(old, new.tolist()) for old, new in zip(self.pending, (sums, counts), strict=True)]
        history = [*self.history, self._current()] if self.append == "before" else self.history
        scalars: dict[str, Any] = {
            "epo/beta": self._beta(step),
            "epo/where": batch.mask,
            "epo/reference": None,
        }
        if self.gate_turn is not None:
            scalars["epo/where"] = reaches_turn(batch, self.gate_turn)
        if history:
            means = self._summary(history)
            known = [mean for mean in means if not math.isnan(mean)]
            scalars["epo/reference"] = self._spread(batch, means)
            scalars["epo/reference_mean"] = math.fsum(known) / len(known) if known else math.nan
        return scalars

    def end(self, metrics: Mapping[str, float]) -> None:
        if any(self.pending[1]):
            self.history.append(self._current())
        self.pending = [[], []]

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [list(entry) for entry in self.history],
            "pending": [list(part) for part in self.pending],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = [list(entry) for entry in state["history"]]
        self.pending = [list(part) for part in state["pending"]]

    def _current(self) -> list[float]:
        means = [total / number if number else math.nan for total, number in zip(*self.pending, strict=True)]
        return means if self.pad_turns is None else [0.0] * (self.pad_turns - len(means)) + means

    def _summary(self, history: Sequence[Sequence[float]]) -> list[float]:
        """The reference at each turn."""
        if self.kind == "ema":
            return _moving(history, self.decay)
        return _mean(history[-self.window :] if self.kind == "window" else history)

    def _beta(self, step: int) -> float:
        if self.beta == "paper":
            return phase_weight(step, self.total_steps, self.gamma)
        return official_phase_weight(step) if self.beta == "official" else 1.0

    def _spread(self, batch: Minibatch, means: Sequence[float]) -> Tensor:
        table = torch.tensor([*means, math.nan], dtype=torch.float64, device=batch.mask.device)
        if self.reference == "scalar":
            return table[0].expand(batch.mask.shape)
        # Off the mask the turn is -1 and reads the NaN at the end, as does a turn beyond the table.
        return table[torch.where(batch.turn < len(means), batch.turn, -1)]


def _add(left: Sequence[float], right: Sequence[float]) -> list[float]:
    size = max(len(left), len(right))
    padded = ([*part, *[0.0] * (size - len(part))] for part in (left, right))
    return [a + b for a, b in zip(*padded, strict=True)]


def _mean(history: Sequence[Sequence[float]]) -> list[float]:
    """Mean over steps at each turn, of the steps that reached it."""
    means = []
    for turn in range(max(map(len, history))):
        reached = [entry[turn] for entry in history if turn < len(entry) and not math.isnan(entry[turn])]
        means.append(math.fsum(reached) / len(reached) if reached else math.nan)
    return means


def _moving(history: Sequence[Sequence[float]], decay: float) -> list[float]:
    """At each turn ``m ← decay m + (1 - decay) H`` over the steps that reached it, from the first one's H on."""
    means: list[float] = []
    for entry in history:
        means += [math.nan] * (len(entry) - len(means))
        for turn, value in enumerate(entry):
            if not math.isnan(value):
                means[turn] = value if math.isnan(means[turn]) else decay * means[turn] + (1 - decay) * value
    return means

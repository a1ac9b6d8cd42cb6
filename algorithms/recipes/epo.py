"""EPO: an entropy bonus, bounded by a corridor around the entropy of all steps so far (2509.22576 v2).

Where the released code differs from the paper, the ``official`` preset follows the code:

- its penalty is piecewise constant and so has no gradient: only the entropy bonus acts;
- its reference is a vector over turns that includes the current batch;
- its β is fixed to 150 steps and falls to 0, where the paper's falls from 2 to 1;
- the penalty is off unless some row reaches turn 25 (per micro-batch there, per batch here).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..recipe import Method, register
from ..slots import Slots, use
from ..slots.aggregation import Mode


@register("epo")
class EPO(Method):
    """Adds ``-λ (L^H - β_k L^smooth)`` to its base."""

    summary: ClassVar = "entropy bonus with a corridor around the running mean of past entropies"
    equations: ClassVar = (
        "loss = base - λ (L^H - β_k L^smooth)",
        "L^H = agg(H), L^smooth = agg(α P), agg: token -> turn -> trajectory -> batch mean",
        "P = (κ_l H̄ - H)+ + (H - κ_r H̄)+, H̄ = mean over earlier steps of their mean action entropy",
        "history window: H̄ over the last history_window steps; ema: H̄ <- history_decay H̄ + (1 - history_decay) H",
        "β_k = 1 + exp(-γ k / floor(K / 2))",
    )
    sources: ClassVar = (
        "EPO, arXiv 2509.22576 v2, Eq. 2-6 and Algorithm 1",
        "WujiangXu/EPO at 5b6fa98 (official)",
    )
    base: ClassVar = "grpo"
    presets: ClassVar = {
        "paper": {},
        "corridor": {"alpha": 2.0, "kappa_low": 0.5, "kappa_high": 1.5},
        "official": {
            "kappa_low": 0.5,
            "kappa_high": 1.5,
            "penalty": "indicator",
            "reference": "per_turn",
            "append": "before",
            "beta": "official",
            "gate_turn": "half",
            "agg": "token-mean",
            "pad_turns": True,
        },
    }

    entropy_coef: float = Field(0.001, ge=0)
    """λ, weight of the whole term."""
    alpha: float = Field(0.1, ge=0)
    """α, weight of the penalty. Above the corridor the term pushes entropy down only if ``α β_k > 1``."""
    kappa_low: float = Field(0.0, ge=0)
    """κ_l: lower end of the corridor as a multiple of the reference."""
    kappa_high: float = Field(2.0, ge=0)
    """κ_r: upper end of the corridor as a multiple of the reference."""
    gamma: float = Field(3.0, ge=0)
    """γ, how fast β falls."""
    penalty: Literal["hinge", "indicator"] = "hinge"
    reference: Literal["scalar", "per_turn"] = "scalar"
    """One reference entropy, or one for each turn index."""
    append: Literal["after", "before"] = "after"
    """Whether the current step's entropy joins the reference after or before its own update."""
    history: Literal["cumulative", "window", "ema"] = "cumulative"
    """Which steps make the reference: all alike, as in the paper; the last ones; or all, older ones less and less."""
    history_window: int = Field(10, ge=1)
    """Steps that ``window`` looks back on."""
    history_decay: float = Field(0.9, ge=0, lt=1)
    """Share of the old reference in the next one, for ``ema``."""
    beta: Literal["paper", "official", "constant"] = "paper"
    """β_k; ``constant`` is 1."""
    gate_turn: Literal["none", "half"] = "none"
    """``half``: no penalty unless some row reaches turn ``max_turns // 2``."""
    max_turns: int = Field(50, ge=1)
    agg: Mode = "turn-mean"
    """Aggregation of both entropy terms."""
    pad_turns: bool = False
    """Right-align each step's turns in ``max_turns`` and count the missing front as 0, a fault of the
    released code."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        history = use(
            "controller",
            "entropy_history",
            total_steps=total_steps,
            gamma=self.gamma,
            beta=self.beta,
            reference=self.reference,
            append=self.append,
            kind=self.history,
            window=self.history_window,
            decay=self.history_decay,
            gate_turn=self.max_turns // 2 if self.gate_turn == "half" else None,
            pad_turns=self.max_turns if self.pad_turns else None,
        )
        bonus = use("regulariser", "entropy", coefficient=self.entropy_coef, agg=self.agg)
        corridor = use(
            "regulariser",
            "corridor",
            coefficient=self.entropy_coef * self.alpha,
            low=self.kappa_low,
            high=self.kappa_high,
            penalty=self.penalty,
            agg=self.agg,
        )
        return slots.extend(regularisers=(bonus, corridor), controllers=(history,))

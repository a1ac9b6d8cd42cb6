"""AEPO: ARPO with a budget split by entropy, a penalty on forks in a row, and an update that keeps the gradients of
clipped tokens and favours uncertain ones (2510.14545).

Where the released code differs from the paper, the ``official`` preset follows the code as its scripts run it:

- neither the split of the budget nor the advantage of uncertain tokens is on;
- the penalty counts the group's rounds in a row in which any episode was begun, where the paper counts the forks in a
  row of one chain, and the comparison is turned round: ``1 - α / (1 - 0.05 c) + β ΔH`` is the probability of a fork;
- all that ``arpo`` says of the released code.

The released code sets c back only when another task of the batch has begun an episode; here every round without a new
one does. With ``dynamic`` on it also rounds the split up and counts the root among the entropies after observations
(``monitor_rounding``, ``monitor_root``), and standardises entropies of the *current* weights over a micro-batch; that
is not followed: a statistic of a micro-batch depends on the memory of the machine. Its H_root comes from a separate
generation of at most 50 tokens; here the probe's first action serves.

The paper's text gives no P̂; a slope of 0.05 a fork is the released code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..recipe import Method, register
from ..slots import Slots, use
from .arpo import RELEASED, Forking


@register("aepo")
class AEPO(Forking):
    """Forks, the advantage's factor and the clip on top of its base."""

    summary: ClassVar = "ARPO balanced by entropy: split budget, penalised chains, clipped tokens keep their gradient"
    equations: ClassVar = (
        "m = M σ(β_m (H_root - mean H after observations)) fresh episodes of M, from one probe that is thrown away",
        "P = (α + β ΔH) (1 - P̂(l)), P̂(l) = penalty l, l forks in a row on the chain; fork Z times iff P > τ",
        "A'_t = A_t (1 + a (H_t - mean H) / std H), over all trained tokens of the batch",
        "l_t = max(-A' r, -A' clip(r, 1 - low, (1 + high) / sg(r) r)): where A' > 0 and r > 1 + high the gradient is"
        " (1 + high) A' grad logp",
    )
    sources: ClassVar = (
        "AEPO, arXiv 2510.14545 (pre-monitoring, branching penalty, clipping, entropy-aware advantage)",
        "official code released with ARPO, at 30efc15",
    )
    base: ClassVar = "grpo"
    presets: ClassVar = {
        "paper": {"factor_clamp": None},
        "official": RELEASED
        | {"rule": "reversed", "dynamic": False, "penalty_scope": "group", "entropy_advantage": 0.0},
    }

    dynamic: bool = True
    """Split the group between fresh episodes and forks by a probe; off, ``initial`` begin afresh."""
    monitor_beta: float = Field(0.5, ge=0)
    """β_m: how much the difference of entropies moves the split."""
    monitor_root: bool = False
    """Count the root in the mean entropy after observations too."""
    monitor_rounding: Literal["nearest", "up"] = "nearest"
    penalty: float = Field(0.05, ge=0)
    """P̂ of one fork."""
    penalty_scope: Literal["chain", "group"] = "chain"
    entropy_advantage: float = Field(0.2, ge=0)
    """a: weight of a token's standardised entropy in its advantage; 0 for none."""
    factor_clamp: tuple[float, float] | None = (0.0, 2.0)
    """Bounds of the factor on an advantage, so that none turns its sign; None for none."""

    @field_validator("factor_clamp")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("expected a lower and an upper bound, such as [0, 2]")
        return value

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        filled = self.with_forks(
            slots,
            monitor=self.dynamic,
            monitor_beta=self.monitor_beta,
            monitor_root=self.monitor_root,
            rounding=self.monitor_rounding,
            penalty=self.penalty,
            penalty_scope=self.penalty_scope,
        )
        # The bounds are the base's: AEPO changes the gradient beyond them.
        base: Any = slots.clip
        bounds = base.options if base.name == "ppo" else {}
        filled = filled.extend(clip=use("clip", "gradient_preserving", **bounds))
        if not self.entropy_advantage:
            return filled
        factor = use("shape", "entropy_factor", weight=self.entropy_advantage, clamp=self.factor_clamp)
        return filled.extend(shapes=(factor,))

    def objection(self, others: Mapping[str, Method]) -> str | None:
        if "gspo" in others:
            return "aepo bounds the ratio of each token, and gspo clips the ratio of whole sequences"
        if any(getattr(other, "clip", "ppo") == "none" for other in others.values()):
            return "aepo keeps the gradients that a clip takes away, and clip=none takes none"
        return None

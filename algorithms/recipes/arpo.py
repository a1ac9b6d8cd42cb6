"""ARPO: fork an episode where entropy rises after an observation, and learn from the tree by GRPO (2507.19849).

Where the released code differs from the paper, the ``official`` preset follows the code:

- entropies are sums over the ten most probable tokens, divided by the logarithm of the vocabulary's size;
- it judges the segment *before* the observation, so it reacts one turn late, and never at the first observation;
- the entropy that it compares with is the first one ever seen at the same place of a batch, of another task and by
  older weights from the second step on; here a place is that of the task in the step's list and the member's number;
- the rule is a coin that lands on fork with probability ``α + β ΔH``, where the paper's is a threshold;
- a group whose episodes have all ended is filled up one episode at a time.

Not followed: a trained end token that the code appends when the limit of tool calls is reached. Here a limit ends the
episode without a token. The paper's own numbers (α = τ) make its rule: fork where entropy is above the root's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..recipe import Method, register
from ..slots import Slots, use


class Forking(Method):
    """Options of rollouts that fork."""

    initial: int | None = Field(None, ge=1)
    """N: episodes of a group that begin afresh; half of them when None. The rest are forks, and fresh ones when all
    have ended before enough forks were made."""
    branches: int = Field(1, ge=1)
    """Z: forks of one decision."""
    alpha: float = 0.5
    """α, base of the rule ``P = α + β ΔH``."""
    beta: float = 0.2
    """β, weight of the rise of entropy."""
    tau: float = 0.5
    """τ, threshold of ``rule=threshold``."""
    probe_tokens: int = Field(20, ge=1)
    """k: tokens of an action whose entropy counts."""
    rule: Literal["threshold", "bernoulli", "reversed"] = "threshold"
    """Fork if ``P > τ``, or with probability P; ``reversed``: with probability ``1 - α / (1 - P̂) + β ΔH``."""
    scale: Literal["tokens", "vocab", "log_vocab"] = "tokens"
    """What the sum of entropy differences is divided by: the number of tokens, the vocabulary's size or its
    logarithm."""
    align: bool = True
    """Compare token i with the root's token i, as far as both go; off, sums over either's first tokens."""
    lookahead: bool = True
    """Judge the tokens after the observation; off, those of the action before it."""
    root: Literal["episode", "slot"] = "episode"
    """``slot``: compare with what first stood at this place of a batch, of whatever task."""
    separate_draws: bool = False
    """Decide for each of the Z forks anew."""
    top_up: Literal["together", "one"] = "together"
    """How a group that forked too little is filled up."""
    entropy_top_k: int = Field(0, ge=0)
    """0 for exact entropies; else the estimate from the most probable tokens, as servers give it."""
    credit: Literal["soft", "hard"] = "soft"
    """``hard``: a token before a fork gets the mean advantage of all episodes that go through it. ``soft``: each
    episode trains its copy with its own."""
    deduplicate: bool = False
    """Weigh a token that d episodes share by 1 / d."""

    def with_forks(self, slots: Slots, **options: Any) -> Slots:
        """``slots`` with a sampler that forks, and the credit of what is shared."""
        own = set(Forking.model_fields) - {"credit", "deduplicate"}
        sampler = use("sampler", "fork", **{name: getattr(self, name) for name in sorted(own)}, **options)
        filled = slots.extend(samplers=(sampler,))
        if self.credit == "hard":
            # Part of the base's credit, so before what other methods make of advantages, wherever they are named.
            white = sum(getattr(shape, "name", None) == "whiten" for shape in slots.shapes)
            shapes = (*slots.shapes[:white], use("shape", "shared_prefix_mean"), *slots.shapes[white:])
            filled = dataclasses.replace(filled, shapes=shapes)
        if self.deduplicate:
            filled = filled.extend(weights=(use("weight", "shared"),))
        return filled


RELEASED: dict[str, Any] = {
    "rule": "bernoulli",
    "scale": "log_vocab",
    "align": False,
    "lookahead": False,
    "root": "slot",
    "separate_draws": True,
    "top_up": "one",
    "entropy_top_k": 10,
}
"""What the released code of both methods does; names options of ``Forking``."""


@register("arpo")
class ARPO(Forking):
    """Forks on top of its base, which is GRPO in the paper."""

    summary: ClassVar = "episodes fork, world and all, where entropy rises after an observation"
    equations: ClassVar = (
        "ΔH = sum_i<=k (H_t,i - H_root,i) / scale, first k tokens after an observation and of the first action",
        "P = α + β ΔH; fork Z times iff P > τ, until N fresh episodes and forks make M",
        "soft: A of each episode's own return; hard: a token of d episodes gets the mean of their A",
    )
    sources: ClassVar = (
        "ARPO, arXiv 2507.19849, Eq. 4-5 and Algorithm 1; hard and soft credit in 3.2 and appendix D.1",
        "RUC-NLPIR/ARPO at a95cd08 (official)",
    )
    base: ClassVar = "grpo"
    presets: ClassVar = {"paper": {"scale": "vocab"}, "official": RELEASED}

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        return self.with_forks(slots)

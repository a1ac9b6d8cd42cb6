"""Slot 8, regularisers: what the loss adds to the policy gradient.

- ``EntropyBonus``: reward the entropy of action tokens.
- ``Corridor``: penalise entropy outside a band around a reference that a controller supplies.
- ``ReferenceKL``: stay near a reference model. ``kl_estimate``: its estimators.
- ``ValueLoss``: teach the critic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import UsageError
from ..batch import Minibatch
from ..selectors import outside_band
from .aggregation import Mode
from .registry import register, use
from .signatures import Term

Estimator = Literal["k1", "k2", "k3", "k1+", "k3+"]


@register("regulariser", "entropy")
@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """``-coefficient · agg(H)``."""

    name: ClassVar[str] = "entropy"
    coefficient: float
    agg: Mode = "token-mean"

    def plan(self, batch: Minibatch, scalars: Mapping[str, Any]) -> Term:
        return Term(-self.coefficient * use("aggregation", self.agg)(batch, batch.mask))

    def value(
        self, batch: Minibatch, term: Term, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
    ) -> Tensor:
        return entropy


@register("regulariser", "corridor")
@dataclass(frozen=True, kw_only=True)
class Corridor:
    """``coefficient · β · agg(P)``, where ``P`` is 0 for entropies in ``[low, high]`` times the reference.

    ``hinge``: ``P = (low·ref - H)₊ + (H - high·ref)₊`` (EPO v2, Eq. 3). ``indicator``: ``P = 1`` outside the
    open band, which has no gradient (EPO's released code). β, the reference ``[B, L]`` (NaN or absent: no
    penalty) and where it applies are the controller's scalars ``epo/beta``, ``epo/reference`` and
    ``epo/where``.
    """

    name: ClassVar[str] = "corridor"
    coefficient: float
    low: float
    high: float
    penalty: Literal["hinge", "indicator"] = "hinge"
    agg: Mode = "turn-mean"

    def plan(self, batch: Minibatch, scalars: Mapping[str, Any]) -> Term:
        reference: Tensor | None = scalars["epo/reference"]
        if reference is None:
            nothing = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
            return Term(nothing, {"low": nothing, "high": nothing})
        applies = scalars["epo/where"] & ~reference.isnan()
        share = torch.where(applies, use("aggregation", self.agg)(batch, batch.mask), 0.0)
        known = torch.where(applies, reference, 0.0)
        low, high = self.low * known, self.high * known
        outside = outside_band(batch.old_entropy, low, high, strict=self.penalty == "indicator")
        return Term(
            self.coefficient * scalars["epo/beta"] * share,
            {"low": low, "high": high},
            selected=applies & outside,
        )

    def value(
        self, batch: Minibatch, term: Term, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
    ) -> Tensor:
        low, high = term.inputs["low"], term.inputs["high"]
        if self.penalty == "hinge":
            return (low - entropy).relu() + (entropy - high).relu()
        return outside_band(entropy, low, high, strict=True).to(entropy.dtype)


@register("regulariser", "kl")
@dataclass(frozen=True, kw_only=True)
class ReferenceKL:
    """``coefficient · agg(KL(policy ‖ reference))`` by one of the estimators of ``kl_estimate``."""

    name: ClassVar[str] = "kl"
    coefficient: float
    estimator: Estimator = "k3"
    agg: Mode = "token-mean"

    def plan(self, batch: Minibatch, scalars: Mapping[str, Any]) -> Term:
        if batch.ref_logprobs is None:
            raise UsageError("the KL term needs ref_logprobs in the batch; set kl_coef=0 to train without one")
        return Term(self.coefficient * use("aggregation", self.agg)(batch, batch.mask))

    def value(
        self, batch: Minibatch, term: Term, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
    ) -> Tensor:
        assert batch.ref_logprobs is not None
        return kl_estimate(logprobs, torch.where(batch.mask, batch.ref_logprobs, 0), self.estimator)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator = "k3") -> Tensor:
    """KL of tokens sampled from the policy, in nats, with ``d = logprobs - ref_logprobs``.

    ``k1 = d``, ``k2 = d²/2``, ``k3 = exp(-d) + d - 1`` (clamped to ±10). With ``+`` the value is the named
    estimator's and the gradient that of k2, which is unbiased where k1's is zero in expectation.
    """
    d = logprobs - ref_logprobs
    if estimator.endswith("+"):
        half_square = d**2 / 2
        exact = kl_estimate(logprobs, ref_logprobs, estimator[:-1])  # type: ignore[arg-type]
        return half_square + (exact - half_square).detach()
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    clamped = (-d).clamp(-20, 20)
    return (clamped.exp() - clamped - 1).clamp(-10, 10)


@register("regulariser", "value")
@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """``coefficient · ½ agg(max((v - R)², (clip(v, V - c, V + c) - R)²))``, PPO's value loss as verl has it.

    ``v`` is the critic's value now, ``V`` the one that the batch was planned with, ``c`` is ``clip`` (None: no second
    argument of the maximum), and the target ``R`` is the credit before shapes plus ``V``.
    """

    name: ClassVar[str] = "value"
    coefficient: float = 1.0
    clip: float | None = 0.5
    agg: Mode = "token-mean"

    def plan(self, batch: Minibatch, scalars: Mapping[str, Any]) -> Term:
        if batch.values is None:
            raise UsageError("the value loss needs values in the batch, so the learner needs a critic")
        old = torch.where(batch.mask, batch.values, 0)
        share = use("aggregation", self.agg)(batch, batch.mask)
        return Term(self.coefficient * share, {"target": scalars["critic/target"], "old": old})

    def value(
        self, batch: Minibatch, term: Term, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
    ) -> Tensor:
        if values is None:
            raise UsageError("the value loss needs the critic's current values; Recipe.loss takes them as 'values'")
        target, old = term.inputs["target"], term.inputs["old"]
        error = (values - target) ** 2
        if self.clip is not None:
            near = values.clamp(old - self.clip, old + self.clip)
            error = torch.maximum(error, (near - target) ** 2)
        return error / 2

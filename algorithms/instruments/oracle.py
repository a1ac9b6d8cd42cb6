"""How an update changes entropy: predicted to first order, and measured at the same contexts.

- ``LogitSignals``, ``logit_signals``: the entropy discriminator of a step on logits. ``tabular_change``: what one
  sampled policy-gradient step does to the entropy of its own context, if every context had logits of its own.
- ``observed_update``: an update with ``oracle/…`` metrics: predicted, measured, and the tabular guess.
- ``first_order``: the change that a displacement of the weights predicts for each token.
- ``correlation_metrics``: how well predictions have come true so far.

Write H for the entropy of softmax(z), p for its probabilities and S_k = p_k (H + log p_k); then dH/dz_k = -S_k and
Σ S_k = 0. A policy-gradient step on a token k that was sampled with advantage A and importance ratio r moves the logits
by A r (e_k - p) times the step size, and with N = Σ_k p_k S_k = H Σ p² + Σ p² log p

    ΔH = -A r (S_k - N)    per unit of step size, exact to first order (2602.03392; the mean over k ~ p of it is the
                           covariance law of 2505.22617).

That is the step of a *table*. In a network all contexts share their weights θ, and a step for one moves the logits of
all others; clipping, regularisers and the optimiser's preconditioner change the step besides. What is predicted for a
network is therefore the directional derivative along the displacement that the optimiser really made,

    ΔH̄ = ∇_θ H̄(θ_before) · (θ_after - θ_before),    H̄ the mean over all trained tokens of the batch,

which is exact to first order in the displacement, whatever made it. What is measured is H̄(θ_after) - H̄(θ_before) with
the same tokens as contexts: nothing is sampled anew, so the two differ by the curvature of H̄ and by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError
from ..forward import predictors

if TYPE_CHECKING:
    from ..batch import Minibatch
    from ..learner import Learner

FEWEST_STEPS = 8
"""Steps before ``oracle/correlation`` is told."""
_TOKENS = 4096
"""Padded tokens of one pass for logits."""
_NUMBERS = 1 << 24
"""Logits in float64 that are looked at together; those of a pass are in the model's type, at trained tokens alone."""


@dataclass(frozen=True, eq=False)
class LogitSignals:
    """Of ``N`` sampled tokens, float64."""

    logprob: Tensor
    entropy: Tensor
    discriminator: Tensor
    """S of the sampled token: p (H + log p)."""
    expected: Tensor
    """N, the mean of S over the distribution."""


def logit_signals(logits: Tensor, target: Tensor, temperature: float = 1.0) -> LogitSignals:
    """Signals of softmax(``logits`` ``[N, V]`` / ``temperature``) at the tokens ``target`` ``[N]``."""
    logs = torch.log_softmax(logits.double() / temperature, -1)
    chances = logs.exp()
    entropy = -torch.special.xlogy(chances, chances).sum(-1)
    logprob = logs.gather(-1, target[:, None])[:, 0]
    squares = chances * chances
    expected = entropy * squares.sum(-1) + torch.where(squares > 0, squares * logs, 0).sum(-1)
    return LogitSignals(logprob, entropy, logprob.exp() * (entropy + logprob), expected)


def tabular_change(signals: LogitSignals, advantage: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
    """``[N]`` nats per unit of step size: -A r (S - N), the first-order change of each context's own entropy by the
    step on its own logits (those that were divided by the temperature)."""
    return -advantage * ratio * (signals.discriminator - signals.expected)


def observed_update(
    learner: Learner, batch: Minibatch, update: Callable[[], dict[str, float]], temperature: float = 1.0
) -> dict[str, float]:
    """Call ``update``, which trains ``learner`` on ``batch``, and add to its metrics, in nats a token:

    - ``oracle/predicted``: ∇H̄ · Δθ. ``oracle/measured``: H̄ after less H̄ before.
    - ``oracle/tabular``: mean of -w A (S - N) over tokens, w the weight of the token in the policy loss relative to a
      plain mean; per unit of step size, so its sign and its ups and downs are comparable, its size is not.

    It costs a forward and backward pass and two forward passes, about one and a half updates of one epoch; in memory a
    copy of the weights, one gradient, and the logits of some thousand tokens.
    """
    batch = batch.to(learner.device)
    count = int(batch.mask.sum())
    if not count:
        return update()
    signals = _signals(learner, batch, temperature)

    def mean_entropy(part: Minibatch, rows: Tensor, width: int, logprobs: Tensor, entropy: Tensor, values: Any) -> Any:
        return entropy.sum() / count, {"entropy": entropy.detach().double().sum() / count}

    before, gradient = learner.gradient(batch, mean_entropy)
    weights = [parameter.detach().clone() for parameter in learner.model.parameters()]
    metrics = update()
    predicted = sum(
        float(torch.dot(slope.flatten().double(), (parameter.detach() - old).flatten().double()))
        for slope, parameter, old in zip(gradient, learner.model.parameters(), weights, strict=True)
        if slope is not None
    )
    after = learner.score(batch)[1][batch.mask].double().sum() / count
    metrics = metrics | {"oracle/predicted": float(predicted), "oracle/measured": float(after - before["entropy"])}
    if learner.plan is None:
        return metrics
    weight = learner.plan.coefficients[batch.mask].double() * count
    tabular = tabular_change(signals, learner.plan.advantages[batch.mask].double() * weight)
    return metrics | {"oracle/tabular": float(tabular.mean())}


@torch.no_grad()
def first_order(
    learner: Learner, batch: Minibatch, displacement: Sequence[Tensor], size: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """Predicted and measured change of entropy of every trained token, each ``[N]`` float64, in nats.

    The prediction is the central difference (H(θ + εΔ) - H(θ - εΔ)) / 2ε, with ε = ``size``: the directional derivative
    to second order in ε. The measured change is H(θ + Δ) - H(θ). The weights are θ before and afterwards.

    Args:
        learner: holds the weights θ.
        batch: whose trained tokens are the contexts.
        displacement: Δ, one tensor for each of the model's parameters.
        size: small enough for the curvature, large enough for the rounding of the model's type.

    Raises:
        UsageError: the displacement does not fit the model.
    """
    parameters = list(learner.model.parameters())
    if [tuple(step.shape) for step in displacement] != [tuple(parameter.shape) for parameter in parameters]:
        raise UsageError("the displacement needs one tensor for each of the model's parameters, of its shape")
    batch = batch.to(learner.device)
    original = [parameter.clone() for parameter in parameters]

    def entropy_at(scale: float) -> Tensor:
        for parameter, start, step in zip(parameters, original, displacement, strict=True):
            parameter.copy_(start + scale * step)
        return learner.score(batch)[1][batch.mask].double()

    try:
        here, there, ahead, behind = (entropy_at(scale) for scale in (0.0, 1.0, size, -size))
    finally:
        for parameter, start in zip(parameters, original, strict=True):
            parameter.copy_(start)
    return (ahead - behind) / (2 * size), there - here


def correlation_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """``oracle/correlation`` and ``oracle/tabular_correlation``: Pearson's, of predicted and measured changes over the
    steps so far; steps where one is not finite do not count. Nothing before ``FEWEST_STEPS`` of them, or where one
    never varies."""
    known = [row for row in rows if "oracle/measured" in row]
    found = {}
    for name, label in (("predicted", "correlation"), ("tabular", "tabular_correlation")):
        pairs = [(row[f"oracle/{name}"], row["oracle/measured"]) for row in known if f"oracle/{name}" in row]
        both = np.asarray(pairs, np.float64).reshape(-1, 2)
        foretold, measured = both[np.isfinite(both).all(1)].T
        if len(measured) >= FEWEST_STEPS and foretold.std() > 0 and measured.std() > 0:
            found[f"oracle/{label}"] = float(np.corrcoef(foretold, measured)[0, 1])
    return found


@torch.no_grad()
def _signals(learner: Learner, batch: Minibatch, temperature: float) -> LogitSignals:
    """Of the trained tokens of ``batch``, in the order of its mask, from rows that are padded."""
    assert batch.tokens is not None
    signals = [torch.zeros(batch.mask.shape, dtype=torch.float64, device=learner.device) for _ in range(4)]
    extent = batch.extent
    for rows in batch.microbatches(_TOKENS):
        width = int(extent[rows].max())
        tokens, mask = batch.tokens[rows, :width], batch.mask[rows, :width]
        logits, target = _logits(learner.model, tokens, mask), tokens[mask]
        size = max(1, _NUMBERS // logits.shape[1])
        found = [
            vars(logit_signals(logits[start : start + size], target[start : start + size], temperature)).values()
            for start in range(0, len(target), size)
        ]
        for table, values in zip(signals, zip(*found, strict=True), strict=True):
            part = table.new_zeros(mask.shape)
            part[mask] = torch.cat(values)
            table[rows, :width] = part
    return LogitSignals(*(table[batch.mask] for table in signals))


def _logits(model: torch.nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """``[N, V]`` that the tokens in ``mask`` were drawn from: the head sees their contexts alone, since the logits of
    all would need far more memory."""
    wanted = predictors(mask)

    def gather(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, wanted)[None], *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)  # type: ignore[operator]
    try:
        return model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
    finally:
        hook.remove()

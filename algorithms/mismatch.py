"""How far the engine that sampled is from the learner that is trained.

- ``mismatch``: the differences of their log-probabilities, as metrics.

The two compute the same distribution in different ways: other kernels, other types, other batch shapes. What looks
like rounding makes training off-policy, and has made runs collapse; so it is measured in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch(learner: Tensor, sampler: Tensor, entropy: Tensor) -> dict[str, float]:
    """Compare the log-probabilities that learner and sampler give to the same sampled tokens.

    - ``mismatch/abs_mean``, ``mismatch/abs_max``: of their absolute difference in nats.
    - ``mismatch/ratio_p01``, ``_p50``, ``_p99``: quantiles of learner over sampler, before any truncation.
    - ``mismatch/kl``: KL(sampler || learner) in nats a token, the estimate r - 1 - log r (Schulman 2020).
    - ``mismatch/consistency``: mean of -log p - H under the learner, 0 in expectation exactly when the tokens were
      sampled from the learner's own distribution at that temperature; ``mismatch/consistency_z`` is its distance from
      0 in standard errors.

    Args:
        learner: [N] nats, under the weights that sampled, as the learner computes them.
        sampler: [N] nats, as the engine reported them.
        entropy: [N] nats, the learner's.

    Returns:
        Nothing when N is 0.
    """
    if not len(learner):
        return {}
    new, old = learner.double(), sampler.double()
    difference = new - old
    ratio = difference.clamp(-20, 20).exp()
    low, middle, high = ratio.quantile(torch.tensor([0.01, 0.5, 0.99], dtype=ratio.dtype, device=ratio.device)).tolist()
    surprise = -new - entropy.double()
    error = surprise.std() / len(surprise) ** 0.5 if len(surprise) > 1 else surprise.new_zeros(())
    return {
        "mismatch/abs_mean": float(difference.abs().mean()),
        "mismatch/abs_max": float(difference.abs().max()),
        "mismatch/ratio_p01": low,
        "mismatch/ratio_p50": middle,
        "mismatch/ratio_p99": high,
        "mismatch/kl": float((ratio - 1 - difference).mean()),
        "mismatch/consistency": float(surprise.mean()),
        "mismatch/consistency_z": float(surprise.mean() / error) if error > 0 else 0.0,
    }

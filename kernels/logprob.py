"""Log-probability of given tokens and entropy of their distribution, from logits.

- ``logprob_entropy``: both at once, differentiable, without a probability matrix kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UsageError, nearest

Backend = Literal["auto", "torch"]

_CHUNK_ELEMENTS = 1 << 21
"""Logits worked on at a time: 8 MB in fp32, so that the temporaries stay in the last-level cache."""

_FLOOR = -1e4
"""Stands for -inf where it is multiplied by its probability: exp(-1e4) is exactly 0 in every type."""


def logprob_entropy(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature)[target] and the entropy of that softmax, in nats.

    Statistics are computed in fp32 whatever the input type (float64 stays float64) and row by row, so a row's
    result depends on no other row. Tokens with logit -inf have probability 0 and add no entropy.

    Args:
        logits: [N, V], any floating type.
        target: int64[N] in [0, V).
        temperature: > 0.
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        (logprob[N], entropy[N]) in fp32, or float64 for float64 logits. Differentiable once in ``logits``.

    Raises:
        UsageError: shapes do not fit, the temperature is not positive or the backend is unknown.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise UsageError(
            f"logprob_entropy: logits {tuple(logits.shape)} and target {tuple(target.shape)}; expected [N, V] and [N]"
        )
    if not temperature > 0:
        raise UsageError(f"logprob_entropy: temperature is {temperature}; expected > 0")
    if backend not in ("auto", "torch"):
        raise UsageError(f"logprob_entropy: unknown backend '{backend}'{nearest(backend, ('auto', 'torch'))}")
    return _LogprobEntropy.apply(logits, target, temperature)


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _shifted(logits: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scaled logits minus their row maximum [n, V], and log of the sum of their exponentials [n, 1].

    Subtracting the maximum first keeps the log-probability exact to an ulp of its own size, also when all
    logits are hundreds away from zero.
    """
    z = logits.to(dtype) / temperature
    z = z - z.max(dim=-1, keepdim=True).values
    return z, z.exp().sum(dim=-1, keepdim=True).log()


class _LogprobEntropy(torch.autograd.Function):
    """Backward: dz = g_lp (onehot - p) - g_H p (log p + H), and dlogits = dz / temperature."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logprob = logits.new_empty(logits.shape[0], dtype=dtype)
        entropy = torch.empty_like(logprob)
        for rows in _chunks(*logits.shape):
            z, log_sum = _shifted(logits[rows], temperature, dtype)
            logprob[rows] = (z.gather(1, target[rows, None]) - log_sum)[:, 0]
            mean_z = (z.exp().mul_(z.clamp_min_(_FLOOR))).sum(dim=-1, keepdim=True)
            entropy[rows] = (log_sum - mean_z / log_sum.exp())[:, 0]
        ctx.save_for_backward(logits, target, entropy)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None]:
        logits, target, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _chunks(*logits.shape):
            z, log_sum = _shifted(logits[rows], ctx.temperature, entropy.dtype)
            g_logprob = grad_logprob[rows, None]
            g_entropy = grad_entropy[rows, None]
            logp = (z - log_sum).clamp_min_(_FLOOR)
            dz = logp.exp()
            dz.mul_(logp.add_(entropy[rows, None]).mul_(g_entropy).add_(g_logprob).neg_())
            dz.scatter_add_(1, target[rows, None], g_logprob)
            grad[rows] = dz.div_(ctx.temperature)
        return grad, None, None

"""Log-probability of given tokens and entropy of their distribution, from logits.

- ``LogprobEntropy``: what is returned.
- ``logprob_entropy``: all of it at once, differentiable, without a probability matrix kept for the backward pass.
- ``RowStatistics``, ``row_statistics``, ``row_gradient``: its two passes, for other operations on logits.
- ``check_temperature``: one temperature or one per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UsageError
from .dispatch import Backend, Form, resolve

_CHUNK_ELEMENTS = 1 << 21
"""Logits worked on at a time: 8 MB in fp32, so that the temporaries stay in the last-level cache."""

FLOOR = -1e4
"""Stands for -inf where it is multiplied by its probability: exp(-1e4) is exactly 0 in every type."""


class LogprobEntropy(NamedTuple):
    """One entry per row, fp32 (float64 for float64 logits), in nats, all of softmax(logits / temperature)."""

    logprob: Tensor
    """Of the target. Differentiable."""
    entropy: Tensor
    """Differentiable."""
    lse: Tensor
    """log of the sum of exp(logits / temperature): a token's log-probability is its logit / temperature - lse."""
    topk_logmass: Tensor | None
    """log of the mass of the ``topk_mass`` most probable tokens, <= 0; ``None`` where it was not asked for."""


class RowStatistics(NamedTuple):
    """Of logits / temperature; the log-sum-exp is ``maximum + log_sum``.

    The two are kept apart: a log-probability is then exact to an ulp of its own size, also when all logits are
    hundreds away from zero.
    """

    logprob: Tensor
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor


def logprob_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    topk_mass: int = 0,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> LogprobEntropy:
    """Return log softmax(logits / temperature)[target] and the entropy of that softmax, in nats, row by row.

    Statistics are computed in fp32 whatever the input type (float64 stays float64) and row by row, so a row's
    result depends on no other row. Tokens with logit -inf have probability 0 and add no entropy.

    Args:
        logits: [N, V], any floating type and strides.
        target: integer[N] in [0, V).
        temperature: > 0; one for all rows or [N].
        topk_mass: number of most probable tokens whose mass is wanted too; 0 for none.
        inplace_backward: write the gradient over ``logits``, which saves [N, V] of memory. Nothing may read them after
            the forward pass; autograd raises if another operation of the same graph needs them.
        backend: the Triton form takes every floating type but float64.

    Raises:
        UsageError: shapes do not fit, a temperature is not positive (where they lie on the CPU), ``topk_mass`` is out
            of range, or the backend cannot run here.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise UsageError(
            f"logprob_entropy: logits {tuple(logits.shape)} and target {tuple(target.shape)}; expected [N, V] and [N]"
        )
    check_temperature("logprob_entropy", temperature, logits.shape[0])
    if not 0 <= topk_mass <= logits.shape[1]:
        raise UsageError(f"logprob_entropy: topk_mass is {topk_mass}; expected 0 to {logits.shape[1]}, the vocabulary")
    if inplace_backward and 0 in logits.stride() and logits.numel() > 1:
        raise UsageError("logprob_entropy: inplace_backward needs logits that share no memory; expected no expand()")
    form = _form(logits, target, backend)
    logprob, entropy, maximum, log_sum = _LogprobEntropy.apply(logits, target, temperature, inplace_backward, form)
    mass = None
    if topk_mass:
        mass = _topk_logmass(logits.detach(), temperature, topk_mass, maximum, log_sum)
    return LogprobEntropy(logprob, entropy, maximum + log_sum, mass)


def check_temperature(operation: str, temperature: float | Tensor, rows: int) -> None:
    """Raise ``UsageError`` unless it is a positive number, or a vector of ``rows`` of them.

    A vector's values are looked at on the CPU alone: elsewhere that would wait for the device.
    """
    if isinstance(temperature, Tensor):
        if temperature.shape != (rows,) or not temperature.is_floating_point():
            raise UsageError(
                f"{operation}: temperature is {temperature.dtype} {tuple(temperature.shape)}; expected a number or "
                f"floating [{rows}]"
            )
        positive = temperature.device.type != "cpu" or bool((temperature > 0).all())
    else:
        positive = temperature > 0
    if not positive:
        raise UsageError(f"{operation}: temperature is {temperature}; expected > 0")


def _form(logits: Tensor, target: Tensor, backend: Backend) -> Form:
    form = resolve(backend, logits, target)
    if form == "triton" and logits.dtype == torch.float64:
        if backend == "triton":
            raise UsageError("the Triton form computes in float32 and takes no float64; use backend 'torch'")
        return "torch"
    return form


def row_statistics(logits: Tensor, target: Tensor, temperature: float | Tensor, form: Form) -> RowStatistics:
    """Return the statistics of logits [N, V]; no gradient is recorded."""
    if form == "triton":
        from ._triton import logprob as kernels

        with torch.cuda.device_of(logits):
            return RowStatistics(*kernels.forward(logits, target, inverse_temperature(temperature, logits)))
    dtype = statistics_dtype(logits)
    made = RowStatistics(*(logits.new_empty(logits.shape[0], dtype=dtype) for _ in RowStatistics._fields))
    for rows in _chunks(*logits.shape):
        z = _tempered(logits[rows], temperature, rows, dtype)
        maximum = z.amax(dim=-1, keepdim=True)
        z = z - maximum
        weight = z.exp()
        total = weight.sum(dim=-1, keepdim=True)
        log_sum = total.log()
        made.maximum[rows] = maximum[:, 0]
        made.log_sum[rows] = log_sum[:, 0]
        made.logprob[rows] = (z.gather(1, target[rows, None]) - log_sum)[:, 0]
        mean = weight.mul_(z.clamp_min_(FLOOR)).sum(dim=-1, keepdim=True) / total
        made.entropy[rows] = (log_sum - mean)[:, 0]
    return made


def row_gradient(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    statistics: RowStatistics,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    form: Form,
) -> None:
    """Write the gradient with respect to logits [N, V] to ``out``, which may be ``logits`` and may have another type.

    dz = g_lp (onehot - p) - g_H p (log p + H), and dlogits = dz / temperature; no gradient at all counts as zero.
    """
    if form == "triton":
        from ._triton import logprob as kernels

        inverse = inverse_temperature(temperature, logits)
        with torch.cuda.device_of(logits):
            kernels.backward(logits, target, inverse, *statistics[1:], grad_logprob, grad_entropy, out)
        return
    dtype = statistics.entropy.dtype
    for rows in _chunks(*logits.shape):
        z = _tempered(logits[rows], temperature, rows, dtype)
        logp = (z - statistics.maximum[rows, None]).sub_(statistics.log_sum[rows, None])
        dz = logp.exp()
        if grad_entropy is None:
            factor = grad_logprob[rows, None].neg() if grad_logprob is not None else logp.new_zeros(1)
        else:
            factor = logp.clamp_min_(FLOOR).add_(statistics.entropy[rows, None]).mul_(-grad_entropy[rows, None])
            if grad_logprob is not None:
                factor.sub_(grad_logprob[rows, None])
        dz.mul_(factor)
        if grad_logprob is not None:
            dz.scatter_add_(1, target[rows, None], grad_logprob[rows, None])
        out[rows] = _divide(dz, temperature, rows)


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inverse_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature in fp32 for each row of ``like``; one number is expanded."""
    if isinstance(temperature, Tensor):
        return temperature.to(like.device, torch.float32).reciprocal()
    return torch.full((1,), 1 / temperature, dtype=torch.float32, device=like.device).expand(like.shape[0])


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _tempered(logits: Tensor, temperature: float | Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    z = logits.to(dtype)
    if isinstance(temperature, Tensor):
        return z / temperature[rows, None].to(z)
    return z if temperature == 1 else z / temperature


def _divide(z: Tensor, temperature: float | Tensor, rows: slice) -> Tensor:
    """In place."""
    if isinstance(temperature, Tensor):
        return z.div_(temperature[rows, None].to(z))
    return z if temperature == 1 else z.div_(temperature)


def _topk_logmass(logits: Tensor, temperature: float | Tensor, k: int, maximum: Tensor, log_sum: Tensor) -> Tensor:
    """Of the k largest logits, log of the sum of their probabilities."""
    mass = torch.empty_like(log_sum)
    for rows in _chunks(*logits.shape):
        top = _tempered(logits[rows].topk(k, dim=-1).values, temperature, rows, mass.dtype)
        mass[rows] = (top - maximum[rows, None]).logsumexp(dim=-1) - log_sum[rows]
    return mass.clamp_max_(0)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, temperature: float | Tensor, inplace: bool, form: Any
    ) -> tuple[Tensor, ...]:
        statistics = row_statistics(logits, target, temperature, form)
        ctx.save_for_backward(logits, target, *statistics[1:])
        ctx.temperature, ctx.inplace, ctx.form = temperature, inplace, form
        ctx.mark_non_differentiable(statistics.maximum, statistics.log_sum)
        ctx.set_materialize_grads(False)
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        logits, target, *rest = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None
        logits = logits.detach()
        grad = logits if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        statistics = RowStatistics(rest[0], *rest)
        row_gradient(logits, target, ctx.temperature, statistics, grad_logprob, grad_entropy, grad, ctx.form)
        return grad, None, None, None, None

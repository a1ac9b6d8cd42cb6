"""The torch form of the fused head: tiles of logits, tokens by vocabulary, that fit the last-level cache.

- ``Head``: what both passes read beside the tensors that have gradients.
- ``forward``, ``backward``: of ``fused_linear_logprob``.
- ``RowGrads``: what the backward pass is given per row.
- ``full_logits``, ``Gradients``: whole rows of logits, and gradients that are added up from them.
- ``product``: a product of matrices with an fp32 result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import linear
from .logprob import FLOOR, statistics_dtype

_TILES = {"cpu": (1024, 2048), "cuda": (4096, 16384)}
"""Tokens and columns of a tile. 8 MB in fp32 stay in the last-level cache of a processor, beside the weights that they
are made from; a GPU wants few large products."""

_LOWEST = -1e30
"""Running maximum before the first tile: finite, so that differences from it are."""


class Head(NamedTuple):
    """Arguments of ``fused_linear_logprob`` after checks."""

    target: Tensor
    """integer[M] in [0, vocabulary)."""
    inverse: Tensor | None
    """1 / temperature, [M]; None is 1."""
    vocabulary: int
    softcap: float | None
    kept_ids: Tensor | None
    entropy: bool
    grad_dtype: torch.dtype | None


class RowGrads(NamedTuple):
    """Gradients of the results [M], where there are any, and the results that the derivatives contain."""

    logprob: Tensor | None
    entropy: Tensor | None
    mass: Tensor | None
    lse: Tensor
    entropies: Tensor | None
    masses: Tensor | None

    def coefficients(self, inverse: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Return (of onehot, of p (log p + H), of p restricted to the kept ids, of p), all over temperature."""
        scale = 1 if inverse is None else inverse
        onehot = None if self.logprob is None else self.logprob * scale
        entropy = None if self.entropy is None else -self.entropy * scale
        kept = None if self.mass is None or self.masses is None else self.mass * scale
        plain = torch.zeros_like(self.lse)
        for each in (onehot, kept):
            if each is not None:
                plain = plain - each
        return onehot, entropy, kept, plain


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Head
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return logprob, entropy (None unless wanted), log-sum-exp and kept log-mass (None without ``kept_ids``)."""
    count = x.shape[0]
    x = _widen(x)
    top = x.new_full((count,), _LOWEST, dtype=statistics_dtype(x))
    total, weighted, at_target = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    at_kept = None if head.kept_ids is None else top.new_full(head.kept_ids.shape, -torch.inf)
    tokens, width = _tile_sizes(x)
    for columns in _tiles(head.vocabulary, width):
        w = _widen(weight[columns])
        for rows in _tiles(count, tokens):
            z = _logits(x[rows], w, bias, head, rows, columns)
            place, inside = _local(head.target[rows], columns)
            at_target[rows] = torch.where(inside, z.gather(1, place[:, None])[:, 0], at_target[rows])
            if head.kept_ids is not None and at_kept is not None:
                place, inside = _local(head.kept_ids[rows], columns)
                at_kept[rows] = torch.where(inside, z.gather(1, place), at_kept[rows])
            old = top[rows]
            new = torch.maximum(old, z.amax(dim=1))
            z.sub_(new[:, None])
            mass = z.exp()
            fade = (old - new).exp_()
            mass_sum = mass.sum(dim=1)
            if head.entropy:
                if bias is not None:
                    z.clamp_min_(FLOOR)
                weighted[rows] = fade * (weighted[rows] + (old - new) * total[rows]) + mass.mul_(z).sum(dim=1)
            total[rows] = fade * total[rows] + mass_sum
            top[rows] = new
    log_sum = total.log()
    logprob = at_target - top - log_sum
    entropy = log_sum - weighted / total if head.entropy else None
    kept = None if at_kept is None else ((at_kept - top[:, None]).logsumexp(dim=1) - log_sum).clamp_max_(0)
    return logprob, entropy, top + log_sum, kept


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    given: RowGrads,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (fp32), weight (rounded once from fp32) and bias (fp32); None where not needed."""
    onehot, entropy, kept, plain = given.coefficients(head.inverse)
    dtype = plain.dtype
    grad_x = x.new_zeros(x.shape, dtype=dtype) if needs[0] else None
    grad_weight = weight.new_empty(weight.shape, dtype=head.grad_dtype or weight.dtype) if needs[1] else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if needs[2] else None
    wide, narrow = _widen(x), gradient_dtype(x)
    operand = x if narrow == x.dtype else wide
    tokens, width = _tile_sizes(x)
    for columns in _tiles(head.vocabulary, width):
        w = _widen(weight[columns])
        w_operand = weight[columns] if narrow == weight.dtype else w
        part = w.new_zeros(w.shape, dtype=dtype) if needs[1] else None
        for rows in _tiles(x.shape[0], tokens):
            z = _logits(wide[rows], w, bias, head, rows, columns)
            slope = _slope(z, head, rows)
            logp = z.sub_(given.lse[rows, None])
            additions = []
            if kept is not None and head.kept_ids is not None and given.masses is not None:
                place, inside = _local(head.kept_ids[rows], columns)
                share = (logp.gather(1, place) - given.masses[rows, None]).exp_().mul_(kept[rows, None])
                additions.append((place, share.where(inside, 0)))
            if onehot is not None:
                place, inside = _local(head.target[rows], columns)
                additions.append((place[:, None], onehot[rows].where(inside, 0)[:, None]))
            if entropy is not None and given.entropies is not None:
                dz = logp.exp()
                if bias is not None:
                    logp.clamp_min_(FLOOR)
                dz.mul_(logp.add_(given.entropies[rows, None]).mul_(entropy[rows, None]).add_(plain[rows, None]))
            else:
                dz = logp.exp_().mul_(plain[rows, None])
            for place, value in additions:
                dz.scatter_add_(1, place, value)
            if slope is not None:
                dz.mul_(slope)
            if grad_bias is not None:
                grad_bias[columns] += dz.sum(dim=0)
            dz = dz.to(narrow)
            if grad_x is not None:
                grad_x[rows] += product(dz, w_operand.T)
            if part is not None:
                part += product(dz.T, operand[rows].T)
        if grad_weight is not None and part is not None:
            grad_weight[columns] = part
    if grad_weight is not None:
        grad_weight[head.vocabulary :] = 0
    return grad_x, grad_weight, grad_bias


def full_logits(x: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """Return the logits [c, vocabulary] in fp32, after bias and soft cap, before temperature."""
    x = _widen(x)
    z = x.new_empty((x.shape[0], head.vocabulary), dtype=statistics_dtype(x))
    every = slice(0, x.shape[0])
    for columns in _tiles(head.vocabulary, 4 * _tile_sizes(x)[1]):
        z[:, columns] = _logits(x, _widen(weight[columns]), bias, head._replace(inverse=None), every, columns)
    return z


class Gradients(NamedTuple):
    """fp32 sums over chunks of rows; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype

    @classmethod
    def zeros(cls, x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> Gradients:
        dtype = statistics_dtype(x)
        hidden, weights, biases = (
            tensor.new_zeros(tensor.shape, dtype=dtype) if tensor is not None and need else None
            for tensor, need in zip((x, weight, bias), needs, strict=True)
        )
        return cls(hidden, weights, biases, dtype)

    def add(self, chunk: slice, dz: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add what the gradient ``dz`` [c, vocabulary] of the logits of the rows ``x`` gives."""
        narrow = gradient_dtype(x)
        operand = x.to(narrow)
        for columns in _tiles(dz.shape[1], 4 * _tile_sizes(x)[1]):
            part = dz[:, columns].to(narrow)
            if self.hidden is not None:
                self.hidden[chunk] += product(part, weight[columns].to(narrow).T)
            if self.weight is not None:
                self.weight[columns] += product(part.T, operand.T)
            if self.bias is not None:
                self.bias[columns] += dz[:, columns].sum(dim=0)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As ``backward`` returns it."""
        return self.hidden, self.weight, self.bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b.T [k, n], accumulated and returned in fp32 (float64 stays).

    16-bit operands lose nothing on a GPU. On the CPU their result is rounded to their type first: only gradients, whose
    factors are already rounded like that, are multiplied so.
    """
    if a.dtype == torch.float64 or a.numel() == 0 or b.numel() == 0:
        return a @ b.T
    if a.dtype == torch.float32:
        return linear.product(a, b) if linear.serves(a) else a @ b.T
    if a.is_cuda:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return (a @ b.T).float()


def gradient_dtype(x: Tensor) -> torch.dtype:
    """Type of the operands of the products that gradients come from."""
    if x.is_cuda:
        return x.dtype if _native(x) else torch.float32
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return x.dtype
    return statistics_dtype(x)


def _native(x: Tensor) -> bool:
    """Whether a product of such operands can have an fp32 result (torch 2.8 and later, on a GPU)."""
    return x.dtype not in (torch.bfloat16, torch.float16) or hasattr(torch.ops.aten.mm, "dtype")


def _widen(x: Tensor) -> Tensor:
    """``x`` in a type whose products are not rounded below fp32."""
    return x if x.is_cuda and _native(x) else x.to(statistics_dtype(x))


def _tile_sizes(x: Tensor) -> tuple[int, int]:
    return _TILES["cpu" if x.device.type == "cpu" else "cuda"]


def _tiles(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _local(index: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Places within the tile, clamped to it, and which of them are real."""
    place = index.long() - columns.start
    inside = (place >= 0) & (place < columns.stop - columns.start)
    return place.clamp_(0, columns.stop - columns.start - 1), inside


def _logits(x: Tensor, w: Tensor, bias: Tensor | None, head: Head, rows: slice, columns: slice) -> Tensor:
    """One tile, after bias, soft cap and temperature."""
    z = product(x, w)
    if bias is not None:
        z.add_(bias[columns])
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return z if head.inverse is None else z.mul_(head.inverse[rows, None])


def _slope(z: Tensor, head: Head, rows: slice) -> Tensor | None:
    """Derivative of the soft cap where it gave ``z``."""
    if head.softcap is None:
        return None
    capped = z / head.softcap if head.inverse is None else z / (head.softcap * head.inverse[rows, None])
    return 1 - capped.square_()

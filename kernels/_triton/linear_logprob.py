"""The fused head on the GPU: logits live in registers, a tile at a time, and never reach memory.

- ``forward``, ``backward``: as in ``kernels.head_tiles``.
- ``forward_kernel``: product and running statistics over one part of the vocabulary.
- ``combine_kernel``: the parts of each row, in their order.
- ``gradient_kernel``: the gradient of some columns of logits, recomputed; cuBLAS multiplies it on.

The vocabulary is split at fixed places, whatever the number of tokens, so a row's bits depend on no other row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..head_tiles import Head, RowGrads, gradient_dtype, product


class Tile(NamedTuple):
    """Sizes of one program's tile of logits, and how it is compiled."""

    tokens: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 2)}
"""By bytes per input. On sm_90 the larger ones that come to mind (128x256, verl's choice) spill registers."""

SPLIT = 1024
"""Columns of one part of the vocabulary, for one program."""

SLICE = 8192
"""Columns whose gradient is in memory at a time."""


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    row,
    column,
    depth,
    vocabulary,
    softcap,
    stride_hidden,
    stride_weight,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile before temperature, fp32; rows and columns are clamped to what exists."""
    k = tl.arange(0, DEPTH)
    a = hidden + row.to(tl.int64)[:, None] * stride_hidden + k[None, :]
    known = tl.minimum(column, vocabulary - 1)
    b = weight + known.to(tl.int64)[None, :] * stride_weight + k[:, None]
    z = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            left = tl.load(a)
            right = tl.load(b)
        else:
            left = tl.load(a, mask=k[None, :] < depth - start, other=0.0)
            right = tl.load(b, mask=k[:, None] < depth - start, other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        z = tl.dot(left, right, z, input_precision="ieee")
        a += DEPTH
        b += DEPTH
    if HAS_BIAS:
        z += tl.load(bias + known).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@triton.jit
def forward_kernel(
    hidden,
    weight,
    bias,
    target,
    inverse,
    tops,
    totals,
    weighteds,
    at_target,
    count,
    depth,
    vocabulary,
    softcap,
    stride_hidden,
    stride_weight,
    stride_inverse,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tokens vary fastest over the grid: the weights of a part are read once, while the hidden states stay in L2."""
    tiles = tl.cdiv(count, TOKENS)
    part = tl.program_id(0) // tiles
    index = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    real = index < count
    row = tl.minimum(index, count - 1)
    scale = tl.load(inverse + row * stride_inverse)
    wanted = tl.load(target + row).to(tl.int32)
    top = tl.full([TOKENS], -1e30, tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    weighted = tl.zeros([TOKENS], tl.float32)
    found = tl.zeros([TOKENS], tl.float32)
    first = part * SPLIT
    last = tl.minimum(first + SPLIT, vocabulary)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = _logits(
            hidden, weight, bias, row, column, depth, vocabulary, softcap, stride_hidden, stride_weight,
            HAS_BIAS, HAS_SOFTCAP, EVEN, UPCAST, TOKENS, COLUMNS, DEPTH,
        )  # fmt: skip
        z = tl.where(column[None, :] < last, z * scale[:, None], float("-inf"))
        found += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        new = tl.maximum(top, tl.max(z, 1))
        z = z - new[:, None]
        mass = tl.exp(z)
        gap = top - new
        fade = tl.exp(gap)
        if HAS_ENTROPY:
            floored = tl.where(z < -1e4, -1e4, z)
            weighted = fade * (weighted + gap * total) + tl.sum(mass * floored, 1)
        total = fade * total + tl.sum(mass, 1)
        top = new
    place = part.to(tl.int64) * count + index
    tl.store(tops + place, top, mask=real)
    tl.store(totals + place, total, mask=real)
    if HAS_ENTROPY:
        tl.store(weighteds + place, weighted, mask=real)
    # Each target lies in one part.
    tl.store(at_target + index, found, mask=real & (wanted >= first) & (wanted < last))


@triton.jit
def combine_kernel(
    tops,
    totals,
    weighteds,
    at_target,
    logprob,
    entropy,
    lse,
    count,
    parts,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the results; their parts are added in order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = index < count
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    place = index.to(tl.int64)
    for _ in range(0, parts):
        other = tl.load(tops + place, mask=real, other=0.0)
        new = tl.maximum(top, other)
        own_gap = top - new
        own_fade = tl.exp(own_gap)
        gap = other - new
        fade = tl.exp(gap)
        mass = tl.load(totals + place, mask=real, other=1.0)
        if HAS_ENTROPY:
            term = tl.load(weighteds + place, mask=real, other=0.0)
            weighted = own_fade * (weighted + own_gap * total) + fade * (term + gap * mass)
        total = own_fade * total + fade * mass
        top = new
        place += count
    log_sum = tl.log(total)
    tl.store(logprob + index, (tl.load(at_target + index, mask=real, other=0.0) - top) - log_sum, mask=real)
    tl.store(lse + index, top + log_sum, mask=real)
    if HAS_ENTROPY:
        tl.store(entropy + index, log_sum - weighted / total, mask=real)


@triton.jit
def gradient_kernel(
    hidden,
    weight,
    bias,
    target,
    inverse,
    lse,
    entropy,
    onehot,
    entropy_factor,
    plain,
    out,
    count,
    depth,
    first,
    last,
    softcap,
    stride_hidden,
    stride_weight,
    stride_inverse,
    stride_out,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of the gradient of the raw logits in the columns [first, last)."""
    tiles = tl.cdiv(count, TOKENS)
    start = first + (tl.program_id(0) // tiles) * COLUMNS
    index = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    row = tl.minimum(index, count - 1)
    column = start + tl.arange(0, COLUMNS)
    z = _logits(
        hidden, weight, bias, row, column, depth, last, softcap, stride_hidden, stride_weight,
        HAS_BIAS, HAS_SOFTCAP, EVEN, UPCAST, TOKENS, COLUMNS, DEPTH,
    )  # fmt: skip
    logp = z * tl.load(inverse + row * stride_inverse)[:, None] - tl.load(lse + row)[:, None]
    factor = tl.load(plain + row)[:, None]
    dz = tl.exp(logp)
    if HAS_ENTROPY:
        logp = tl.where(logp < -1e4, -1e4, logp)
        factor = factor + tl.load(entropy_factor + row)[:, None] * (logp + tl.load(entropy + row)[:, None])
    chosen = column[None, :] == tl.load(target + row).to(tl.int32)[:, None]
    dz = dz * factor + tl.where(chosen, tl.load(onehot + row)[:, None], 0.0)
    if HAS_SOFTCAP:
        dz = dz * (1.0 - (z / softcap) * (z / softcap))
    place = out + index.to(tl.int64)[:, None] * stride_out + (column - first)[None, :]
    tl.store(place, dz.to(out.dtype.element_ty), mask=(index < count)[:, None] & (column < last)[None, :])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Head
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return logprob, entropy (None unless wanted), log-sum-exp and kept log-mass (None without ``kept_ids``)."""
    x, weight = _rows_contiguous(x), _rows_contiguous(weight)
    count, depth = x.shape
    parts = triton.cdiv(head.vocabulary, SPLIT)
    tops, totals, weighteds = (
        torch.empty((parts, count), dtype=torch.float32, device=x.device) if wanted else x
        for wanted in (True, True, head.entropy)
    )
    at_target, logprob, entropy, lse = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(4))
    if count:
        tile = TILES[x.element_size()]
        inverse = _inverse(head, x)
        forward_kernel[(triton.cdiv(count, tile.tokens) * parts,)](
            x,
            weight,
            x if bias is None else bias.contiguous(),
            head.target.contiguous(),
            inverse,
            tops,
            totals,
            weighteds,
            at_target,
            count,
            depth,
            head.vocabulary,
            head.softcap or 1.0,
            x.stride(0),
            weight.stride(0),
            inverse.stride(0),
            HAS_ENTROPY=head.entropy,
            SPLIT=SPLIT,
            **_options(x, bias, head, tile),
        )
        combine_kernel[(triton.cdiv(count, 128),)](
            tops, totals, weighteds, at_target, logprob, entropy, lse, count, parts,
            HAS_ENTROPY=head.entropy, BLOCK=128, num_warps=4,
        )  # fmt: skip
    mass = None
    if head.kept_ids is not None:
        mass = (_kept_logits(x, weight, bias, head)[0].logsumexp(dim=1) - lse).clamp_max_(0)
    return logprob, entropy if head.entropy else None, lse, mass


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    given: RowGrads,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (fp32), weight (rounded once from fp32) and bias (fp32); None where not needed."""
    x, weight = _rows_contiguous(x), _rows_contiguous(weight)
    onehot, entropy_factor, kept, plain = given.coefficients(head.inverse)
    narrow = gradient_dtype(x)
    grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs[0] else None
    grad_weight = grad_bias = share = None
    if needs[1]:
        grad_weight = torch.empty(weight.shape, dtype=head.grad_dtype or weight.dtype, device=x.device)
        grad_weight[head.vocabulary :] = 0
    if needs[2]:
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device)
    if kept is not None and head.kept_ids is not None and given.masses is not None:
        z, slope = _kept_logits(x, weight, bias, head)
        share = (z - (given.lse + given.masses)[:, None]).exp_().mul_(kept[:, None])
        share = share if slope is None else share.mul_(slope)
    count, depth = x.shape
    tile = TILES[x.element_size()]
    inverse = _inverse(head, x)
    for first in range(0, head.vocabulary, SLICE):
        last = min(first + SLICE, head.vocabulary)
        dz = torch.empty((count, last - first), dtype=narrow, device=x.device)
        if count:
            gradient_kernel[(triton.cdiv(count, tile.tokens) * triton.cdiv(last - first, tile.columns),)](
                x,
                weight,
                x if bias is None else bias.contiguous(),
                head.target.contiguous(),
                inverse,
                given.lse,
                plain if given.entropies is None else given.entropies,
                torch.zeros_like(plain) if onehot is None else onehot.contiguous(),
                plain if entropy_factor is None else entropy_factor.contiguous(),
                plain.contiguous(),
                dz,
                count,
                depth,
                first,
                last,
                head.softcap or 1.0,
                x.stride(0),
                weight.stride(0),
                inverse.stride(0),
                dz.stride(0),
                HAS_ENTROPY=entropy_factor is not None,
                **_options(x, bias, head, tile),
            )
        if share is not None and head.kept_ids is not None:
            place = head.kept_ids.long() - first
            inside = (place >= 0) & (place < last - first)
            dz.scatter_add_(1, place.clamp_(0, last - first - 1), share.where(inside, 0).to(narrow))
        if grad_x is not None:
            grad_x += product(dz, weight[first:last].to(narrow).T)
        if grad_weight is not None:
            grad_weight[first:last] = product(dz.T, x.to(narrow).T)
        if grad_bias is not None:
            grad_bias[first:last] = dz.sum(dim=0, dtype=torch.float32)
    return grad_x, grad_weight, grad_bias


def _options(x: Tensor, bias: Tensor | None, head: Head, tile: Tile) -> dict[str, int | bool]:
    return {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "EVEN": x.shape[1] % tile.depth == 0,
        "UPCAST": interpreted() and x.dtype != torch.float32,
        "TOKENS": tile.tokens,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _inverse(head: Head, x: Tensor) -> Tensor:
    if head.inverse is None:
        return torch.ones(1, dtype=torch.float32, device=x.device).expand(x.shape[0])
    return head.inverse


def _kept_logits(x: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """Tempered logits [M, K] of the kept ids, -inf for padding, and the derivative of the soft cap there."""
    assert head.kept_ids is not None
    ids = head.kept_ids.long().clamp_min(0)
    z = torch.empty(ids.shape, dtype=torch.float32, device=x.device)
    step = max(1, (1 << 26) // max(1, ids.shape[1] * x.shape[1]))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        z[rows] = (x[rows, None].float() * weight[ids[rows]].float()).sum(dim=-1)
    if bias is not None:
        z += bias[ids]
    slope = None
    if head.softcap is not None:
        bent = (z / head.softcap).tanh_()
        z, slope = head.softcap * bent, 1 - bent * bent
    if head.inverse is not None:
        z *= head.inverse[:, None]
    return z.masked_fill_(head.kept_ids < 0, -torch.inf), slope

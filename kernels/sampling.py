"""Sampling from logits with given uniform numbers, and the statistics of each draw.

- ``Sample``: the drawn tokens and their statistics.
- ``sample``: temperature, top-k and top-p sampling by inverse distribution function.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .dispatch import Backend, resolve

_CHUNK_ELEMENTS = 1 << 18
"""Logits worked on at a time on the CPU: 1 MB in fp32."""

_memory = threading.local()
"""Each thread's scratch memory. Large temporaries would go back to the system after each draw, and getting them again
costs more than the arithmetic."""

_FLOOR = -1e4
"""Stands for -inf where it is multiplied by its probability: 2^-1e4 is exactly 0 in every type."""

_BELOW_ONE = 1 - 2.0**-52
"""A positive number times this is less than the number, in float64."""


class Sample(NamedTuple):
    """Drawn tokens; every vector has one entry per row, log-probabilities and entropies in nats.

    *raw* is softmax(logits), *tempered* softmax(logits / temperature), both over the full vocabulary;
    *processed* is the tempered distribution renormalised over the kept tokens, the one that is drawn from.
    Entropies are exact, or the estimates of ``sample``'s ``entropy_top_k``.
    """

    token: Tensor
    logprob_raw: Tensor
    logprob_tempered: Tensor
    logprob_processed: Tensor
    entropy_raw: Tensor
    entropy_tempered: Tensor
    entropy_processed: Tensor
    kept_logmass: Tensor
    """log of the tempered mass of the kept tokens, <= 0: logprob_tempered = logprob_processed + kept_logmass."""


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    entropy_top_k: int = 0,
    *,
    backend: Backend = "auto",
) -> Sample:
    """Draw one token per row; a row's draw depends on no other row.

    The token is the first whose cumulative probability, in vocabulary order and float64, exceeds the uniform.
    Top-k keeps ties with the k-th token; top-p then keeps the smallest set of most probable tokens that
    reaches the mass (Holtzman et al. 2020), always at least one; of equally probable tokens the first ones.
    Statistics are in fp32, or float64 for float64 logits, and carry no gradient.

    Servers such as vLLM give the log-probabilities of the k most probable tokens and of the drawn one. What such
    data say of the entropy is a lower estimate: −Σ p log p over them, not renormalised.

    Args:
        logits: [B, V], any floating type; -inf marks tokens that cannot be drawn. A row with NaN, +inf or nothing but
            -inf has NaN statistics and some token.
        uniforms: float64[B] in [0, 1).
        temperature: > 0, or 0 for the most probable token, with the statistics of temperature 1.
        top_k: tokens to keep; 0 keeps all.
        top_p: mass to keep, > 0; 1 keeps all.
        entropy_top_k: 0 for exact entropies, else that estimate from k tokens, and the drawn one where it is less
            probable than all of them; exact where k covers the vocabulary.
        backend: both forms draw the same token, up to the rounding of probabilities. float64 logits use torch.

    Raises:
        UsageError: shapes do not fit, a number is out of its range, or the backend cannot run here.
    """
    if logits.dim() != 2 or uniforms.shape != logits.shape[:1] or logits.shape[1] == 0:
        raise UsageError(
            f"sample: logits {tuple(logits.shape)} and uniforms {tuple(uniforms.shape)}; expected [B, V] and [B]"
        )
    for name, value, fits, expected in (
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_k", top_k, top_k >= 0, ">= 0, where 0 keeps all"),
        ("top_p", top_p, top_p > 0, "> 0, where 1 keeps all"),
        ("entropy_top_k", entropy_top_k, entropy_top_k >= 0, ">= 0, where 0 is exact"),
    ):
        if not fits:
            raise UsageError(f"sample: {name} is {value}; expected {expected}")
    logits, uniforms = logits.detach(), uniforms.double()
    if resolve(backend, logits, uniforms) == "triton" and logits.dtype != torch.float64:
        from ._triton.sampling import sample_rows

        return Sample(*sample_rows(logits, uniforms, temperature, top_k, top_p, entropy_top_k))
    count, vocabulary = logits.shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary) if logits.device.type == "cpu" else max(1, count)
    parts = [
        _sample(logits[row : row + step], uniforms[row : row + step], temperature, top_k, top_p, entropy_top_k)
        for row in range(0, max(1, count), step)
    ]
    return parts[0] if len(parts) == 1 else Sample(*map(torch.cat, zip(*parts, strict=True)))


def _sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, entropy_top_k: int
) -> Sample:
    x = logits
    if x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = _scratch("logits", x, logits.shape[1], dtype).copy_(logits)
    top = x.amax(dim=-1, keepdim=True)
    scale = temperature or 1.0
    vocabulary = x.shape[1]
    known = most_probable(x, entropy_top_k) if 0 < entropy_top_k < vocabulary else None

    exponents, weights = _weights(x, top, scale)
    cumulative = _cumulative(weights)
    total = cumulative[:, -1]
    keep = _kept(x, top, scale, top_k, top_p) if temperature else None
    kept = weights
    if keep is not None:
        kept = _scratch("kept", x, weights[0:1].numel()).view_as(weights).copy_(weights)
        kept.flatten(1)[:, :vocabulary].mul_(keep)
        cumulative = _cumulative(kept)
    if temperature:
        token = _first_above(cumulative, kept, uniforms).clamp_(max=vocabulary - 1)
    else:
        token = x.argmax(dim=-1, keepdim=True)
    drawn = x.gather(1, token)

    def statistics(
        exponents: Tensor, weights: Tensor, total: Tensor, known: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of the drawn token, and entropy."""
        total = total.to(x.dtype)
        logprob = ((drawn - top) / temperature)[:, 0] - total.log()
        if known is None:
            return logprob, _entropy(exponents, weights, total)
        return logprob, estimated_entropy(known, drawn, logprob, temperature)

    logprob, entropy = processed, processed_entropy = statistics(exponents, weights, total, known, scale)
    if keep is not None:
        mass = (cumulative[:, -1] / total).log().to(x.dtype)
        inside = None if known is None else most_probable(x.masked_fill(keep == 0, -torch.inf), entropy_top_k)
        processed, processed_entropy = statistics(exponents, kept, cumulative[:, -1], inside, scale)
    elif temperature:
        mass = torch.zeros_like(logprob)
    else:
        mass, processed = logprob, torch.zeros_like(logprob)
        processed_entropy = processed
    raw, raw_entropy = logprob, entropy
    if scale != 1:
        exponents, weights = _weights(x, top, 1.0)
        raw, raw_entropy = statistics(exponents, weights, _row_sum(weights), known, 1.0)
    return Sample(token[:, 0], raw, logprob, processed, raw_entropy, entropy, processed_entropy, mass)


def _weights(x: Tensor, top: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log2 of the weights exp((x - top) / temperature), at least ``_FLOOR``, and the weights.

    Both are [b, blocks, width], the vocabulary padded with weight 0 to whole blocks. Powers of two, since on the CPU
    they are four times as fast as ``exp``.
    """
    rows, vocabulary = x.shape
    width = max(64, round(math.sqrt(vocabulary) / 64) * 64)
    blocks = -(-vocabulary // width)
    exponents = _scratch("exponents", x, blocks * width)
    torch.sub(x, top, out=exponents[:, :vocabulary])
    exponents[:, vocabulary:] = _FLOOR
    exponents.mul_(math.log2(math.e) / temperature).clamp_min_(_FLOOR)
    weights = torch.exp2(exponents, out=_scratch("weights", x, blocks * width))
    return exponents.view(rows, blocks, width), weights.view(rows, blocks, width)


def _cumulative(weights: Tensor) -> Tensor:
    """Return the sum of the weights up to the end of each block, float64[b, blocks]."""
    wide = _scratch("wide", weights, weights.shape[1] * weights.shape[2], torch.float64)
    return wide.view_as(weights).copy_(weights).sum(dim=-1).cumsum(dim=-1)


def _row_sum(values: Tensor) -> Tensor:
    """Sum [b, blocks, width] to [b]; in two steps where threads would share the sum of a row that is alone."""
    partial = values.flatten(1) if values[0:1].numel() <= 1 << 15 else values.sum(dim=-1)
    return partial.sum(dim=-1)


def _first_above(cumulative: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token whose cumulative weight exceeds uniform · total, int64[b, 1].

    First its block, then its place in the block: only one block per row is summed token by token.
    """
    rows, blocks, width = weights.shape
    threshold = uniforms.clamp(max=_BELOW_ONE)[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=blocks - 1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
    start = torch.arange(0, rows * blocks, blocks, device=weights.device)
    inside = weights.view(-1, width).index_select(0, start + block[:, 0]).double().cumsum(dim=-1)
    # The two sums of a block may differ in their last bits: stay below its own.
    threshold = torch.minimum(threshold - before, inside[:, -1:] * _BELOW_ONE)
    return block.mul_(width).add_(torch.searchsorted(inside, threshold, right=True))


def _entropy(exponents: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Entropy of weights / total, [b]: log total - Σ w log w / total."""
    products = _scratch("products", weights, weights.shape[1] * weights.shape[2]).view_as(weights)
    return torch.addcdiv(total.log(), _row_sum(torch.mul(exponents, weights, out=products)), total, value=-math.log(2))


def _scratch(use: str, like: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return uninitialised memory [rows of ``like``, columns], on the CPU the same for each use."""
    count, dtype = len(like) * columns, dtype or like.dtype
    if like.device.type != "cpu":
        return like.new_empty(len(like), columns, dtype=dtype)
    known: Tensor | None = getattr(_memory, f"{use} {dtype}", None)
    if known is None or len(known) < count:
        # A tensor made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            known = torch.empty(count, dtype=dtype)
        setattr(_memory, f"{use} {dtype}", known)
    return known[:count].view(len(like), columns)


def most_probable(x: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest of each row of [b, V], in any order but the last, which is the least of them."""
    if x.device.type != "cpu" or count * 64 <= x.shape[1]:
        return x.topk(count, dim=-1).values
    # Of many values NumPy's selection takes a tenth of the time, and so does its sort.
    negated = torch.neg(x, out=_scratch("ordered", x, x.shape[1]))
    negated.numpy().partition(count - 1, axis=-1)
    return -negated[:, :count]


def estimated_entropy(known: Tensor, drawn: Tensor, logprob: Tensor, temperature: float) -> Tensor:
    """Return −Σ p log p over known tokens and the drawn one, [b].

    Args:
        known: logits [b, k], the last is the least. -inf adds nothing.
        drawn: logit [b, 1] of the drawn token; one that ties with the last known counts as known, since it is
            arbitrary which of equally probable tokens are.
        logprob: its log-probability [b].
        temperature: > 0.
    """
    logprobs = logprob[:, None] + (known - drawn) / temperature
    return -(_terms(logprobs).sum(dim=-1) + torch.where(drawn < known[:, -1:], _terms(logprob[:, None]), 0.0)[:, 0])


def _terms(logprobs: Tensor) -> Tensor:
    """p log p; impossible tokens (-inf) add nothing."""
    return logprobs.exp() * logprobs.clamp_min(_FLOOR)


def _kept(x: Tensor, top: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor | None:
    """Which tokens survive top-k and then top-p, 1 or 0 in x's type [b, V]; ``None`` when all do."""
    top_k = top_k if top_k < x.shape[1] else 0
    if top_p >= 1:
        return _at_least(x, most_probable(x, top_k)[:, -1:]) if top_k else None
    # Ascending, which searchsorted wants, so the most probable token first.
    ordered = torch.neg(x, out=_scratch("ordered", x, x.shape[1]))
    if x.device.type == "cpu":
        ordered.numpy().sort(axis=-1)
    else:
        ordered = ordered.sort(dim=-1).values
    mass = torch.add(ordered, top, out=_scratch("products", x, x.shape[1]))
    mass = mass.mul_(-math.log2(math.e) / temperature).exp2_()
    mass = _scratch("wide", x, x.shape[1], torch.float64).copy_(mass).cumsum_(dim=-1)
    if top_k:
        limit = torch.searchsorted(ordered, ordered[:, top_k - 1 : top_k].contiguous(), right=True).clamp_(min=1)
    else:
        limit = torch.full_like(ordered[:, :1], x.shape[1], dtype=torch.int64)
    # A token is kept while the mass before it is less than asked for.
    count = torch.searchsorted(mass, top_p * mass.gather(1, limit - 1)).add_(1).minimum(limit)
    last = ordered.gather(1, count - 1)
    keep = _at_least(x, -last)
    first, end = torch.searchsorted(ordered, last), torch.searchsorted(ordered, last, right=True)
    if x.device.type == "cpu" and torch.equal(count, end):
        return keep
    tied = x == -last
    return keep.masked_fill_(tied & (tied.cumsum(dim=-1) > count - first), 0)


def _at_least(x: Tensor, bound: Tensor) -> Tensor:
    """1 where x reaches the bound, else 0, in x's type, which is several times as fast as bool."""
    return torch.ge(x, bound, out=_scratch("keep", x, x.shape[1]))

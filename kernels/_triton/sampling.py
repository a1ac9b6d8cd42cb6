"""Sampling, one row per program: statistics, thresholds by search, and the draw.

- ``sample_rows``: the Triton form of ``kernels.sampling.sample``.
- ``sample_kernel``: its kernel.
- ``tiles``: its tile sizes for a vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import estimated_entropy, most_probable

WARPS = 8
"""Per program."""

_FLOOR = tl.constexpr(-1e4)
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(math.log2(math.e))
_LOWEST_KEY = tl.constexpr(-2139095041)
"""``_keys`` of -inf."""


def tiles(vocabulary: int) -> dict[str, int]:
    """Return the constants of ``sample_kernel`` that are sizes; a function of the vocabulary alone."""
    block = min(4096, max(256, triton.next_power_of_2(vocabulary)))
    return {
        "BLOCK": block,
        "BLOCKS": max(16, triton.next_power_of_2(triton.cdiv(vocabulary, block))),
        "SEARCH": min(1024, block),
        "PIVOTS": 8,
    }


def sample_rows(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, entropy_top_k: int
) -> tuple[Tensor, ...]:
    """Return the fields of ``Sample``; arguments as of ``sample``, checked, and not float64."""
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    integers = torch.empty(2, rows, dtype=torch.int64, device=logits.device)
    statistics = torch.empty(7, rows, dtype=torch.float32, device=logits.device)
    scale = temperature or 1.0
    top_p_high = float(torch.tensor(top_p, dtype=torch.float32))
    constants: dict[str, Any] = {
        **tiles(vocabulary),
        "GREEDY": temperature == 0,
        "TEMPERED": scale != 1,
        "TOP_K": temperature > 0 and 0 < top_k < vocabulary,
        "TOP_P": temperature > 0 and top_p < 1,
    }
    if rows:
        sample_kernel[(rows,)](
            logits,
            logits.stride(0),
            uniforms.contiguous(),
            integers,
            statistics,
            rows,
            vocabulary,
            scale,
            math.log2(math.e) / scale,
            top_k,
            top_p_high,
            top_p - top_p_high,
            **constants,
            num_warps=WARPS,
            num_stages=2,
        )
    token, kept = integers
    raw, tempered, processed, raw_entropy, tempered_entropy, processed_entropy, mass = statistics
    if 0 < entropy_top_k < vocabulary:
        x = logits.float()
        known = most_probable(x, entropy_top_k).sort(dim=-1, descending=True).values
        drawn = x.gather(1, token[:, None])
        raw_entropy = estimated_entropy(known, drawn, raw, 1.0)
        tempered_entropy = estimated_entropy(known, drawn, tempered, scale)
        if temperature:
            rank = torch.arange(entropy_top_k, device=x.device)
            inside = known.masked_fill(rank >= kept[:, None], -torch.inf)
            processed_entropy = estimated_entropy(inside, drawn, processed, scale)
    return token, raw, tempered, processed, raw_entropy, tempered_entropy, processed_entropy, mass


@triton.jit
def _load(row, start, size, BLOCK: tl.constexpr):
    """Load one block of a row in fp32, -inf beyond its end."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(row + column, mask=column < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _exponents(x, top, factor):
    """log2 of the weights; NaN stays."""
    z = (x - top) * factor
    return tl.where(z < _FLOOR, _FLOOR, z)


@triton.jit
def _keys(x):
    """Integers in the order of the numbers; both zeros have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _search(
    row, size, top, factor, low, low_count, low_mass, high, target, BY_MASS: tl.constexpr, MASSES: tl.constexpr,
    SEARCH: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Narrow [low, high) around the greatest key whose tokens of that key and above reach the target.

    Ends when one key or one token is left in it. Each round reads the row once and divides the interval by
    PIVOTS + 1. Returns the bounds, and for each the count and, with MASSES, the mass of the tokens at it and above.
    """
    high_count = low_count * 0
    high_mass = low_mass * 0.0
    place = tl.arange(0, PIVOTS)
    while (high - low > 1) & (low_count - high_count > 1):
        pivots = low + (high - low) * (place + 1).to(tl.int64) // (PIVOTS + 1)
        limits = pivots.to(tl.int32)
        counts = tl.zeros([SEARCH, PIVOTS], dtype=tl.int32)
        masses = tl.zeros([SEARCH, PIVOTS], dtype=tl.float32)
        for start in range(0, size, SEARCH):
            x = _load(row, start, size, SEARCH)
            inside = (start + tl.arange(0, SEARCH) < size)[:, None] & (_keys(x)[:, None] >= limits[None, :])
            counts += inside.to(tl.int32)
            if MASSES:
                masses += tl.where(inside, tl.exp2(_exponents(x, top, factor))[:, None], 0.0)
        count = tl.sum(counts, 0).to(tl.int64)
        mass = tl.sum(masses.to(tl.float64), 0)
        reached = mass >= target if BY_MASS else count >= target
        number = tl.sum(reached.to(tl.int32), 0)
        lower = place == number - 1
        upper = place == number
        low = tl.where(number > 0, tl.sum(tl.where(lower, pivots, 0), 0), low)
        low_count = tl.where(number > 0, tl.sum(tl.where(lower, count, 0), 0), low_count)
        low_mass = tl.where(number > 0, tl.sum(tl.where(lower, mass, 0.0), 0), low_mass)
        high = tl.where(number < PIVOTS, tl.sum(tl.where(upper, pivots, 0), 0), high)
        high_count = tl.where(number < PIVOTS, tl.sum(tl.where(upper, count, 0), 0), high_count)
        high_mass = tl.where(number < PIVOTS, tl.sum(tl.where(upper, mass, 0.0), 0), high_mass)
    return low, low_count, low_mass, high, high_count, high_mass


@triton.jit
def _first_above(cumulative, weights, threshold, SIZE: tl.constexpr):
    """First place of positive weight whose cumulative weight exceeds the threshold; the last one where none does.

    A sum by parallel scan need not grow from place to place in its last bits, hence the condition.
    """
    place = tl.arange(0, SIZE)
    first = tl.min(tl.where((cumulative > threshold) & (weights > 0), place, SIZE), 0)
    last = tl.max(tl.where(weights > 0, place, 0), 0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def _kept(x, start, size, low, high, allowed, ties, TIES: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens of a block are kept: keys from ``high``, and the first ``allowed`` of those from ``low``.

    ``ties`` counts those from ``low`` in the blocks before. Returns the choice and the count after this block.
    """
    key = _keys(x).to(tl.int64)
    keep = key >= high
    if TIES:
        tied = ((key >= low) & (key < high) & (start + tl.arange(0, BLOCK) < size)).to(tl.int64)
        keep = keep | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= allowed))
        ties += tl.sum(tied, 0)
    return keep, ties


@triton.jit
def sample_kernel(
    logits,
    stride,
    uniforms,
    integers,
    statistics,
    rows,
    size,
    temperature,
    factor,
    top_k,
    top_p_high,
    top_p_low,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEARCH: tl.constexpr,
    PIVOTS: tl.constexpr,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """Draw one token of one row.

    ``factor`` is log2(e) / temperature; ``top_p_high`` + ``top_p_low`` is top-p to 48 bits.
    Writes token and kept tokens to ``integers`` [2, rows], and to ``statistics`` [7, rows] the raw, tempered and
    processed log-probability, the three entropies and the kept log mass.
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        lanes = tl.maximum(lanes, _load(row, start, size, BLOCK))
    top = tl.max(lanes, 0)

    block_place = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], dtype=tl.float64)
    raw_sum = tl.zeros([BLOCK], dtype=tl.float32)
    raw_dot = tl.zeros([BLOCK], dtype=tl.float32)
    dot = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, size, BLOCK):
        x = _load(row, start, size, BLOCK)
        z = _exponents(x, top, factor)
        weight = tl.exp2(z)
        dot += weight * z
        sums = tl.where(block_place == start // BLOCK, tl.sum(weight.to(tl.float64), 0), sums)
        if TEMPERED:
            z = _exponents(x, top, _LOG2E)
            weight = tl.exp2(z)
            raw_sum += weight
            raw_dot += weight * z
        if GREEDY:
            first = tl.minimum(first, tl.where(x == top, start + tl.arange(0, BLOCK), 0x7FFFFFFF))
    full = tl.sum(sums, 0)
    total = full.to(tl.float32)
    entropy = tl.log(total) - _LN2 * (tl.sum(dot, 0) / total)
    raw_log_sum = tl.log(total)
    raw_entropy = entropy
    if TEMPERED:
        raw_total = tl.sum(raw_sum, 0)
        raw_log_sum = tl.log(raw_total)
        raw_entropy = raw_log_sum - _LN2 * (tl.sum(raw_dot, 0) / raw_total)

    count = tl.zeros([], dtype=tl.int64) + size
    low = tl.zeros([], dtype=tl.int64) + _LOWEST_KEY
    high = _keys(top).to(tl.int64) + 1
    allowed = count
    kept_total = total
    processed_entropy = entropy
    mass = total * 0.0
    if TOP_K or TOP_P:
        low_mass = full
        if TOP_K:
            target = tl.zeros([], dtype=tl.int64) + top_k
            low, count, low_mass, _, high_count, high_mass = _search(
                row, size, top, factor, low, count, low_mass, high, target, False, TOP_P, SEARCH, PIVOTS
            )
            if not TOP_P:
                high = low
        if TOP_P:
            target_mass = (tl.zeros([], dtype=tl.float64) + top_p_high + top_p_low) * low_mass
            low, count, low_mass, high, high_count, high_mass = _search(
                row, size, top, factor, low, count, low_mass, high, target_mass, True, True, SEARCH, PIVOTS
            )
            # One token is left in [low, high), or several of the key ``low``, of which the mass may need only some.
            bits = low.to(tl.int32)
            value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            each = tl.exp2(_exponents(value, top, factor)).to(tl.float64)
            ties = count - high_count
            needed = tl.ceil((target_mass - high_mass) / tl.where(each > 0, each, 1.0))
            allowed = tl.where((ties > 1) & (needed < ties), tl.maximum(needed, 1.0).to(tl.int64), ties)
            count = high_count + allowed
        ties = tl.zeros([], dtype=tl.int64)
        sums = tl.zeros([BLOCKS], dtype=tl.float64)
        ties_before = tl.zeros([BLOCKS], dtype=tl.int64)
        dot = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, size, BLOCK):
            x = _load(row, start, size, BLOCK)
            here = block_place == start // BLOCK
            ties_before = tl.where(here, ties, ties_before)
            keep, ties = _kept(x, start, size, low, high, allowed, ties, TOP_P, BLOCK)
            z = _exponents(x, top, factor)
            weight = tl.where(keep | (z != z), tl.exp2(z), 0.0)
            dot += weight * z
            sums = tl.where(here, tl.sum(weight.to(tl.float64), 0), sums)
        kept_sum = tl.sum(sums, 0)
        kept_total = kept_sum.to(tl.float32)
        processed_entropy = tl.log(kept_total) - _LN2 * (tl.sum(dot, 0) / kept_total)
        mass = tl.minimum(tl.log((kept_sum / full).to(tl.float32)), 0.0) + 0.0 * kept_total

    if GREEDY:
        token = tl.min(first, 0)
    else:
        cumulative = tl.cumsum(sums, 0)
        threshold = tl.load(uniforms + index) * tl.sum(tl.where(block_place == BLOCKS - 1, cumulative, 0.0), 0)
        block = _first_above(cumulative, sums, threshold, BLOCKS)
        before = tl.sum(tl.where(block_place == block - 1, cumulative, 0.0), 0)
        start = block * BLOCK
        x = _load(row, start, size, BLOCK)
        weight = tl.exp2(_exponents(x, top, factor))
        if TOP_K or TOP_P:
            ties = tl.sum(tl.where(block_place == block, ties_before, 0), 0)
            keep, ties = _kept(x, start, size, low, high, allowed, ties, TOP_P, BLOCK)
            weight = tl.where(keep, weight, 0.0)
        weights = weight.to(tl.float64)
        token = start + _first_above(tl.cumsum(weights, 0), weights, threshold - before, BLOCK)
    token = tl.minimum(token, size - 1)
    drawn = tl.load(row + token).to(tl.float32) - top
    logprob = drawn / temperature - tl.log(total)
    raw = drawn - raw_log_sum
    processed = drawn / temperature - tl.log(kept_total)
    if GREEDY:
        count = tl.zeros([], dtype=tl.int64) + 1
        mass = logprob
        processed = logprob * 0.0
        processed_entropy = processed

    tl.store(integers + index, token.to(tl.int64))
    tl.store(integers + rows + index, count)
    tl.store(statistics + index, raw)
    tl.store(statistics + rows + index, logprob)
    tl.store(statistics + 2 * rows + index, processed)
    tl.store(statistics + 3 * rows + index, raw_entropy)
    tl.store(statistics + 4 * rows + index, entropy)
    tl.store(statistics + 5 * rows + index, processed_entropy)
    tl.store(statistics + 6 * rows + index, mass)

"""Segment reductions and scans in one launch each, without atomics.

- ``reduce_segments``: sum, mean or maximum.
- ``scan_segments``: discounted returns and advantages.
- ``normalise_groups``: rewards relative to their group.
- ``pick_covariant``: the tokens that Clip-Cov leaves out.

A program owns a segment and walks it in blocks, so no result depends on another segment; ``pick_covariant`` is one
program. Numbers that a caller seldom changes are constants of the kernels, which keeps them in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Elements of a segment worked on at a time."""

_NO_KEY = tl.constexpr(1 << 53)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_MIX_A = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_MIX_B = tl.constexpr(0x94D049BB133111EB - (1 << 64))


def reduce_segments(x: Tensor, offsets: Tensor, operation: Literal["sum", "mean", "max"]) -> Tensor:
    """Return [S] in the type of x [N], fp32 or float64."""
    out = x.new_empty(len(offsets) - 1)
    if len(out):
        reduce_kernel[(len(out),)](x.contiguous(), offsets.contiguous(), out, OPERATION=operation, BLOCK=BLOCK)
    return out


def scan_segments(
    r: Tensor, v: Tensor | None, boundary: Tensor | None, gamma: float, lam: float, offsets: Tensor
) -> Tensor:
    """Return the advantages [N] of ``gae``, or without values the discounted returns; r and v of one type."""
    out = torch.empty_like(r, memory_format=torch.contiguous_format)
    if len(offsets) > 1:
        r = r.contiguous()
        scan_kernel[(len(offsets) - 1,)](
            r,
            r if v is None else v.contiguous(),
            r if boundary is None else boundary.contiguous().view(torch.uint8),
            offsets.contiguous(),
            out,
            GAMMA=float(gamma),
            DECAY=float(gamma * lam),
            VALUES=v is not None,
            TURNS=boundary is not None,
            BLOCK=BLOCK,
        )
    return out


def normalise_groups(rewards: Tensor, offsets: Tensor, eps: float, divide: bool) -> Tensor:
    """Return [G] in the type of rewards."""
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    if len(offsets) > 1:
        normalise_kernel[(len(offsets) - 1,)](
            rewards.contiguous(), offsets.contiguous(), out, EPS=float(eps), DIVIDE=divide, BLOCK=BLOCK
        )
    return out


def pick_covariant(
    logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    candidates: Tensor | None,
    counters: Tensor,
    ratio: float,
    lo: float,
    hi: float,
    start: int,
) -> Tensor:
    """Return bool[N]; arguments as of ``clip_cov_mask``, ``start`` begins the stream of keys."""
    picked = torch.empty_like(mask, memory_format=torch.contiguous_format)
    if len(picked):
        mask = mask.contiguous().view(torch.uint8)
        pick_kernel[(1,)](
            logp.contiguous(),
            adv.contiguous(),
            mask,
            mask if candidates is None else candidates.contiguous().view(torch.uint8),
            counters.long().contiguous(),
            torch.empty_like(mask, dtype=torch.int64),
            picked.view(torch.uint8),
            len(picked),
            start,
            RATIO=float(ratio),
            LOW=float(lo),
            HIGH=float(hi),
            PIVOTS=8,
            BLOCK=BLOCK,
        )
    return picked


@triton.jit
def _segment(offsets):
    """Bounds of this program's segment."""
    index = tl.program_id(0)
    return tl.load(offsets + index).to(tl.int64), tl.load(offsets + index + 1).to(tl.int64)


@triton.jit
def reduce_kernel(x, offsets, out, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    """Reduce one segment, sums in float64; the maximum is NaN where a value is."""
    begin, end = _segment(offsets)
    lanes = tl.full([BLOCK], float("-inf") if OPERATION == "max" else 0.0, tl.float64)
    broken = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        if OPERATION == "max":
            value = tl.load(x + place, mask=place < end, other=float("-inf")).to(tl.float64)
            broken = tl.where(value != value, 1, broken)
            lanes = tl.where(value > lanes, value, lanes)
        else:
            lanes += tl.load(x + place, mask=place < end, other=0.0).to(tl.float64)
    if OPERATION == "max":
        result = tl.where(tl.max(broken, 0) > 0, float("nan"), tl.max(lanes, 0))
    elif OPERATION == "mean":
        result = tl.sum(lanes, 0) / tl.maximum(end - begin, 1).to(tl.float64)
    else:
        result = tl.sum(lanes, 0)
    tl.store(out + tl.program_id(0), result.to(out.dtype.element_ty))


@triton.jit
def _then(decay, value, next_decay, next_value):
    """Compose ``y = value + decay · previous`` with the step after it."""
    return next_decay * decay, next_value + next_decay * value


@triton.jit
def scan_kernel(
    r,
    v,
    boundary,
    offsets,
    out,
    GAMMA: tl.constexpr,
    DECAY: tl.constexpr,
    VALUES: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scan one segment from its end: lane i of a block is i places before the block's last element."""
    begin, end = _segment(offsets)
    lane = tl.arange(0, BLOCK)
    carry = tl.zeros([], dtype=out.dtype.element_ty)
    for start in range(0, end - begin, BLOCK):
        place = end - 1 - start - lane
        inside = place >= begin
        value = tl.load(r + place, mask=inside, other=0.0)
        discount = tl.full([BLOCK], GAMMA, value.dtype)
        decay = tl.full([BLOCK], DECAY if VALUES else GAMMA, value.dtype)
        if TURNS:
            last = tl.load(boundary + place, mask=inside, other=1) != 0
            discount = tl.where(last, discount, 1.0)
            decay = tl.where(last, decay, 1.0)
        if VALUES:
            ahead = tl.load(v + place + 1, mask=inside & (place + 1 < end), other=0.0)
            value = value + discount * ahead - tl.load(v + place, mask=inside, other=0.0)
        decay, value = tl.associative_scan((decay, value), 0, _then)
        value = value + decay * carry
        tl.store(out + place, value, mask=inside)
        carry = tl.sum(tl.where(lane == BLOCK - 1, value, 0.0), 0)


@triton.jit
def normalise_kernel(x, offsets, out, EPS: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Centre one group, and divide it by its standard deviation; in float64."""
    begin, end = _segment(offsets)
    size = (end - begin).to(tl.float64)
    # Less a member of the group first: equal rewards then differ by exactly 0.
    origin = tl.load(x + begin, mask=begin < end, other=0.0).to(tl.float64)
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < end, other=0.0).to(tl.float64)
        lanes += tl.where(place < end, value - origin, 0.0)
    mean = tl.sum(lanes, 0) / tl.maximum(size, 1.0)
    scale = tl.zeros([], dtype=tl.float64) + 1.0
    if DIVIDE:
        lanes = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(begin, end, BLOCK):
            place = start + tl.arange(0, BLOCK)
            value = tl.load(x + place, mask=place < end, other=0.0).to(tl.float64) - origin - mean
            lanes += tl.where(place < end, value * value, 0.0)
        scale = tl.sqrt(tl.sum(lanes, 0) / tl.maximum(size - 1.0, 1.0)) + EPS
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < end, other=0.0).to(tl.float64) - origin - mean
        tl.store(out + place, (value / scale).to(out.dtype.element_ty), mask=place < end)


@triton.jit
def _shifted(x, BITS: tl.constexpr):
    """Shift int64 to the right as if it were unsigned."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def pick_kernel(
    logp,
    adv,
    mask,
    candidates,
    counters,
    keys,
    picked,
    size,
    begin,
    RATIO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pick the smallest keys inside the covariance band; ``keys`` int64[N] is scratch memory."""
    lane = tl.arange(0, BLOCK)
    tokens = tl.zeros([BLOCK], dtype=tl.int64)
    logp_lanes = tl.zeros([BLOCK], dtype=tl.float64)
    adv_lanes = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, size, BLOCK):
        place = start + lane
        trained = tl.load(mask + place, mask=place < size, other=0) != 0
        tokens += trained.to(tl.int64)
        logp_lanes += tl.load(logp + place, mask=trained, other=0.0).to(tl.float64)
        adv_lanes += tl.load(adv + place, mask=trained, other=0.0).to(tl.float64)
    count = tl.sum(tokens, 0)
    divisor = tl.maximum(count, 1).to(tl.float64)
    mean_logp = tl.sum(logp_lanes, 0) / divisor
    mean_adv = tl.sum(adv_lanes, 0) / divisor

    open_lanes = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, size, BLOCK):
        place = start + lane
        trained = tl.load(mask + place, mask=place < size, other=0) != 0
        covariance = tl.load(adv + place, mask=trained, other=0.0).to(tl.float64) - mean_adv
        covariance *= tl.load(logp + place, mask=trained, other=0.0).to(tl.float64) - mean_logp
        allowed = tl.load(candidates + place, mask=place < size, other=0) != 0
        allowed = allowed & trained & (covariance > LOW) & (covariance < HIGH)
        # SplitMix64: output number ``counter`` of the stream that starts at ``begin``, its upper 53 bits.
        state = (tl.load(counters + place, mask=place < size, other=0) + 1) * _GOLDEN + begin
        state = (state ^ _shifted(state, 30)) * _MIX_A
        state = (state ^ _shifted(state, 27)) * _MIX_B
        state = _shifted(state ^ _shifted(state, 31), 11)
        tl.store(keys + place, tl.where(allowed, state, _NO_KEY), mask=place < size)
        open_lanes += allowed.to(tl.int64)
    tl.debug_barrier()

    wanted = tl.maximum((RATIO * count.to(tl.float64)).to(tl.int64), 1)
    # Fewer than wanted keys are below ``low``; ``reached`` of them, at least as many as wanted, are below ``high``.
    low = tl.zeros([], dtype=tl.int64)
    high = low + _NO_KEY
    reached = tl.sum(open_lanes, 0)
    pivot = tl.arange(0, PIVOTS)
    while (reached > wanted) & (high - low > 1):
        pivots = low + (high - low) * (pivot + 1).to(tl.int64) // (PIVOTS + 1)
        below = tl.zeros([BLOCK, PIVOTS], dtype=tl.int32)
        for start in range(0, size, BLOCK):
            place = start + lane
            key = tl.load(keys + place, mask=place < size, other=_NO_KEY)
            below += (key[:, None] < pivots[None, :]).to(tl.int32)
        counts = tl.sum(below, 0).to(tl.int64)
        short = tl.sum((counts < wanted).to(tl.int32), 0)
        low = tl.where(short > 0, tl.sum(tl.where(pivot == short - 1, pivots, 0), 0), low)
        high = tl.where(short < PIVOTS, tl.sum(tl.where(pivot == short, pivots, 0), 0), high)
        reached = tl.where(short < PIVOTS, tl.sum(tl.where(pivot == short, counts, 0), 0), reached)
    for start in range(0, size, BLOCK):
        place = start + lane
        key = tl.load(keys + place, mask=place < size, other=_NO_KEY)
        tl.store(picked + place, (key < high).to(tl.uint8), mask=place < size)

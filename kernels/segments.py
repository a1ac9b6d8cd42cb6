"""Reductions and reverse scans over the segments of a flat vector: turns, trajectories, groups.

- ``segment_sum``, ``segment_mean``, ``segment_max``: one number per segment.
- ``discounted_return``: what is still paid in the segment, discounted.
- ``gae``: generalised advantage estimation, with discounts per token or per turn.
- ``group_norm``: rewards relative to their group.
- ``clip_cov_mask``: the random tokens of high covariance that Clip-Cov leaves out.

Segment s is ``x[offsets[s]:offsets[s + 1]]``; ``offsets`` int64 or int32 [S + 1] rise from 0 to N, and a segment may be
empty. What is computed of a segment depends on no other one. Results are fp32, or float64 for float64 input; nothing
waits for the device. The values of offsets are checked on the CPU only, since a check elsewhere would wait.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UsageError, nearest
from .dispatch import Backend, resolve

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB
_NO_KEY = 1 << 53
"""Above all random keys, which have 53 bits."""


def segment_sum(x: Tensor, offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the sum of each segment of x [N], [S], differentiable; 0 for an empty one. Added in float64.

    Raises:
        UsageError: x is no vector, the offsets do not fit it, or the backend cannot run here.
    """
    _check("segment_sum", offsets, x)
    return _Sum.apply(_real(x), offsets, False, resolve(backend, x, offsets))


def segment_mean(x: Tensor, offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the mean of each segment of x [N], [S], differentiable; 0 for an empty one. Added in float64.

    Raises:
        UsageError: as of ``segment_sum``.
    """
    _check("segment_mean", offsets, x)
    return _Sum.apply(_real(x), offsets, True, resolve(backend, x, offsets))


def segment_max(x: Tensor, offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the largest value of each segment of x [N], [S], without gradient; -inf for an empty one, NaN with a NaN.

    Raises:
        UsageError: as of ``segment_sum``.
    """
    _check("segment_max", offsets, x)
    x = _real(x).detach()
    if resolve(backend, x, offsets) == "triton":
        from ._triton.segments import reduce_segments

        return reduce_segments(x, offsets, "max")
    return torch.segment_reduce(x, "max", offsets=offsets, unsafe=True)


def discounted_return(r: Tensor, gamma: float, offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return ``G_t = r_t + gamma · G_{t+1}`` within each segment, [N], without gradient.

    Raises:
        UsageError: as of ``segment_sum``.
    """
    _check("discounted_return", offsets, r)
    r = _real(r).detach()
    if resolve(backend, r, offsets) == "triton":
        from ._triton.segments import scan_segments

        return scan_segments(r, None, None, gamma, 1.0, offsets)
    return _scan(r, torch.full_like(r, gamma), _places_left(r, offsets))


def gae(
    r: Tensor,
    v: Tensor,
    gamma: float,
    lam: float,
    offsets: Tensor,
    boundary: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return the advantages ``A_t = δ_t + γλ A_{t+1}``, ``δ_t = r_t + γ V_{t+1} - V_t`` (1506.02438, Eq. 11-16).

    Behind the end of a segment both V and A are 0. With ``boundary`` time is counted in turns: γ and λ apply from the
    last token of a turn to the first of the next, and are 1 inside a turn. Where a turn is to end like a trajectory,
    give the offsets of turns instead. The targets of the critic are ``A + v``.

    Args:
        r: rewards [N].
        v: values [N].
        gamma: discount.
        lam: λ, what estimates over more steps weigh.
        offsets: [S + 1], of trajectories.
        boundary: bool[N], true at the last token of each turn; ``None``: every token is a turn.

    Returns:
        [N], without gradient.

    Raises:
        UsageError: as of ``segment_sum``.
    """
    given = {"v": v} if boundary is None else {"v": v, "boundary": boundary}
    _check("gae", offsets, r, **given)
    if boundary is not None and boundary.dtype != torch.bool:
        raise UsageError(f"gae: boundary is {boundary.dtype}; expected torch.bool, true at the last token of each turn")
    dtype = torch.promote_types(_real(r).dtype, _real(v).dtype)
    r, v = r.detach().to(dtype), v.detach().to(dtype)
    if resolve(backend, r, v, offsets) == "triton":
        from ._triton.segments import scan_segments

        return scan_segments(r, v, boundary, gamma, lam, offsets)
    left = _places_left(r, offsets)
    discount, decay = torch.full_like(r, gamma), torch.full_like(r, gamma * lam)
    if boundary is not None:
        discount, decay = torch.where(boundary, discount, 1.0), torch.where(boundary, decay, 1.0)
    ahead = torch.where(left > 1, torch.nn.functional.pad(v[1:], (0, min(1, len(v)))), 0.0)
    return _scan(r + discount * ahead - v, decay, left)


def group_norm(
    rewards: Tensor,
    group_offsets: Tensor,
    eps: float = 1e-6,
    std: Literal["unbiased", "none"] = "unbiased",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return rewards [G] less the mean of their group, over its standard deviation + eps, without gradient.

    The deviation divides by the group's size - 1 (GRPO, 2402.03300); ``std="none"`` does not divide by it
    at all (Dr. GRPO, 2503.20783). Groups of one, and of equal rewards, get 0. Computed in float64.

    Raises:
        UsageError: as of ``segment_sum``; ``std`` is unknown, or ``eps`` not positive where it divides.
    """
    _check("group_norm", group_offsets, rewards)
    if std not in ("unbiased", "none"):
        raise UsageError(f"group_norm: unknown std '{std}'{nearest(std, ('unbiased', 'none'))}")
    if std == "unbiased" and not eps > 0:
        raise UsageError(f"group_norm: eps is {eps}; expected > 0, since a group's rewards may be equal")
    rewards = _real(rewards).detach()
    if resolve(backend, rewards, group_offsets) == "triton":
        from ._triton.segments import normalise_groups

        return normalise_groups(rewards, group_offsets, eps, std == "unbiased")
    group, size = _segment_of(rewards, group_offsets), group_offsets.diff()[:, None]
    x = rewards.double()

    def total(values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=group_offsets, unsafe=True)[:, None]

    # Less a member of the group first: equal rewards then differ by exactly 0.
    x = x - x[group_offsets[:-1].clamp(max=max(0, len(x) - 1))][group] if len(x) else x
    x = x - (total(x) / size.clamp(min=1))[group, 0]
    if std == "unbiased":
        x = x / ((total(x * x) / (size - 1).clamp(min=1)).sqrt() + eps)[group, 0]
    return x.to(rewards.dtype)


def clip_cov_mask(
    logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    ratio: float,
    lo: float,
    hi: float,
    seed: int,
    *,
    candidates: Tensor | None = None,
    counters: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the tokens that Clip-Cov leaves out of the gradient, bool[N] (2505.22617).

    A token's covariance is ``(A - mean A)(log p - mean log p)``, with means over the mask, in float64. Of the tokens
    of the mask with a covariance inside (lo, hi), ``max(int(ratio · tokens in the mask), 1)`` are picked at random
    without replacement, or all where there are no more. Each has a random key that is a function of the seed and its
    counter alone, and those with the smallest keys are picked.

    Args:
        logp: log-probabilities [N].
        adv: advantages [N].
        mask: bool[N], the trained tokens; what the others hold is not read.
        ratio: share of the mask to pick, in [0, 1].
        lo: lower end of the band.
        hi: upper end of the band.
        seed: any integer.
        candidates: bool[N], the tokens that may be picked: the authors leave out those that PPO already clips.
            ``None``: all of the mask.
        counters: int64[N], which tell tokens apart whatever the order they come in; ``None``: their places.

    Raises:
        UsageError: shapes or types do not fit, or the ratio is out of its range.
    """
    vectors = {"adv": adv, "mask": mask, "candidates": candidates, "counters": counters}
    _check("clip_cov_mask", None, logp, **{name: x for name, x in vectors.items() if x is not None})
    for name, x in (("mask", mask), ("candidates", candidates)):
        if x is not None and x.dtype != torch.bool:
            raise UsageError(f"clip_cov_mask: {name} is {x.dtype}; expected torch.bool")
    if not 0 <= ratio <= 1:
        raise UsageError(f"clip_cov_mask: ratio is {ratio}; expected a share of the tokens in [0, 1]")
    logp, adv = logp.detach(), adv.detach()
    if counters is None:
        counters = torch.arange(len(logp), device=logp.device)
    start = _mixed_integer(seed + _GOLDEN)
    if resolve(backend, logp, adv, mask) == "triton":
        from ._triton.segments import pick_covariant

        return pick_covariant(logp, adv, mask, candidates, counters, ratio, lo, hi, start)
    logp, adv = (torch.where(mask, x.double(), 0.0) for x in (logp, adv))
    tokens = mask.sum()
    mean_logp, mean_adv = (x.sum() / tokens.clamp(min=1) for x in (logp, adv))
    covariance = (adv - mean_adv) * (logp - mean_logp)
    open_to = mask & (covariance > lo) & (covariance < hi)
    if candidates is not None:
        open_to &= candidates
    keys = torch.where(open_to, _keys(counters, start), _NO_KEY)
    if not len(keys):
        return open_to
    count = (ratio * tokens.double()).long().clamp(min=1)
    return open_to & (keys <= keys.sort().values.gather(0, count[None] - 1))


class _Sum(torch.autograd.Function):
    """Sum or mean of segments; the gradient of a token is that of its segment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, mean: bool, backend: str) -> Tensor:
        ctx.save_for_backward(offsets, _segment_of(x, offsets))
        ctx.mean = mean
        if backend == "triton":
            from ._triton.segments import reduce_segments

            return reduce_segments(x, offsets, "mean" if mean else "sum")
        total = torch.segment_reduce(x.double(), "sum", offsets=offsets, unsafe=True)
        return (total / offsets.diff().clamp(min=1) if mean else total).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        offsets, segment = ctx.saved_tensors
        return (grad / offsets.diff().clamp(min=1) if ctx.mean else grad)[segment], None, None, None


def _check(name: str, offsets: Tensor | None, x: Tensor, **others: Tensor) -> None:
    if x.dim() != 1:
        raise UsageError(f"{name}: values have the shape {tuple(x.shape)}; expected a vector")
    for other, value in others.items():
        if value.shape != x.shape:
            raise UsageError(f"{name}: {other} has the shape {tuple(value.shape)}; expected {tuple(x.shape)}")
    if offsets is None:
        return
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in (torch.int64, torch.int32):
        raise UsageError(
            f"{name}: offsets are {offsets.dtype} {tuple(offsets.shape)}; expected int64 or int32 [segments + 1]"
        )
    if offsets.device.type == "cpu":
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != len(x) or bool((offsets.diff() < 0).any()):
            raise UsageError(
                f"{name}: offsets go from {first} to {last}; expected from 0 to the {len(x)} values, never falling"
            )


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _segment_of(x: Tensor, offsets: Tensor) -> Tensor:
    """Return the segment of each element of x, int64[N]."""
    places = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True) - 1


def _places_left(x: Tensor, offsets: Tensor) -> Tensor:
    """Return how many elements of its segment there are from each element on, itself included, int64[N]."""
    return offsets[1:][_segment_of(x, offsets)] - torch.arange(len(x), device=x.device)


def _scan(x: Tensor, decay: Tensor, left: Tensor) -> Tensor:
    """Return ``y_t = x_t + decay_t · y_{t+1}`` within segments, by doubling: log2 N steps instead of N."""
    longest = len(x)
    if x.device.type == "cpu" and longest:
        longest = int(left.max())
    span = 1
    while span < longest:
        ahead = torch.where(left[:-span] > span, x[span:], 0.0)
        x = torch.cat((torch.addcmul(x[:-span], decay[:-span], ahead), x[-span:]))
        decay = torch.cat((decay[:-span] * decay[span:], decay[-span:]))
        span *= 2
    return x if span > 1 else x.clone()


def _mixed_integer(state: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood 2014), as a signed integer."""
    state %= 1 << 64
    state = (state ^ state >> 30) * _MIX_A % (1 << 64)
    state = (state ^ state >> 27) * _MIX_B % (1 << 64)
    return _signed(state ^ state >> 31)


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (value >> 63 << 64)


def _keys(counters: Tensor, start: int) -> Tensor:
    """Return output number ``counter`` of the stream that starts at ``start``, its upper 53 bits, int64[N]."""
    state = (counters.long() + 1) * _signed(_GOLDEN) + start
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return _shifted(state ^ _shifted(state, 31), 11)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

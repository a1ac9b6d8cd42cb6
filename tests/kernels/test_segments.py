"""Segments are reduced and scanned one by one, and agree with plain loops in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels.segments import (
    clip_cov_mask,
    discounted_return,
    gae,
    group_norm,
    segment_max,
    segment_mean,
    segment_sum,
)

RAGGED = st.lists(st.integers(0, 9), max_size=8)


def ragged(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, two float64 vectors, and turn boundaries."""
    random = np.random.default_rng(seed)
    size = sum(lengths)
    r, v = torch.from_numpy(random.normal(size=(2, size)))
    return torch.tensor([0, *lengths]).cumsum(0), r, v, torch.from_numpy(random.random(size) < 0.4)


def loop(
    r: list[float], v: list[float], boundary: list[bool], gamma: float, lam: float, offsets: list[int]
) -> list[float]:
    """GAE as its definition reads, one token at a time."""
    out = [0.0] * len(r)
    for begin, end in itertools.pairwise(offsets):
        advantage = value = 0.0
        for t in reversed(range(begin, end)):
            discount, weight = (gamma, lam) if boundary[t] else (1.0, 1.0)
            advantage = r[t] + discount * value - v[t] + discount * weight * advantage
            value = v[t]
            out[t] = advantage
    return out


@settings(deadline=None)
@given(RAGGED, st.integers(0, 2**32 - 1))
def test_reductions_are_those_of_a_loop(lengths: list[int], seed: int) -> None:
    offsets, x, _, _ = ragged(lengths, seed)
    parts = x.split(lengths)
    expected = [
        torch.tensor([math.fsum(part.tolist()) for part in parts], dtype=torch.float64),
        torch.tensor([math.fsum(part.tolist()) / max(1, len(part)) for part in parts], dtype=torch.float64),
        torch.tensor([max(part.tolist(), default=-math.inf) for part in parts], dtype=torch.float64),
    ]
    for operation, value in zip((segment_sum, segment_mean, segment_max), expected, strict=True):
        torch.testing.assert_close(operation(x, offsets), value, atol=1e-14, rtol=1e-14)
        single = operation(x.float(), offsets.int())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), value, atol=1e-6, rtol=1e-6)


@settings(deadline=None)
@given(RAGGED, st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.sampled_from([0.0, 0.95, 1.0]), st.integers(0, 2**32 - 1))
def test_scans_are_those_of_a_loop(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    offsets, r, v, boundary = ragged(lengths, seed)
    every, zero = [True] * len(r), [0.0] * len(r)
    for turns, last in ((None, every), (boundary, boundary.tolist())):
        expected = torch.tensor(loop(r.tolist(), v.tolist(), last, gamma, lam, offsets.tolist()), dtype=torch.float64)
        torch.testing.assert_close(gae(r, v, gamma, lam, offsets, turns), expected, atol=1e-13, rtol=1e-13)
        single = gae(r.float(), v.float(), gamma, lam, offsets, turns)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=1e-5)
    expected = torch.tensor(loop(r.tolist(), zero, every, gamma, 1.0, offsets.tolist()), dtype=torch.float64)
    torch.testing.assert_close(discounted_return(r, gamma, offsets), expected, atol=1e-13, rtol=1e-13)


def test_advantages_of_the_released_rule() -> None:
    """verl's ``compute_gae_advantage_return`` on a row without observations, before whitening."""
    r, v = torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.5, 0.9, 0.6, 0.7])
    expected = torch.tensor([0.4624625, 0.06575, 0.385, 0.3])
    torch.testing.assert_close(gae(r, v, 1.0, 0.95, torch.tensor([0, 4])), expected)


def test_within_a_turn_time_stands_still() -> None:
    """One turn of one token, then one of three: one discount lies between them, as between two single tokens."""
    offsets = torch.tensor([0, 4])
    r, v = torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.zeros(4)
    boundary = torch.tensor([True, False, False, True])
    assert gae(r, v, 0.5, 1.0, offsets, boundary).tolist() == [3.5, 5.0, 5.0, 5.0]
    assert gae(r, v, 0.5, 1.0, offsets).tolist() == [1.625, 1.25, 2.5, 5.0]
    assert torch.equal(gae(r, v, 0.5, 0.9, offsets, torch.ones(4, dtype=torch.bool)), gae(r, v, 0.5, 0.9, offsets))


@settings(deadline=None)
@given(RAGGED, st.integers(0, 2**32 - 1))
def test_rewards_are_compared_within_their_group(lengths: list[int], seed: int) -> None:
    offsets, rewards, _, _ = ragged(lengths, seed)
    expected, centred = [], []
    for part in rewards.split(lengths):
        values = part.numpy()
        centre = values - values.mean() if len(values) else values
        deviation = values.std(ddof=1) if len(values) > 1 else 0.0
        expected.append(torch.from_numpy(centre / (deviation + 1e-6)))
        centred.append(torch.from_numpy(centre))
    empty = torch.zeros(0, dtype=torch.float64)
    for std, parts in (("unbiased", expected), ("none", centred)):
        value = group_norm(rewards, offsets, 1e-6, std)  # type: ignore[arg-type]
        torch.testing.assert_close(value, torch.cat([empty, *parts]), atol=1e-9, rtol=1e-9)


def test_groups_that_hold_nothing_to_compare_get_zero() -> None:
    rewards = torch.tensor([0.1] * 7 + [3.7])
    assert group_norm(rewards, torch.tensor([0, 7, 7, 8]), 1e-12).tolist() == [0.0] * 8
    assert group_norm(rewards, torch.tensor([0, 7, 7, 8]), 1e-12, "none").tolist() == [0.0] * 8


@pytest.mark.parametrize("operation", [segment_sum, segment_mean])
def test_gradients_of_sums_and_means(operation: Any) -> None:
    offsets, x, _, _ = ragged([3, 0, 4, 1], 5)
    assert torch.autograd.gradcheck(lambda y: operation(y, offsets), x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda y: operation(y * y, offsets), x)


def everything(offsets: Tensor, r: Tensor, v: Tensor, boundary: Tensor) -> list[Tensor]:
    return [
        segment_sum(r, offsets),
        segment_mean(r, offsets),
        segment_max(r, offsets),
        discounted_return(r, 0.97, offsets),
        gae(r, v, 0.97, 0.9, offsets, boundary),
        gae(r, v, 0.97, 0.9, offsets),
        group_norm(r, offsets),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_segment_depends_on_no_other_to_the_bit(dtype: torch.dtype) -> None:
    lengths = [5, 0, 130, 1, 2000]
    offsets, r, v, boundary = ragged(lengths, 6)
    r, v = r.to(dtype), v.to(dtype)
    whole = everything(offsets, r, v, boundary)
    for first, second in zip(whole, everything(offsets, r, v, boundary), strict=True):
        assert torch.equal(first, second)
    for number, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = everything(torch.tensor([0, end - begin]), r[begin:end], v[begin:end], boundary[begin:end])
        for one, many in zip(alone[:3], whole[:3], strict=True):
            assert torch.equal(one, many[number : number + 1])
        for one, many in zip(alone[3:], whole[3:], strict=True):
            assert torch.equal(one, many[begin:end])
    r[6], v[140] = torch.nan, torch.inf
    broken = everything(offsets, r, v, boundary)
    assert all(bool(value[2].isnan()) for value in broken[:3])
    for one, many in zip(broken[3:], whole[3:], strict=True):
        assert torch.equal(one[:5], many[:5]) and torch.equal(one[141:], many[141:])


def covariance(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    logp, adv = logp.double(), adv.double()
    return (adv - adv[mask].mean()) * (logp - logp[mask].mean())


def tokens(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = np.random.default_rng(seed)
    logp, adv = torch.from_numpy(random.normal(size=(2, size)) * 2).float()
    return -logp.abs(), adv, torch.from_numpy(random.random(size) < 0.8)


@settings(deadline=None)
@given(
    st.integers(0, 300),
    st.sampled_from([0.0, 2e-4, 0.02, 0.5, 1.0]),
    st.sampled_from([(1.0, 5.0), (-2.0, 2.0), (1e6, 1e7), (-math.inf, math.inf)]),
    st.integers(0, 2**32 - 1),
)
def test_clip_cov_picks_its_share_inside_the_band(
    size: int, ratio: float, band: tuple[float, float], seed: int
) -> None:
    logp, adv, mask = tokens(size, seed)
    picked = clip_cov_mask(logp, adv, mask, ratio, *band, seed)
    value = covariance(logp, adv, mask)
    inside = mask & (value > band[0]) & (value < band[1])
    assert picked.dtype == torch.bool and not bool((picked & ~inside).any())
    assert int(picked.sum()) == min(max(int(ratio * int(mask.sum())), 1), int(inside.sum()))


def test_clip_cov_is_a_function_of_seed_and_counters() -> None:
    logp, adv, mask = tokens(400, 1)
    call = (0.05, 0.5, 5.0)
    first = clip_cov_mask(logp, adv, mask, *call, 7)
    assert torch.equal(first, clip_cov_mask(logp, adv, mask, *call, 7))
    assert not torch.equal(first, clip_cov_mask(logp, adv, mask, *call, 8))
    order = torch.from_numpy(np.random.default_rng(2).permutation(400))
    moved = clip_cov_mask(logp[order], adv[order], mask[order], *call, 7, counters=order)
    assert torch.equal(moved, first[order])
    broken = torch.where(mask, logp, torch.nan)
    assert torch.equal(clip_cov_mask(broken, adv, mask, *call, 7), first)


def test_clip_cov_picks_evenly() -> None:
    """Over 2000 seeds each of the tokens inside the band is picked about equally often."""
    logp, adv, mask = tokens(60, 3)
    value = covariance(logp, adv, mask)
    inside = mask & (value > 0.2) & (value < 8)
    count, share = int(inside.sum()), max(int(0.1 * int(mask.sum())), 1)
    times = torch.stack([clip_cov_mask(logp, adv, mask, 0.1, 0.2, 8.0, seed) for seed in range(2000)]).sum(0)
    expected = 2000 * share / count
    assert count > 2 * share
    assert float((times[inside] - expected).abs().max()) < 5 * math.sqrt(expected)


def test_clip_cov_leaves_candidates_to_the_caller() -> None:
    logp, adv, mask = tokens(200, 4)
    candidates = torch.arange(200) % 3 == 0
    picked = clip_cov_mask(logp, adv, mask, 1.0, 0.5, 5.0, 0, candidates=candidates)
    assert torch.equal(picked, clip_cov_mask(logp, adv, mask, 1.0, 0.5, 5.0, 0) & candidates)
    assert bool(picked.any())


def test_what_does_not_fit_is_refused() -> None:
    x, offsets = torch.zeros(4), torch.tensor([0, 4])
    yes = torch.ones(4, dtype=torch.bool)
    for operation in (segment_sum, segment_mean, segment_max):
        with pytest.raises(UsageError, match="from 0 to the 4 values"):
            operation(x, torch.tensor([0, 3]))
    with pytest.raises(UsageError, match="never falling"):
        discounted_return(x, 0.9, torch.tensor([0, 3, 2, 4]))
    with pytest.raises(UsageError, match="expected int64 or int32"):
        segment_sum(x, torch.tensor([0.0, 4.0]))
    with pytest.raises(UsageError, match="expected a vector"):
        segment_sum(x[None], offsets)
    with pytest.raises(UsageError, match=r"v has the shape \(3,\)"):
        gae(x, x[:3], 1.0, 1.0, offsets)
    with pytest.raises(UsageError, match=r"boundary is torch\.int64"):
        gae(x, x, 1.0, 1.0, offsets, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(UsageError, match="did you mean 'unbiased'"):
        group_norm(x, offsets, 1e-6, "unbaised")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="eps is 0"):
        group_norm(x, offsets, 0.0)
    with pytest.raises(UsageError, match="ratio is 2"):
        clip_cov_mask(x, x, yes, 2.0, 1.0, 5.0, 0)
    with pytest.raises(UsageError, match=r"mask is torch\.float32"):
        clip_cov_mask(x, x, x, 0.1, 1.0, 5.0, 0)
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        segment_sum(x, offsets, backend="troch")  # type: ignore[arg-type]

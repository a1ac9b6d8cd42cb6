"""Draws follow the distribution they claim, keep exactly the right tokens and report exact statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels.sampling import Sample, sample


def uniforms(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def oracle(logits: Tensor, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution drawn from, one token at a time in float64."""
    p = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p = np.where(p >= p[order[min(top_k, len(p)) - 1]], p, 0)
    kept, mass = [], 0.0
    for token in order:
        if p[token] > 0 and (top_p == 1 or mass < top_p * p.sum()):
            kept.append(token)
            mass += p[token]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 8, 0.7)],
)
def test_draws_follow_the_processed_distribution(temperature: float, top_k: int, top_p: float) -> None:
    draws = 100_000
    logits = torch.randn(23, generator=torch.Generator().manual_seed(3)) * 1.5
    drawn = sample(logits.expand(draws, -1), uniforms(draws, 4), temperature, top_k, top_p)
    expected = oracle(logits, temperature, top_k, top_p)
    counts = np.bincount(drawn.token.numpy(), minlength=23)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    support = expected > 0
    assert stats.chisquare(counts[support], expected[support] * draws).pvalue > 1e-4

    token = drawn.token.numpy()
    np.testing.assert_allclose(drawn.logprob_processed.numpy(), np.log(expected[token]), atol=2e-6)
    full = torch.softmax(logits.double() / temperature, dim=-1).numpy()
    np.testing.assert_allclose(drawn.logprob_tempered.numpy(), np.log(full[token]), atol=2e-6)
    np.testing.assert_allclose(float(drawn.kept_logmass[0]), np.log(full[support].sum()), atol=2e-6)
    np.testing.assert_allclose(float(drawn.entropy_processed[0]), stats.entropy(expected), atol=5e-6)
    np.testing.assert_allclose(float(drawn.entropy_tempered[0]), stats.entropy(full), atol=5e-6)
    raw = torch.softmax(logits.double(), dim=-1).numpy()
    np.testing.assert_allclose(drawn.logprob_raw.numpy(), np.log(raw[token]), atol=2e-6)
    np.testing.assert_allclose(float(drawn.entropy_raw[0]), stats.entropy(raw), atol=5e-6)


def test_ties_at_the_kth_token_are_kept_and_the_mass_set_is_smallest() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).expand(2000, -1)
    assert set(sample(logits, uniforms(2000, 0), top_k=2).token.tolist()) == {0, 1, 2}
    halves = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)).expand(2000, -1)
    assert set(sample(halves, uniforms(2000, 1), top_p=0.5).token.tolist()) == {0}
    assert set(sample(halves, uniforms(2000, 1), top_p=0.51).token.tolist()) == {0, 1}
    assert set(sample(halves, uniforms(2000, 1), top_p=1e-9).token.tolist()) == {0}


def test_extreme_uniforms_never_draw_an_impossible_token() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 3, 8]] = -torch.inf
    for value in (0.0, 1 - 2.0**-53):
        drawn = sample(logits, torch.full((4,), value, dtype=torch.float64))
        assert drawn.token.tolist() == [1 if value == 0 else 7] * 4
        assert bool(drawn.logprob_raw.isfinite().all()) and bool(drawn.entropy_raw.isfinite().all())


def test_the_last_bits_of_sums_never_draw_an_impossible_token() -> None:
    """A block summed at once and token by token: the threshold may lie between the two sums."""
    logits = torch.randn(3000, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(23))
    logits[:, 40:] = -torch.inf
    drawn = sample(logits, torch.full((3000,), 1 - 2.0**-53, dtype=torch.float64))
    assert int(drawn.token.min()) == int(drawn.token.max()) == 39


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_offsets_change_nothing(offset: float) -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)) * 3
    plain, moved = sample(logits, uniforms(50, 2)), sample(logits + offset, uniforms(50, 2))
    assert torch.equal(plain.token, moved.token)
    torch.testing.assert_close(plain.entropy_raw, moved.entropy_raw, atol=2e-4, rtol=0)


def test_temperature_zero_takes_the_most_probable_token() -> None:
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(5))
    drawn = sample(logits, uniforms(30, 6), temperature=0)
    assert torch.equal(drawn.token, logits.argmax(dim=-1))
    torch.testing.assert_close(drawn.logprob_tempered, torch.log_softmax(logits, -1).max(-1).values)
    assert bool((drawn.logprob_processed == 0).all()) and bool((drawn.entropy_processed == 0).all())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 0.9)])
@pytest.mark.parametrize("vocabulary", [23, 517, 1188, 49152])
def test_a_row_alone_equals_the_row_in_a_batch_to_the_bit(vocabulary: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(7)) * 2
    numbers = uniforms(12, 8)
    together = sample(logits, numbers, 0.8, top_k, top_p)
    for row in range(12):
        alone = sample(logits[row : row + 1], numbers[row : row + 1], 0.8, top_k, top_p)
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one, many[row : row + 1])


@settings(deadline=None, max_examples=150)
@given(
    vocabulary=st.sampled_from([1, 2, 7, 31, 64, 65, 130]),
    temperature=st.sampled_from([1.0, 0.1, 0.7, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 200]),
    top_p=st.sampled_from([1.0, 0.93, 0.61, 0.137, 1e-9]),
    levels=st.sampled_from([1, 2, 5, 1 << 20]),
    impossible=st.floats(0, 0.9),
    offset=st.sampled_from([0.0, -300.0, 300.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_and_statistics_are_those_of_the_plain_definition(
    vocabulary: int,
    temperature: float,
    top_k: int,
    top_p: float,
    levels: int,
    impossible: float,
    offset: float,
    seed: int,
) -> None:
    """Few levels make many ties."""
    random = np.random.default_rng(seed)
    values = np.round(random.normal(0, 2, (3, vocabulary)) * levels) / levels + offset
    values[random.random((3, vocabulary)) < impossible] = -np.inf
    values[:, random.integers(vocabulary)] = offset
    logits, numbers = torch.from_numpy(values), torch.from_numpy(random.random(3))
    assert_plain(logits, numbers, temperature, top_k, top_p, 1e-9)
    assert_plain(logits.float(), numbers, temperature, top_k, top_p, 1e-6 + 2e-7 * 300 / temperature)


def assert_plain(
    logits: Tensor, numbers: Tensor, temperature: float, top_k: int, top_p: float, tolerance: float
) -> None:
    drawn = sample(logits, numbers, temperature, top_k, top_p)
    assert drawn.entropy_raw.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    for row, token in enumerate(drawn.token.tolist()):
        expected = oracle(logits[row], temperature, top_k, top_p)
        cumulative = expected.cumsum()
        assert expected[token] > 0
        assert cumulative[token] - expected[token] - tolerance <= float(numbers[row]) <= cumulative[token] + tolerance
        raw, tempered = (torch.softmax(logits[row].double() / scale, -1).numpy() for scale in (1.0, temperature))
        plain = {
            "logprob_raw": np.log(raw[token]),
            "logprob_tempered": np.log(tempered[token]),
            "logprob_processed": np.log(expected[token]),
            "entropy_raw": stats.entropy(raw),
            "entropy_tempered": stats.entropy(tempered),
            "entropy_processed": stats.entropy(expected),
            "kept_logmass": np.log(tempered[expected > 0].sum()),
        }
        for name, value in plain.items():
            assert float(getattr(drawn, name)[row]) == pytest.approx(value, abs=tolerance, rel=2e-7), name


@pytest.mark.parametrize("vocabulary", [1, 63, 1188, 4099])
@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
def test_the_middle_of_its_interval_draws_each_token(vocabulary: int, scale: float) -> None:
    """Over the ends of all blocks of the two-level search."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(vocabulary, dtype=torch.float64, generator=generator) * scale
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    middles = cumulative - torch.softmax(logits, -1) / 2
    likely = torch.softmax(logits, -1) > 1e-13
    drawn = sample(logits.expand(vocabulary, -1), (middles / cumulative[-1]).clamp(max=1 - 2.0**-53))
    assert torch.equal(drawn.token[likely], torch.arange(vocabulary)[likely])


@pytest.mark.parametrize("shape", [(128, 1188), (7, 49152), (3, 151936)])
def test_the_token_is_that_of_a_float64_sum_over_the_whole_vocabulary(shape: tuple[int, int]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(17)) * 3
    numbers = uniforms(shape[0], 18)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    expected = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]
    drawn = sample(logits, numbers)
    assert torch.equal(drawn.token, expected)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(drawn.logprob_raw.double(), exact.gather(1, expected[:, None])[:, 0], atol=2e-6, rtol=0)
    torch.testing.assert_close(drawn.entropy_raw.double(), -(exact.exp() * exact).sum(-1), atol=3e-6, rtol=0)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 0.9), (0.0, 0, 1.0)], ids=str)
def test_a_broken_row_stays_alone(settings: tuple[float, int, float]) -> None:
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(19))
    whole = sample(logits, uniforms(5, 20), *settings)
    logits[1, 3], logits[3] = torch.nan, -torch.inf
    drawn = sample(logits, uniforms(5, 20), *settings)
    for field, value, expected in zip(Sample._fields, drawn, whole, strict=True):
        assert torch.equal(value[[0, 2, 4]], expected[[0, 2, 4]]), field
    assert bool(((drawn.token >= 0) & (drawn.token < 70)).all())
    assert bool(drawn.logprob_raw[[1, 3]].isnan().all()) and bool(drawn.entropy_raw[[1, 3]].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 5, 0.9), (0.0, 0, 1.0)], ids=str)
def test_other_types_and_layouts_are_read_exactly(dtype: torch.dtype, settings: tuple[float, int, float]) -> None:
    logits = (torch.randn(90, 6, generator=torch.Generator().manual_seed(21)) * 2).to(dtype)
    before = logits.clone()
    drawn = sample(logits.t(), uniforms(6, 22), *settings)
    expected = sample(logits.t().float().contiguous().requires_grad_(), uniforms(6, 22), *settings)
    for value, other in zip(drawn, expected, strict=True):
        assert torch.equal(value, other) and not other.requires_grad
    assert torch.equal(logits, before)


def test_a_batch_of_none_is_drawn() -> None:
    for settings_ in ((1.0, 0, 1.0), (0.5, 2, 0.9), (0.0, 0, 1.0)):
        assert [len(value) for value in sample(torch.zeros(0, 9), uniforms(0, 0), *settings_)] == [0] * 8


@pytest.mark.parametrize(
    ("likely", "expected"), [([0.1] * 10, 3.859494), ([1.0], 0.0), ([0.05] * 10, 2.510659)], ids=str
)
def test_the_estimate_over_twenty_tokens_is_what_arpo_measures(likely: list[float], expected: float) -> None:
    """ARPO's statistic: the ten most probable of 152064 tokens, summed over twenty positions, over log(152064)."""
    vocabulary = 152064
    rest = (1 - sum(likely)) / (vocabulary - len(likely))
    probabilities = torch.full((vocabulary,), max(rest, 0), dtype=torch.float64)
    probabilities[: len(likely)] = torch.tensor(likely, dtype=torch.float64)
    # Uniforms below the mass of the likely tokens draw one of those.
    drawn = sample(probabilities.log().expand(20, -1), uniforms(20, 9) * 0.4, entropy_top_k=10)
    assert int(drawn.token.max()) < len(likely)
    assert float(drawn.entropy_raw.sum()) / math.log(vocabulary) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 6, 0.9), (0, 0, 1.0)])
def test_the_estimate_adds_up_the_most_probable_tokens_and_the_drawn_one(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(400, 31, generator=torch.Generator().manual_seed(11)) * 1.5
    numbers = uniforms(400, 12)
    drawn = sample(logits, numbers, temperature, top_k, top_p, entropy_top_k=4)
    exact = sample(logits, numbers, temperature, top_k, top_p)
    assert torch.equal(drawn.token, exact.token) and torch.equal(drawn.logprob_tempered, exact.logprob_tempered)
    outside = 0
    for row in range(400):
        token = int(drawn.token[row])
        for scale, estimate, whole in (
            (1.0, drawn.entropy_raw[row], exact.entropy_raw[row]),
            (temperature or 1.0, drawn.entropy_tempered[row], exact.entropy_tempered[row]),
        ):
            p = torch.softmax(logits[row].double() / scale, dim=-1).numpy()
            known = {*np.argsort(-p)[:4].tolist(), token}
            outside += len(known) == 5
            assert float(estimate) == pytest.approx(-sum(p[i] * math.log(p[i]) for i in known), abs=5e-6)
            assert float(estimate) < float(whole)
    assert (outside > 50) == (temperature > 0)
    if temperature:
        expected = np.stack([oracle(row, temperature, top_k, top_p) for row in logits])
        known = -np.sort(-expected)[:, 3:4] <= expected
        known[np.arange(400), drawn.token.numpy()] = True
        terms = np.where(known & (expected > 0), expected * np.log(np.maximum(expected, 1e-300)), 0)
        np.testing.assert_allclose(drawn.entropy_processed.numpy(), -terms.sum(axis=1), atol=5e-6)


@pytest.mark.parametrize("entropy_top_k", [23, 24, 1000])
def test_an_estimate_from_the_whole_vocabulary_is_exact(entropy_top_k: int) -> None:
    logits = torch.randn(20, 23, generator=torch.Generator().manual_seed(13))
    logits[:, 4] = -torch.inf
    for temperature, top_k in ((1.0, 0), (0.6, 5), (0.0, 0)):
        estimated = sample(logits, uniforms(20, 14), temperature, top_k, entropy_top_k=entropy_top_k)
        for value, exact in zip(estimated, sample(logits, uniforms(20, 14), temperature, top_k), strict=True):
            assert torch.equal(value, exact)


def test_impossible_tokens_and_ties_add_nothing_to_the_estimate() -> None:
    logits = torch.full((3, 9), -torch.inf)
    logits[:, :3] = 0.0
    drawn = sample(logits, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), entropy_top_k=5)
    torch.testing.assert_close(drawn.entropy_raw, torch.full((3,), math.log(3)))
    # Two of three equal tokens are known; the drawn one counts as one of them, whichever it is.
    drawn = sample(logits, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), entropy_top_k=2)
    assert drawn.token.tolist() == [0, 1, 2]
    torch.testing.assert_close(drawn.entropy_raw, torch.full((3,), math.log(3) * 2 / 3))


def test_shapes_are_checked() -> None:
    with pytest.raises(UsageError, match=r"expected \[B, V\]"):
        sample(torch.zeros(3, 4), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(UsageError, match=r"expected \[B, V\]"):
        sample(torch.zeros(3, 0), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"entropy_top_k": -2}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(wrong))} is .*; expected >"):
        sample(torch.zeros(1, 4), torch.zeros(1, dtype=torch.float64), **wrong)
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        sample(torch.zeros(1, 4), torch.zeros(1, dtype=torch.float64), backend="troch")  # type: ignore[arg-type]

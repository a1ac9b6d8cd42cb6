"""Draws follow the distribution they claim, keep exactly the right tokens and report exact statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels.sampling import sample


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
def test_a_row_alone_equals_the_row_in_a_batch(top_k: int, top_p: float) -> None:
    logits = torch.randn(64, 517, generator=torch.Generator().manual_seed(7)) * 2
    numbers = uniforms(64, 8)
    together = sample(logits, numbers, 0.8, top_k, top_p)
    for row in range(64):
        alone = sample(logits[row : row + 1], numbers[row : row + 1], 0.8, top_k, top_p)
        assert alone.token.item() == together.token[row].item()
        torch.testing.assert_close(alone.logprob_tempered[0], together.logprob_tempered[row])


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

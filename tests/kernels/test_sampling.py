"""Draws follow the distribution they claim, keep exactly the right tokens and report exact statistics."""

from __future__ import annotations

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


def test_shapes_are_checked() -> None:
    with pytest.raises(UsageError, match=r"expected \[B, V\]"):
        sample(torch.zeros(3, 4), torch.zeros(2, dtype=torch.float64))

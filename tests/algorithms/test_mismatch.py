"""Mismatch of sampler and learner: known distances, and a statistic that is 0 for the learner's own samples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms import recipe
from agentropy.algorithms.learner import Learner, LearnerConfig
from agentropy.algorithms.mismatch import mismatch

from .test_packing import batch_of, tiny_model


def test_equal_log_probabilities_have_no_mismatch():
    values = torch.linspace(-5, -0.1, 50)
    found = mismatch(values, values, -values)
    assert found == {name: 1.0 if "ratio" in name else 0.0 for name in found}
    assert mismatch(values[:0], values[:0], values[:0]) == {}


@given(st.floats(-0.5, 0.5), st.integers(0, 2**32 - 1))
def test_a_constant_shift_is_found(shift, seed):
    sampler = torch.from_numpy(np.random.default_rng(seed).uniform(-5, -1, 200))
    found = mismatch(sampler + shift, sampler, torch.ones(200))
    assert found["mismatch/abs_mean"] == pytest.approx(abs(shift), abs=1e-12)
    assert found["mismatch/abs_max"] == pytest.approx(abs(shift), abs=1e-12)
    assert found["mismatch/ratio_p50"] == pytest.approx(np.exp(shift))
    assert found["mismatch/kl"] == pytest.approx(np.expm1(shift) - shift, abs=1e-12)


def test_the_consistency_statistic_tells_whose_samples_they_are():
    """-log p - H has mean 0 under p, and a mean of many standard errors where another temperature sampled."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 30, generator=generator) * 2
    table = torch.log_softmax(logits, -1)
    entropy = -(table.exp() * table).sum(-1)
    scores = {}
    for temperature in (1.0, 0.8):
        token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        chances = table.gather(1, token)[:, 0]
        scores[temperature] = mismatch(chances, chances, entropy)["mismatch/consistency_z"]
    assert abs(scores[1.0]) < 4
    assert scores[0.8] < -8


def test_an_update_reports_the_mismatch_before_its_first_step():
    model, batch = tiny_model(), batch_of(5)
    exact = Learner(model, None).score(batch)[0]
    batch = batch.replace(old_logprobs=exact + torch.where(batch.mask, 0.25, 0.0))
    config = LearnerConfig(lr=1e-2, minibatches=2)
    metrics = Learner(model, recipe("grpo"), config).update(batch, np.random.default_rng(0))
    assert metrics["mismatch/abs_mean"] == pytest.approx(0.25, abs=1e-5)
    batch = batch.replace(rollout_logprobs=batch.old_logprobs, old_logprobs=exact)
    assert Learner(tiny_model(), recipe("grpo"), config).update(batch, np.random.default_rng(0))[
        "mismatch/abs_mean"
    ] == pytest.approx(0.25, abs=1e-5)

"""Claims about the Triton form of sampling, in the interpreter; run by ``test_sampling_triton.py``."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.kernels._triton import sampling as triton_sampling
from agentropy.kernels.sampling import Sample, sample

SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 5, 1.0),
    (1.3, 0, 0.8),
    (0.9, 20, 0.7),
    (0.0, 0, 1.0),
]


def inputs(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, scale, (rows, vocabulary))).float()
    return logits, torch.from_numpy(random.random(rows))


def assert_same(logits: Tensor, numbers: Tensor, *settings: float, atol: float = 2e-6) -> Sample:
    """Both forms draw the same tokens, with the same statistics to rounding."""
    drawn = sample(logits, numbers, *settings, backend="triton")  # type: ignore[arg-type]
    plain = sample(logits, numbers, *settings, backend="torch")  # type: ignore[arg-type]
    assert torch.equal(drawn.token, plain.token)
    for name, value, expected in zip(Sample._fields, drawn, plain, strict=True):
        torch.testing.assert_close(value, expected, atol=atol, rtol=2e-7, msg=lambda text, name=name: f"{name}: {text}")
    return drawn


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 31, 517, 4099, 9000])
def check_both_forms_agree(vocabulary: int, settings: tuple[float, int, float]) -> None:
    logits, numbers = inputs(2, vocabulary, vocabulary)
    assert_same(logits, numbers, *settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def check_offsets_and_impossible_tokens(offset: float, settings: tuple[float, int, float]) -> None:
    logits, numbers = inputs(2, 100, 1)
    logits[:, ::3] = -torch.inf
    drawn = assert_same(logits + offset, numbers, *settings)
    assert bool(logits.gather(1, drawn.token[:, None]).isfinite().all())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def check_extreme_uniforms_draw_the_first_and_the_last_possible_token(settings: tuple[float, int, float]) -> None:
    logits, _ = inputs(2, 300, 2)
    logits[:, [0, 1, 299]] = -torch.inf
    for value in (0.0, 1 - 2.0**-53):
        assert_same(logits, torch.full((2,), value, dtype=torch.float64), *settings)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (2, 1.0), (0, 0.3), (0, 0.5), (0, 0.51), (0, 1e-9), (2, 0.7)])
def check_ties_are_cut_as_in_the_torch_form(top_k: int, top_p: float) -> None:
    equal = torch.zeros(10)
    steps = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0, 0.25, 0.0, 0.0, 0.5, 0.0]).log2() * math.log(2)
    signed = torch.tensor([-0.0, 0.0, -1.0, -0.0, -1.0, 0.0, -2.0, -1.0, -2.0, -3.0])
    numbers = torch.tensor([0.0, 0.3, 0.65, 0.999], dtype=torch.float64)
    assert_same(torch.stack((equal, steps, signed)).repeat_interleave(4, 0), numbers.repeat(3), 1.0, top_k, top_p)


@pytest.mark.parametrize("settings", [*SETTINGS[:5], (1.0, 300, 0.999)], ids=str)
def check_few_distinct_values(settings: tuple[float, int, float]) -> None:
    """Ties that straddle blocks; bf16 logits look like this."""
    logits, numbers = inputs(2, 5000, 3, scale=1.0)
    assert_same((logits * 4).round() / 4, numbers, *settings)
    assert_same(logits.bfloat16(), numbers, *settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def check_a_row_depends_on_no_other(settings: tuple[float, int, float]) -> None:
    logits, numbers = inputs(4, 600, 4)
    whole = sample(logits, numbers, *settings, backend="triton")
    for row in range(4):
        alone = sample(logits[row : row + 1], numbers[row : row + 1], *settings, backend="triton")
        for one, many in zip(alone, whole, strict=True):
            assert torch.equal(one, many[row : row + 1])
    logits[1, 3], logits[2] = torch.nan, -torch.inf
    broken = sample(logits, numbers, *settings, backend="triton")
    for one, many in zip(broken, whole, strict=True):
        assert torch.equal(one[[0, 3]], many[[0, 3]])
    assert bool(((broken.token >= 0) & (broken.token < 600)).all())
    assert bool(broken.logprob_raw[1:3].isnan().all()) and bool(broken.entropy_raw[1:3].isnan().all())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def check_estimates_agree(settings: tuple[float, int, float]) -> None:
    logits, numbers = inputs(3, 200, 5)
    for known in (1, 10, 199):
        assert_same(logits, numbers, *settings, known)


def check_layouts() -> None:
    logits, numbers = inputs(3, 700, 6)
    plain = sample(logits, numbers, backend="triton")
    wide = torch.cat((logits, logits), dim=1)[:, :700]
    for other in (logits.t().contiguous().t(), wide, logits.clone().requires_grad_()):
        for value, expected in zip(sample(other, numbers, backend="triton"), plain, strict=True):
            assert torch.equal(value, expected) and not value.requires_grad
    repeated = sample(logits[:1].expand(3, -1), numbers, backend="triton")
    assert torch.equal(repeated.token, sample(logits[[0, 0, 0]], numbers, backend="torch").token)
    assert len(sample(logits[:0], numbers[:0], backend="triton").token) == 0
    assert sample(logits.double(), numbers, backend="triton").entropy_raw.dtype == torch.float64


def check_draws_follow_the_distribution() -> None:
    """A grid of uniforms gives each token its share to within one draw."""
    logits, _ = inputs(1, 11, 7, scale=1.0)
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    drawn = sample(logits.expand(200, -1), grid, backend="triton").token
    expected = torch.softmax(logits[0].double(), -1) * 200
    assert float((torch.bincount(drawn, minlength=11) - expected).abs().max()) <= 1


def check_tiles_cover_every_vocabulary() -> None:
    for vocabulary in (1, 300, 4096, 4097, 49152, 151936, 262144, 1 << 20):
        sizes = triton_sampling.tiles(vocabulary)
        assert sizes["BLOCK"] * sizes["BLOCKS"] >= vocabulary
        assert all(value & (value - 1) == 0 for value in sizes.values())

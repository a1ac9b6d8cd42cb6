"""Claims about the Triton forms of segment operations, in the interpreter; run by ``test_segments_triton.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.kernels import segments
from agentropy.kernels._triton import segments as triton_segments
from agentropy.kernels.dispatch import Backend

LENGTHS = [[0], [1], [0, 3, 0, 4, 0], [130, 0, 1, 64, 200], [5] * 12]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans slowly, and short segments should take several blocks."""
    monkeypatch.setattr(triton_segments, "BLOCK", 64)


def ragged(lengths: list[int], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, two vectors, and turn boundaries."""
    random = np.random.default_rng(seed)
    size = sum(lengths)
    r, v = torch.from_numpy(random.normal(size=(2, size))).to(dtype)
    return torch.tensor([0, *lengths]).cumsum(0), r, v, torch.from_numpy(random.random(size) < 0.4)


def everything(offsets: Tensor, r: Tensor, v: Tensor, boundary: Tensor, backend: Backend) -> list[Tensor]:
    return [
        segments.segment_sum(r, offsets, backend=backend),
        segments.segment_mean(r, offsets, backend=backend),
        segments.segment_max(r, offsets, backend=backend),
        segments.discounted_return(r, 0.97, offsets, backend=backend),
        segments.gae(r, v, 0.97, 0.9, offsets, boundary, backend=backend),
        segments.gae(r, v, 0.97, 0.9, offsets, backend=backend),
        segments.group_norm(r, offsets, backend=backend),
        segments.group_norm(r, offsets, std="none", backend=backend),
    ]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def check_both_forms_agree(lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    given = ragged(lengths, 1, dtype)
    for value, expected in zip(everything(*given, "triton"), everything(*given, "torch"), strict=True):
        assert value.dtype == expected.dtype == dtype
        torch.testing.assert_close(value, expected, atol=tolerance, rtol=tolerance)


def check_a_segment_depends_on_no_other() -> None:
    lengths = [5, 0, 130, 1, 150]
    offsets, r, v, boundary = ragged(lengths, 2, torch.float32)
    whole = everything(offsets, r, v, boundary, "triton")
    alone = everything(torch.tensor([0, 130]), r[5:135], v[5:135], boundary[5:135], "triton")
    for one, many in zip(alone[:3], whole[:3], strict=True):
        assert torch.equal(one, many[2:3])
    for one, many in zip(alone[3:], whole[3:], strict=True):
        assert torch.equal(one, many[5:135])
    r[6], v[140] = torch.nan, torch.inf
    broken = everything(offsets, r, v, boundary, "triton")
    for value, expected in zip(broken, everything(offsets, r, v, boundary, "torch"), strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
    for one, many in zip(broken[3:], whole[3:], strict=True):
        assert torch.equal(one[:5], many[:5]) and torch.equal(one[141:], many[141:])


def check_other_layouts_and_offsets() -> None:
    offsets, r, v, boundary = ragged([3, 0, 40], 3, torch.float32)
    strided = [torch.stack((x, x), 1)[:, 0] for x in (r, v, boundary)]
    plain = everything(offsets, r, v, boundary, "triton")
    for value, expected in zip(everything(offsets.int(), *strided, "triton"), plain, strict=True):
        assert torch.equal(value, expected)
    half = segments.segment_sum(r.bfloat16(), offsets, backend="triton")
    assert half.dtype == torch.float32
    assert torch.equal(half, segments.segment_sum(r.bfloat16(), offsets, backend="torch"))


def check_gradients() -> None:
    offsets, x, _, _ = ragged([3, 0, 4], 4, torch.float64)
    for operation in (segments.segment_sum, segments.segment_mean):
        assert torch.autograd.gradcheck(lambda y, f=operation: f(y, offsets, backend="triton"), x.requires_grad_())


@pytest.mark.parametrize("ratio", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("band", [(1.0, 5.0), (-1.0, 1.0), (1e6, 1e7)])
@pytest.mark.parametrize("size", [0, 1, 100, 900])
def check_both_forms_pick_the_same_tokens(size: int, band: tuple[float, float], ratio: float) -> None:
    _, logp, adv, mask = ragged([size], size, torch.float32)
    logp = torch.where(mask, logp * 2, torch.nan)
    counters = torch.arange(size).flip(0) * 3
    candidates = torch.arange(size) % 5 != 0
    for seed, given in ((0, {}), (2**63 + 5, {"counters": counters}), (-3, {"candidates": candidates})):
        picked, expected = (
            segments.clip_cov_mask(logp, adv, mask, ratio, *band, seed, **given, backend=backend)  # type: ignore[arg-type]
            for backend in ("triton", "torch")
        )
        assert torch.equal(picked, expected)
        assert size < 100 or bool(expected.any()) == (band[0] < 100)

"""The Triton form of the fused head gives the float64 numbers, and compiles for Hopper's matrix units unspilled."""

from __future__ import annotations

import pytest
import torch

from agentropy.kernels.linear_logprob import fused_linear_logprob
from tests.kernels.aot import compile_sm90
from tests.kernels.interpreter import run_interpreted

SIZES = {"count": "i32", "depth": "i32:16", "softcap": "fp32"}
STRIDES = {"stride_hidden": "i64:16", "stride_weight": "i64:16", "stride_inverse": "i32"}
HOPPER_SHARED = 232_448


def test_equals_float64_in_the_interpreter() -> None:
    run_interpreted("interpreted_linear_logprob")


def inputs(kind: str) -> dict[str, str]:
    return {"hidden": kind, "weight": kind, "bias": kind, "target": "*i64"}


@pytest.mark.parametrize("even", [True, False])
def test_the_forward_kernel_spills_nothing(even: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.linear_logprob import SPLIT, TILES, forward_kernel

    tile = TILES[2]
    vectors = dict.fromkeys(("inverse", "tops", "totals", "weighteds", "at_target"), "*fp32")
    signature = {**inputs("*bf16"), **vectors, **SIZES, "vocabulary": "i32", **STRIDES}
    constants = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "HAS_ENTROPY": True, "EVEN": even, "UPCAST": False}
    constants |= {"SPLIT": SPLIT, "TOKENS": tile.tokens, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    made = compile_sm90(forward_kernel, signature, constants, tile.warps, tile.stages)
    assert made.stack == made.spills == 0
    assert made.hgmma > 0
    assert made.shared <= HOPPER_SHARED


@pytest.mark.parametrize("capped", [True, False])
def test_the_gradient_kernel_spills_nothing(capped: bool) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.linear_logprob import TILES, gradient_kernel

    tile = TILES[2]
    vectors = ("inverse", "lse", "entropy", "onehot", "entropy_factor", "plain")
    signature = {**inputs("*bf16"), **dict.fromkeys(vectors, "*fp32"), "out": "*bf16", **SIZES, **STRIDES}
    signature |= {"first": "i32:16", "last": "i32", "stride_out": "i64:16"}
    constants = {"HAS_BIAS": capped, "HAS_SOFTCAP": capped, "HAS_ENTROPY": True, "EVEN": True, "UPCAST": False}
    constants |= {"TOKENS": tile.tokens, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    made = compile_sm90(gradient_kernel, signature, constants, tile.warps, tile.stages)
    assert made.stack == made.spills == 0
    assert made.hgmma > 0
    assert made.shared <= HOPPER_SHARED


def test_the_combining_kernel_spills_nothing() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.linear_logprob import combine_kernel

    vectors = ("tops", "totals", "weighteds", "at_target", "logprob", "entropy", "lse")
    signature = {**dict.fromkeys(vectors, "*fp32"), "count": "i32", "parts": "i32"}
    made = compile_sm90(combine_kernel, signature, {"HAS_ENTROPY": True, "BLOCK": 128})
    assert made.stack == made.spills == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "size", "vocabulary"), [(1024, 576, 49152), (1000, 896, 151936), (33, 72, 4099)])
def test_equals_float64_on_the_device(count: int, size: int, vocabulary: int) -> None:
    hidden = torch.randn(count, size, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, size, device="cuda") * 3 / size**0.5).bfloat16().requires_grad_()
    target = torch.randint(vocabulary, (count,), device="cuda")
    found = fused_linear_logprob(hidden, weight, target, backend="triton")
    factor = torch.randn(2, count, device="cuda", dtype=torch.float64)
    (factor[0] * found.logprob + factor[1] * found.entropy).sum().backward()
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected = fused_linear_logprob(exact[0], exact[1], target, backend="torch")
    (factor[0] * expected.logprob + factor[1] * expected.entropy).sum().backward()
    torch.testing.assert_close(found.logprob.double(), expected.logprob, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.entropy.double(), expected.entropy, atol=2e-5, rtol=0)
    for got, leaf in zip((hidden.grad, weight.grad), exact, strict=True):
        assert got is not None and leaf.grad is not None
        assert float((got.double() - leaf.grad).norm() / leaf.grad.norm()) < 6e-3


@pytest.mark.gpu
def test_results_repeat_and_depend_on_no_other_row() -> None:
    hidden = torch.randn(1024, 896, device="cuda").bfloat16()
    weight = torch.randn(30000, 896, device="cuda").bfloat16() / 30
    target = torch.randint(30000, (1024,), device="cuda")
    rows = torch.randint(1024, (1500,), device="cuda")
    twice = []
    for _ in range(3):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
        found = fused_linear_logprob(leaves[0], leaves[1], target[rows], rows=rows)
        (found.logprob + 0.1 * found.entropy).sum().backward()
        twice.append((found.logprob, found.entropy, leaves[0].grad, leaves[1].grad))
    for again in twice[1:]:
        assert all(torch.equal(one, other) for one, other in zip(twice[0], again, strict=True))
    alone = fused_linear_logprob(hidden[7:8], weight, target[7:8])
    together = fused_linear_logprob(hidden, weight, target)
    assert torch.equal(alone.logprob[0], together.logprob[7]) and torch.equal(alone.entropy[0], together.entropy[7])

"""The Triton form of logprob_entropy gives the float64 numbers, and compiles for Hopper without spilling."""

from __future__ import annotations

import pytest
import torch

from agentropy.kernels.logprob import logprob_entropy
from tests.kernels.aot import compile_sm90
from tests.kernels.interpreter import run_interpreted

ROW = {"stride_row": "i32:16", "stride_inverse": "i32"}


def test_equals_float64_in_the_interpreter() -> None:
    run_interpreted("interpreted_logprob")


@pytest.mark.parametrize(("kind", "size"), [("*bf16", 2), ("*fp32", 4)])
def test_the_forward_kernel_spills_nothing(kind: str, size: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.logprob import FORWARD, forward_kernel

    block, warps = FORWARD[size]
    outputs = dict.fromkeys(("inverse", "logprob", "entropy", "maximum", "log_sum"), "*fp32")
    signature = {"logits": kind, "target": "*i64", **outputs, **ROW, "columns": "i32"}
    made = compile_sm90(forward_kernel, signature, {"stride_column": 1, "BLOCK": block}, num_warps=warps)
    assert made.stack == made.spills == 0
    assert made.registers <= 128


@pytest.mark.parametrize(("kind", "size"), [("*bf16", 2), ("*fp32", 4)])
def test_the_backward_kernel_spills_nothing(kind: str, size: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.logprob import BACKWARD, backward_kernel

    block, warps = BACKWARD[size]
    vectors = ("inverse", "maximum", "log_sum", "entropy", "grad_logprob", "grad_entropy")
    signature = {"logits": kind, "target": "*i64", **dict.fromkeys(vectors, "*fp32"), "out": kind, **ROW}
    signature |= {"stride_out_row": "i32:16", "columns": "i32"}
    constants = {"stride_column": 1, "stride_out_column": 1, "HAS_ENTROPY": True, "BLOCK": block}
    made = compile_sm90(backward_kernel, signature, constants, num_warps=warps)
    assert made.stack == made.spills == 0
    assert made.registers <= 128


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_on_the_device() -> None:
    rows, vocabulary = 14200, 151936
    assert rows * vocabulary > 2**31
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(vocabulary, (rows,), device="cuda")
    results = [logprob_entropy(logits, target) for _ in range(3)]
    for again in results[1:]:
        assert torch.equal(results[0].logprob, again.logprob) and torch.equal(results[0].entropy, again.entropy)
    results[0].logprob.sum().backward()
    last = slice(rows - 64, rows)
    logp = torch.log_softmax(logits.detach()[last].double(), dim=-1)
    expected = logp.gather(1, target[last, None])[:, 0]
    torch.testing.assert_close(results[0].logprob[last].double(), expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(results[0].entropy[last].double(), -(logp.exp() * logp).sum(dim=-1), atol=5e-6, rtol=0)
    onehot = torch.zeros_like(logp).scatter_(1, target[last, None], 1)
    assert logits.grad is not None
    error = (logits.grad[last].double() - (onehot - logp.exp())).norm() / (onehot - logp.exp()).norm()
    assert float(error) < 6e-3
    alone = logprob_entropy(logits.detach()[rows - 1 :], target[rows - 1 :])
    assert torch.equal(alone.logprob[0], results[0].logprob[-1])

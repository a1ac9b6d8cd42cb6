"""The Triton form of sampling draws what the torch form draws, and compiles for Hopper without spills."""

from __future__ import annotations

import pytest

from tests.kernels.aot import compile_sm90
from tests.kernels.interpreter import run_interpreted


def test_both_forms_agree_in_the_interpreter() -> None:
    run_interpreted("interpreted_sampling")


@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
@pytest.mark.parametrize("vocabulary", [151936])
@pytest.mark.parametrize(
    ("greedy", "tempered", "top_k", "top_p"),
    [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 1), (1, 0, 0, 0)],
    ids=["plain", "tempered", "top-k", "all", "greedy"],
)
def test_the_kernel_compiles_without_spills(
    logits: str, vocabulary: int, greedy: int, tempered: int, top_k: int, top_p: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.sampling import WARPS, sample_kernel, tiles

    signature = {
        "logits": logits,
        "stride": "i64:16",
        "uniforms": "*fp64",
        "integers": "*i64",
        "statistics": "*fp32",
        "rows": "i32",
        "size": "i32:16",
        "temperature": "fp32",
        "factor": "fp32",
        "top_k": "i32",
        "top_p_high": "fp32",
        "top_p_low": "fp32",
    }
    flags = {"GREEDY": bool(greedy), "TEMPERED": bool(tempered), "TOP_K": bool(top_k), "TOP_P": bool(top_p)}
    made = compile_sm90(sample_kernel, signature, {**tiles(vocabulary), **flags}, num_warps=WARPS, num_stages=2)
    assert (made.stack, made.spills) == (0, 0)
    assert made.registers <= 255 and made.shared <= 232448

"""The Triton form of tree attention gives the float64 numbers, and compiles for Hopper's matrix units unspilled."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.aot import Cubin, compile_sm90
from tests.kernels.interpreter import run_interpreted

HOPPER_SHARED = 232_448


def test_equals_float64_in_the_interpreter() -> None:
    run_interpreted("interpreted_tree_attention")


def compiled(name: str, config: Any, kind: str, size: int, group: int = 4) -> Cubin:
    from agentropy.kernels._triton import tree_attention as kernels

    kernel = getattr(kernels, name)
    signature = dict.fromkeys(("grad", "q", "k", "v", "out", "dq", "dk", "dv"), f"*{kind}")
    signature |= {"end": "*i64", "lse": "*fp32", "delta": "*fp32", "count": "*i32", "order": "*i32", "scale": "fp32"}
    signature |= dict.fromkeys(("total", "heads", "key_tiles", "query_tiles"), "i32")
    signature |= {f"{x}_{axis}": "i32:16" for x in "qkv" for axis in ("token", "head")}
    constants = {"UPCAST": False, "GROUP": group, "D": size, "DV": size, "BLOCK_D": max(16, size)}
    constants |= {"BLOCK_DV": constants["BLOCK_D"], "QUERIES": config.queries, "KEYS": config.keys}
    signature = {argument: signature[argument] for argument in kernel.arg_names if argument in signature}
    return compile_sm90(kernel, signature, constants, config.warps, config.stages)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("kind", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["forward_kernel", "query_kernel", "key_kernel"])
def test_no_kernel_spills(name: str, kind: str, size: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton.tree_attention import BACKWARD, FORWARD

    table = FORWARD if name == "forward_kernel" else BACKWARD
    made = compiled(name, table[2 if kind == "bf16" else 4, size], kind, size)
    assert made.stack == made.spills == 0
    assert made.hgmma > 0 or kind == "fp32"
    assert made.shared <= HOPPER_SHARED

"""The Triton form of decoding attention: its numbers in the interpreter, its registers for Hopper."""

from __future__ import annotations

import pytest

from tests.kernels.aot import compile_sm90
from tests.kernels.interpreter import run_interpreted


def test_the_interpreted_kernel_keeps_its_claims() -> None:
    run_interpreted("interpreted_paged")


@pytest.mark.parametrize(("size", "rows"), [(64, 16), (128, 16), (128, 32), (128, 64)])
def test_the_kernel_fits_a_hopper_multiprocessor(size: int, rows: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton import paged

    pointers = dict.fromkeys(("query", "keys", "values"), "*bf16")
    indices = dict.fromkeys(("tables", "starts", "ends", "order", "firsts", "counts"), "*i64")
    strides = {
        name: "i64:16" for name in paged.decode_kernel.arg_names if name.startswith("stride") and name != "stride_table"
    }
    numbers = dict.fromkeys(("rows", "query_heads", "span", "tiles", "stride_table"), "i32")
    cubin = compile_sm90(
        paged.decode_kernel,
        pointers | indices | strides | numbers | {"out": "*fp32", "sums": "*fp32", "scale": "fp32"},
        {
            "GROUP": 4,
            "SIZE": size,
            "VALUE_SIZE": size,
            "BLOCK": 16,
            "M": rows,
            "N": paged.KEYS,
            "D": size,
            "DV": size,
            "UPCAST": False,
        },
        num_warps=paged.WARPS,
        num_stages=paged.STAGES,
    )
    assert cubin.stack == cubin.spills == 0
    # Two programs fit on a multiprocessor.
    assert cubin.shared <= 113 * 1024 and cubin.registers * paged.WARPS * 32 <= 32768

"""Claims about the interpreter itself; run by ``test_dispatch.py``."""

import torch
import triton
import triton.language as tl

from agentropy.kernels.dispatch import resolve


@triton.jit
def double(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + index, mask=index < size)
    tl.store(target + index, 2 * value, mask=index < size)


def check_triton_runs_on_tensors_of_the_cpu() -> None:
    source = torch.randn(37)
    assert resolve("auto", source) == "torch"
    assert resolve("triton", source) == "triton"
    target = torch.full_like(source, torch.nan)
    double[(3,)](source, target, 37, BLOCK=16)
    assert torch.equal(target, 2 * source)

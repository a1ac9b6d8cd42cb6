"""Log-probability and entropy of rows of logits: one read of them forward, one read and one write backward.

- ``forward``, ``backward``: the two passes of ``kernels.logprob`` on tensors of one device.
- ``forward_kernel``, ``backward_kernel``: what they launch; one program per row, or per row and block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {2: (4096, 8), 4: (2048, 4)}
BACKWARD = {2: (4096, 8), 4: (2048, 8)}
"""(columns per block, warps) by bytes per logit: 16 bytes per thread and load, and no register is spilled."""


@triton.jit
def forward_kernel(
    logits,
    target,
    inverse,
    logprob,
    entropy,
    maximum,
    log_sum,
    stride_row,
    stride_column,
    stride_inverse,
    columns,
    BLOCK: tl.constexpr,
):
    """One row. Each lane keeps maximum, sum and weighted sum of its own columns; they meet once, at the end."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(inverse + row * stride_inverse)
    base = logits + row * stride_row
    # Finite, so that differences from it are; below it only -inf, whose weight is 0 anyway.
    top = tl.full([BLOCK], -3e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(base + column.to(tl.int64) * stride_column, mask=inside, other=float("-inf")).to(tl.float32)
        z = z * scale
        # One exponential per logit: of the new one where it is lower than the maximum, of the old sum where not.
        gap = tl.abs(z - top)
        gap = tl.where(gap > 1e4, 1e4, gap)  # NaN stays
        fade = tl.exp(-gap)
        higher = z > top
        weighted = tl.where(higher, fade * (weighted - gap * total), weighted - fade * gap)
        total = tl.where(higher, total * fade + 1.0, total + fade)
        top = tl.where(higher, z, top)
    highest = tl.max(top, 0)
    gap = highest - top
    gap = tl.where(gap > 1e4, 1e4, gap)
    fade = tl.exp(-gap)
    weighted_sum = tl.sum(fade * (weighted - gap * total), 0)
    sum_ = tl.sum(fade * total, 0)
    log = tl.log(sum_)
    chosen = tl.load(target + row).to(tl.int64)
    valid = (chosen >= 0) & (chosen < columns)
    at_target = tl.load(base + chosen * stride_column, mask=valid, other=float("nan")).to(tl.float32) * scale
    tl.store(logprob + row, (at_target - highest) - log)
    tl.store(entropy + row, log - weighted_sum / sum_)
    tl.store(maximum + row, highest)
    tl.store(log_sum + row, log)


@triton.jit
def backward_kernel(
    logits,
    target,
    inverse,
    maximum,
    log_sum,
    entropy,
    grad_logprob,
    grad_entropy,
    out,
    stride_row,
    stride_column,
    stride_inverse,
    stride_out_row,
    stride_out_column,
    columns,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row; ``out`` may be ``logits``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    wide = column.to(tl.int64)
    scale = tl.load(inverse + row * stride_inverse)
    g_logprob = tl.load(grad_logprob + row)
    z = tl.load(logits + row * stride_row + wide * stride_column, mask=inside, other=float("-inf")).to(tl.float32)
    logp = (z * scale - tl.load(maximum + row)) - tl.load(log_sum + row)
    p = tl.exp(logp)
    factor = -g_logprob
    if HAS_ENTROPY:
        floored = tl.where(logp < -1e4, -1e4, logp)
        factor = factor - tl.load(grad_entropy + row) * (floored + tl.load(entropy + row))
    dz = p * factor + tl.where(wide == tl.load(target + row).to(tl.int64), g_logprob, 0.0)
    place = out + row * stride_out_row + wide * stride_out_column
    tl.store(place, (dz * scale).to(out.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, entropy, maximum and log-sum [N] in fp32; ``inverse`` [N] is 1 / temperature in fp32."""
    rows, columns = logits.shape
    made = [torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(4)]
    if rows:
        block, warps = FORWARD[logits.element_size()]
        forward_kernel[(rows,)](
            logits,
            target.contiguous(),
            inverse,
            *made,
            logits.stride(0),
            logits.stride(1),
            inverse.stride(0),
            columns,
            BLOCK=block,
            num_warps=warps,
        )
    logprob, entropy, maximum, log_sum = made
    return logprob, entropy, maximum, log_sum


def backward(
    logits: Tensor,
    target: Tensor,
    inverse: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    """Write the gradient of the logits to ``out``, which may be ``logits``."""
    rows, columns = logits.shape
    if not rows:
        return
    block, warps = BACKWARD[logits.element_size()]
    grad_logprob = torch.zeros_like(maximum) if grad_logprob is None else grad_logprob.contiguous()
    backward_kernel[(rows, triton.cdiv(columns, block))](
        logits,
        target.contiguous(),
        inverse,
        maximum,
        log_sum,
        entropy,
        grad_logprob,
        entropy if grad_entropy is None else grad_entropy.contiguous(),
        out,
        logits.stride(0),
        logits.stride(1),
        inverse.stride(0),
        out.stride(0),
        out.stride(1),
        columns,
        HAS_ENTROPY=grad_entropy is not None,
        BLOCK=block,
        num_warps=warps,
    )

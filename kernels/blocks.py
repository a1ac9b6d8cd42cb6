"""The elementwise parts of a Llama block, with their gradients in few passes over memory.

- ``norm_linear``: a linear layer on normalised states, the norm's weight folded into the layer's.
- ``swiglu``: silu(gate) * up.
- ``rotate``: rotary positions as one complex product.
- ``add_norm``, ``gated``: a residual sum with its norm, and silu(gate) * up, where no gradient is needed.

On a CPU a small model's update spends as long on these as on its products; each is one autograd function with an
analytic backward pass, where eager operations make five to ten.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UsageError
from .dispatch import Backend, resolve
from .linear import product, serves


def norm_linear(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return rms_norm(x) * scale, times weight.T, plus bias; differentiable once.

    Args:
        x: [T, H].
        scale: [H], the norm's weight (Zhang and Sennrich 2019).
        weight: [O, H].
        bias: [O].
        eps: added to the mean square.
    """
    return _NormLinear.apply(x, scale, weight, bias, eps)


def swiglu(both: Tensor) -> Tensor:
    """Return silu(gate) * up [T, I] of both [T, 2 I], gate first (Shazeer 2020); differentiable once."""
    return _SwiGLU.apply(both)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return x [T, heads, D] with its neighbouring pairs turned; differentiable once in x.

    Args:
        x: fp32 or float64, each pair (2 i, 2 i + 1) a complex number.
        rotation: complex[T, D / 2], of absolute value 1 times any factor.
    """
    return _Rotate.apply(x, rotation)


def add_norm(x: Tensor, y: Tensor, eps: float, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Return x + y and its root mean square norm without a weight, both [T, H] in the type of ``x``; no gradients.

    Raises:
        UsageError: the shapes differ.
    """
    if x.shape != y.shape:
        raise UsageError(f"add_norm: x is {tuple(x.shape)} and y {tuple(y.shape)}; expected one shape")
    if _in_passes(x, y, backend=backend):
        from ._numba import blocks
        from ._numba.arrays import as_array

        total, normed = torch.empty_like(x), torch.empty_like(x)
        blocks.add_norm(as_array(x), as_array(y), _number(eps, x), as_array(total), as_array(normed))
        return total, normed
    total = x + y
    return total, F.rms_norm(total, total.shape[-1:], None, eps)


def gated(both: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return silu(gate) * up [T, I] of both [T, 2 I], gate first; no gradients."""
    if _in_passes(both, backend=backend):
        from ._numba import blocks
        from ._numba.arrays import as_array

        found = both.new_empty(len(both), both.shape[1] // 2)
        blocks.gated(as_array(both), _number(1, both), as_array(found))
        return found
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _in_passes(*tensors: Tensor, backend: Backend = "auto") -> bool:
    """Whether the numba form is for these."""
    kinds = {tensor.dtype for tensor in tensors}
    fits = len(kinds) == 1 and kinds < {torch.float32, torch.float64, torch.bfloat16}
    return resolve(backend, *tensors, numba=fits and all(map(Tensor.is_contiguous, tensors))) == "numba"


def _number(value: float, like: Tensor) -> np.floating[Any]:
    """``value`` in the type of the sums over ``like``."""
    return np.float64(value) if like.dtype == torch.float64 else np.float32(value)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return product(a, b, bias) if serves(a) else F.linear(a, b, bias)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if _in_passes(x):
            from ._numba import blocks
            from ._numba.arrays import as_array

            normed, inverse = torch.empty_like(x), x.new_empty(len(x), 1)
            blocks.norm(as_array(x.detach()), _number(eps, x), as_array(normed), as_array(inverse.view(-1)))
        else:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            normed = x * inverse
        ctx.save_for_backward(normed, inverse, scale, weight)
        return _product(normed, weight * scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, scale, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = grad_scale = grad_weight = None
        if needs[0]:
            grad_normed = _product(grad, (weight * scale).T)
            if _in_passes(grad_normed, normed):
                from ._numba import blocks
                from ._numba.arrays import as_array

                blocks.norm_backward(*map(as_array, (grad_normed, normed, inverse.view(-1))))
                grad_x = grad_normed
            else:
                mean = (grad_normed * normed).sum(-1, keepdim=True).div_(normed.shape[-1])
                grad_x = grad_normed.addcmul_(normed, mean, value=-1).mul_(inverse)
        if needs[1] or needs[2]:
            folded = _product(grad.T, normed.T)
            grad_scale = (folded * weight).sum(0) if needs[1] else None
            grad_weight = folded.mul_(scale) if needs[2] else None
        return grad_x, grad_scale, grad_weight, grad.sum(0) if needs[3] else None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return gated(both.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        found = torch.empty_like(both)
        if _in_passes(grad, both):
            from ._numba import blocks
            from ._numba.arrays import as_array

            blocks.gated_backward(as_array(grad), as_array(both), _number(1, both), as_array(found))
            return found
        gate, up = both.chunk(2, dim=-1)
        grad_gate, grad_up = found.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return found


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _turned(x, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _turned(grad, rotation.conj()), None


def _turned(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)

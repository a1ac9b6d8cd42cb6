"""The elementwise parts of a Llama block, with their gradients in few passes over memory.

- ``norm_linear``: a linear layer on normalised states, the norm's weight folded into the layer's.
- ``swiglu``: silu(gate) * up.
- ``rotate``: rotary positions as one complex product.

On a CPU a small model's update spends as long on these as on its products; each is one autograd function with an
analytic backward pass, where eager operations make five to ten.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return product(a, b, bias) if serves(a) else F.linear(a, b, bias)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
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
        gate, up = both.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(both, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        both, active = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        grad_gate, grad_up = found.chunk(2, dim=-1)
        torch.mul(grad, active, out=grad_up)
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

"""Linear layers in fp32 on a CPU, through oneDNN instead of MKL.

- ``linear``: x @ weight.T + bias, differentiable.
- ``onednn_linear``: a context in which every linear layer is computed so.
- ``product``: the plain product of two matrices, where no gradient is needed; ``serves``: whether it is for them.

torch gives fp32 products to MKL, which takes slow paths on processors that are not Intel's: on a Zen 5 core it reaches
65 to 100 GFLOP/s where oneDNN, from the same wheel, reaches 170 to 225. On Intel's the two are alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


@functools.cache
def available() -> bool:
    """Whether this torch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def serves(x: Tensor) -> bool:
    """Whether oneDNN computes products with ``x`` faster than what torch takes: fp32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and available()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a [m, k] @ b.T [k, n] + bias [n]; fp32 tensors on the CPU."""
    if not (a.shape[0] and b.shape[0] and a.shape[1]):
        return F.linear(a, b, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [.., k] @ weight.T [k, n] + bias [n], differentiable once in all three.

    What oneDNN does not compute faster (other devices and types, autocast, no oneDNN) goes to torch's own.
    """
    if not (serves(x) and weight.dtype == x.dtype):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") or weight.dim() != 2:
        return F.linear(x, weight, bias)
    if torch.is_inference_mode_enabled() and x.dim() == 2:
        return product(x, weight, bias)  # spares a decode step of a small model a tenth of its time
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = product(flat, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = product(flat.T, x.reshape(-1, x.shape[-1]).T) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


class _Mode(TorchFunctionMode):
    """Sends linear layers to ``linear``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def onednn_linear() -> Iterator[None]:
    """Compute every linear layer of this thread's block with ``linear``; its backward pass may come later."""
    if not available():
        yield
        return
    with _Mode():
        yield

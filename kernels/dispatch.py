"""Which form of an operation runs: plain torch, Triton or numba.

- ``Backend``: what a caller may ask for.
- ``resolve``: what runs, for given tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from ..errors import MissingDependencyError, UsageError, nearest

Form = Literal["torch", "triton", "numba"]
Backend = Literal["auto", "torch", "triton", "numba"]

VARIABLE = "KERNELS_BACKEND"
"""Environment variable that decides where the caller says ``"auto"``: ``auto``, ``torch``, ``triton`` or ``numba``."""

_CHOICES = ("auto", "torch", "triton", "numba")
_CAPABILITY = (8, 0)


def resolve(backend: Backend, *tensors: Tensor, numba: bool = False) -> Form:
    """Return the form that runs.

    ``"auto"`` is Triton where every tensor is on a CUDA device of capability 8.0 or more and Triton can be imported;
    numba where every tensor is on a CPU, the operation has such a form for them and numba can be imported; else torch.
    ``KERNELS_BACKEND`` overrides it; with ``numba`` there, what has no such form is torch. Triton on tensors of the
    CPU needs its interpreter, which ``TRITON_INTERPRET=1`` switches on; the variable is read when the kernels are
    first imported.

    Args:
        backend: what was asked for.
        tensors: what the operation reads.
        numba: whether there is a numba form for them.

    Raises:
        UsageError: no such backend, or one was asked for that cannot run on these tensors.
        MissingDependencyError: one was asked for that is not installed.
    """
    asked: str = backend
    if asked == "auto":
        asked = os.environ.get(VARIABLE) or "auto"
    if asked not in _CHOICES:
        source = "backend" if asked == backend else f"{VARIABLE}: backend"
        raise UsageError(f"unknown {source} '{asked}'{nearest(asked, _CHOICES)}")
    if asked == "auto":
        if numba and all(map(_on_cpu, tensors)) and _installed("numba"):
            return "numba"
        return "triton" if tensors and all(map(_capable, tensors)) and _installed("triton") else "torch"
    if asked == "numba":
        if not _installed("numba"):
            raise MissingDependencyError("backend 'numba' needs numba, which is not installed: pip install numba")
        if numba and all(map(_on_cpu, tensors)):
            return "numba"
        if backend != "auto":
            raise UsageError(
                "backend 'numba' needs tensors on a CPU, of types and sizes for which the operation has such a form; "
                "use backend 'auto', which takes torch elsewhere"
            )
        return "torch"
    if asked == "triton":
        if not _installed("triton"):
            raise MissingDependencyError("backend 'triton' needs Triton, which is not installed: pip install triton")
        if not interpreted() and not all(map(_capable, tensors)):
            raise UsageError(
                "backend 'triton' needs tensors on a CUDA device of capability 8.0 or more; use backend 'torch' "
                "here, or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
            )
        return "triton"
    return "torch"


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _capable(tensor: Tensor) -> bool:
    return tensor.is_cuda and _capability(tensor.device) >= _CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None

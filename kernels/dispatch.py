"""Which form of an operation runs: plain torch or Triton.

- ``Backend``: what a caller may ask for.
- ``resolve``: what runs, for given tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal, cast

import torch
from torch import Tensor

from ..errors import MissingDependencyError, UsageError, nearest

Backend = Literal["auto", "torch", "triton"]

VARIABLE = "KERNELS_BACKEND"
"""Environment variable that decides where the caller says ``"auto"``: ``auto``, ``torch`` or ``triton``."""

_CHOICES = ("auto", "torch", "triton")
_CAPABILITY = (8, 0)


def resolve(backend: Backend, *tensors: Tensor) -> Literal["torch", "triton"]:
    """Return the form that runs.

    ``"auto"`` is Triton where every tensor is on a CUDA device of capability 8.0 or more and Triton can be imported,
    else torch; ``KERNELS_BACKEND`` overrides it. Triton on tensors of the CPU needs its interpreter, which
    ``TRITON_INTERPRET=1`` switches on; the variable is read when the kernels are first imported.

    Raises:
        UsageError: no such backend, or Triton was asked for and cannot run on these tensors.
        MissingDependencyError: Triton was asked for and is not installed.
    """
    asked: str = backend
    if asked == "auto":
        asked = os.environ.get(VARIABLE) or "auto"
    if asked not in _CHOICES:
        source = "backend" if asked == backend else f"{VARIABLE}: backend"
        raise UsageError(f"unknown {source} '{asked}'{nearest(asked, _CHOICES)}")
    if asked == "auto":
        return "triton" if tensors and all(map(_capable, tensors)) and _installed() else "torch"
    if asked == "triton":
        if not _installed():
            raise MissingDependencyError("backend 'triton' needs Triton, which is not installed: pip install triton")
        if not interpreted() and not all(map(_capable, tensors)):
            raise UsageError(
                "backend 'triton' needs tensors on a CUDA device of capability 8.0 or more; use backend 'torch' "
                "here, or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
            )
    return cast(Literal["torch", "triton"], asked)


def interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _capable(tensor: Tensor) -> bool:
    return tensor.is_cuda and _capability(tensor.device) >= _CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None

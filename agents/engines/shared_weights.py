"""Weights in memory that several processes see.

- ``share``: moves a module's parameters to a file in memory, in place.
- ``Layout``, ``adopt``: the same parameters in another process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_ALIGNMENT = 64
_MEMORY = Path("/dev/shm")


class Layout(NamedTuple):
    """Where the parameters of a module lie in a file."""

    path: str
    size: int
    """Bytes."""
    parameters: tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]
    """Name, offset in bytes, shape and type of each, tied ones once."""


def share(module: nn.Module) -> Layout:
    """Move the parameters of ``module`` to a new file in memory; the module goes on with them.

    The caller unlinks the file when all processes have adopted it.
    """
    parameters, size = [], 0
    for name, parameter in module.named_parameters():
        parameters.append((name, size, tuple(parameter.shape), parameter.dtype))
        size += -(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT
    handle, path = tempfile.mkstemp(prefix="agentropy-", dir=_MEMORY if _MEMORY.is_dir() else None)
    os.ftruncate(handle, size)
    os.close(handle)
    layout = Layout(path, size, tuple(parameters))
    views = _views(layout)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            views[name].copy_(parameter)
            parameter.data = views[name]
    return layout


def adopt(module: nn.Module, layout: Layout) -> None:
    """Let a module of the same architecture use the parameters that another process shares."""
    views = _views(layout)
    for name, parameter in module.named_parameters():
        parameter.data = views[name]
        parameter.requires_grad_(False)


def _views(layout: Layout) -> dict[str, Tensor]:
    flat = torch.from_file(layout.path, shared=True, size=max(1, layout.size), dtype=torch.uint8)
    views = {}
    for name, offset, shape, dtype in layout.parameters:
        count = torch.Size(shape).numel() * dtype.itemsize
        views[name] = flat[offset : offset + count].view(dtype).view(shape)
    return views

"""Tensors of the CPU as arrays, and threads that share a kernel's work.

- ``as_array``: the same memory; bfloat16 as int16.
- ``shares``: how many threads work on something, by torch's own number.
- ``together``: run calls side by side.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_WORTH = 1 << 21
"""Multiplications from which on waking a thread costs less than it brings."""


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's memory as an array; numpy has no bfloat16, so that comes as int16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    found: NDArray[Any] = tensor.numpy()
    return found


def shares(work: float) -> int:
    """Return the number of threads for ``work`` multiplications."""
    return 1 if work < _WORTH else torch.get_num_threads()


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Run the calls side by side, the first in this thread; they hold no lock of Python's."""
    others = [_pool(os.getpid()).submit(call) for call in calls[1:]]
    calls[0]()
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool per process: threads do not survive a fork."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "agentropy-kernels")

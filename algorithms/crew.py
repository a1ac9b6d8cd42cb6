"""Several threads at one update.

- ``Crew``: runs parts of a batch side by side, each thread on its own copy of the modules.

A small model's matrices are too small for two threads to share one product well; two threads with a part of the batch
each make better use of two cores. The copies share the weights and have gradients of their own, which are added up in
a fixed order, so a run repeats itself for a given number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Crew:
    """``size`` copies of some modules, the first of them the modules themselves."""

    def __init__(self, modules: Sequence[nn.Module], size: int) -> None:
        self.size = size
        self._modules = [tuple(modules), *(tuple(map(_twin, modules)) for _ in range(size - 1))]
        self._pool: ThreadPoolExecutor | None = None

    def run(self, task: Callable[..., Result], items: Sequence[Item]) -> list[Result]:
        """``task(item, *modules)`` for every item; gradients add up in the first modules.

        Which copy an item meets depends on its place alone. Gradient mode and autocast are the caller's where ``task``
        sets them itself.
        """
        if self.size == 1 or len(items) < 2:
            return [task(item, *self._modules[0]) for item in items]
        if self._pool is None:
            threads = torch.get_num_threads()
            each = max(1, threads // self.size)
            self._pool = ThreadPoolExecutor(self.size, "agentropy-update", torch.set_num_threads, (each,))
        grad = torch.is_grad_enabled()

        def share(number: int) -> list[Result]:
            with torch.set_grad_enabled(grad):
                return [task(item, *self._modules[number]) for item in items[number :: self.size]]

        futures = [self._pool.submit(share, number) for number in range(self.size)]
        wait(futures)
        self._gather()  # also where one has failed, so that no copy keeps a gradient
        shares = [future.result() for future in futures]
        return [shares[place % self.size][place // self.size] for place in range(len(items))]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _gather(self) -> None:
        for copies in self._modules[1:]:
            for own, other in zip(self._modules[0], copies, strict=True):
                for parameter, twin in zip(own.parameters(), other.parameters(), strict=True):
                    if twin.grad is None:
                        continue
                    parameter.grad = twin.grad if parameter.grad is None else parameter.grad.add_(twin.grad)
                    twin.grad = None


def _twin(module: nn.Module) -> nn.Module:
    """A copy with the same weights and buffers in memory, and no gradients."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)

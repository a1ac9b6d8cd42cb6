"""What learning made of each sampled token, stored beside the trajectories of a step.

- ``Credit``: advantage and weight of every sampled token of a step's rows. ``credit_path``: where it is stored.
- ``load_credit``, ``save_credit``: the file.
- ``credit_of``: the same from a batch and its plan.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError

if TYPE_CHECKING:
    from ...agents.tree import Tree
    from ..batch import Minibatch
    from ..recipe import Plan


@dataclass(frozen=True, eq=False)
class Credit:
    """``R`` rows, each a root-to-leaf walk, with ``N`` sampled tokens in all, in the order of the walks.

    A node that rows share stands in each of them, with what that row made of it.
    """

    tree: NDArray[np.int32]
    """``[R]`` line of the row's tree in the step's trajectories."""
    trajectory: NDArray[np.int32]
    """``[R]`` place in ``Tree.trajectories``."""
    leaf: NDArray[np.int32]
    """``[R]`` index of the walk's last node."""
    start: NDArray[np.int64]
    """``[R + 1]`` first token of each row; the last entry is ``N``."""
    advantage: NDArray[np.float32]
    """``[N]`` as the policy loss sees it, after everything that shapes it."""
    weight: NDArray[np.float32]
    """``[N]`` coefficient of the token's policy loss, times the number of sampled tokens: 1 where the loss is the plain
    mean over tokens, 0 for a token that is left out. The clip, which depends on the update, is not in it."""

    def __len__(self) -> int:
        return len(self.tree)

    def row(self, tree: int, leaf: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Advantages and weights of the sampled tokens of the walk to ``leaf``; None if it was not learned from."""
        found = np.flatnonzero((self.tree == tree) & (self.leaf == leaf))
        if not len(found):
            return None
        part = slice(int(self.start[found[0]]), int(self.start[found[0] + 1]))
        return self.advantage[part], self.weight[part]


def credit_path(run: str | Path, step: int) -> Path:
    """Where a run keeps the credit of ``step``."""
    return Path(run) / "trajectories" / f"step-{step:06d}.credit.npz"


def load_credit(path: str | Path) -> Credit:
    """Read a file of ``save_credit``.

    Raises:
        FileNotFoundError: there is none, as in runs of older versions.
        UsageError: the file is something else, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            credit = Credit(**{item.name: data[item.name] for item in fields(Credit)})
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"'{path}' holds no credit of tokens: {error}") from error
    rows = credit.tree.size
    fits = all(array.ndim == 1 for array in vars(credit).values())
    fits = fits and len(credit.trajectory) == len(credit.leaf) == rows and len(credit.start) == rows + 1
    if not (fits and len(credit.advantage) == len(credit.weight) == credit.start[-1]):
        raise UsageError(f"'{path}' is damaged: its arrays do not fit each other")
    return credit


def save_credit(path: Path, credit: Credit) -> None:
    """Write ``credit``; equal credits give equal files."""
    from ..runs import write_atomically

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{item.name: getattr(credit, item.name) for item in fields(Credit)})
    write_atomically(path, buffer.getvalue())


def credit_of(trees: Sequence[Tree], batch: Minibatch, plan: Plan) -> Credit:
    """The credit of ``batch``, which ``Minibatch.from_trees`` made of ``trees`` and ``plan`` is the plan of.

    Raises:
        ValueError: the batch has other rows than the trees.
    """
    rows = [
        (number, place, leaf)
        for number, tree in enumerate(trees)
        for place, trajectory in enumerate(tree.trajectories)
        if not trajectory.failed
        for leaf in trajectory.leaves
    ]
    if len(rows) != len(batch):
        raise ValueError(f"a batch of {len(batch)} rows was not made of trees with {len(rows)} leaves")
    mask = batch.mask.cpu()
    counts = mask.sum(1).numpy()
    names = np.asarray(rows, np.int32).reshape(-1, 3)
    return Credit(
        tree=names[:, 0].copy(),
        trajectory=names[:, 1].copy(),
        leaf=names[:, 2].copy(),
        start=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
        advantage=plan.advantages.cpu()[mask].float().numpy(),
        weight=(plan.coefficients.cpu()[mask].double() * int(counts.sum())).float().numpy(),
    )

"""The rows that an update learns from.

- ``Minibatch``: ``[B, L]`` tensors over tokens and one value per row, built from trajectory trees.

A row is a whole trajectory (``full`` context) or one turn of it (``window`` context: several rows share
``trajectory``). Position ``t`` speaks of token ``t``, which was predicted from the tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

if TYPE_CHECKING:
    from ..agents.tree import Node, Tree

_FILL = {"turn": -1, "node": -1}


@dataclass(kw_only=True, eq=False)
class Minibatch:
    """A batch of rows. Only ``mask`` is required; what is absent takes the value that its comment names."""

    mask: Tensor
    """``[B, L]`` bool: the policy sampled this token and it is trained on."""
    tokens: Tensor | None = None
    """``[B, L]`` int64, right-padded; needed by the learner only."""
    length: Tensor = None  # type: ignore[assignment]
    """``[B]`` tokens of each row; up to its last trained token when absent."""
    turn: Tensor = None  # type: ignore[assignment]
    """``[B, L]`` turn of each trained token, -1 elsewhere; when absent, the row's number among those of its trajectory,
    that is 0 where rows are trajectories."""
    old_logprobs: Tensor = None  # type: ignore[assignment]
    """``[B, L]`` nats, under the weights that sampled the token; 0 when absent. Its dtype is that of the
    plan."""
    old_entropy: Tensor = None  # type: ignore[assignment]
    """``[B, L]`` nats of the full softmax, under the same weights; 0 when absent."""
    ref_logprobs: Tensor | None = None
    """``[B, L]`` nats, under the reference model."""
    rollout_logprobs: Tensor | None = None
    """``[B, L]`` nats, as the sampler reported them, where ``old_logprobs`` were computed anew."""
    token_rewards: Tensor = None  # type: ignore[assignment]
    """``[B, L]``: what each turn paid, on the turn's last trained token; 0 when absent."""
    values: Tensor | None = None
    """``[B, L]``: the critic's value of the state before each token."""
    node: Tensor | None = None
    """``[B, L]`` int64: the tree node, unique in the batch, that each trained token belongs to, -1 elsewhere. Branches
    share the nodes before their fork; when absent, nothing is shared."""
    group: Tensor = None  # type: ignore[assignment]
    """``[B]`` int64: rows of one task and start state; all of them one group when absent."""
    trajectory: Tensor = None  # type: ignore[assignment]
    """``[B]`` int64; every row its own when absent."""
    returns: Tensor = None  # type: ignore[assignment]
    """``[B]`` float64: the whole trajectory's return; the sum of its ``token_rewards`` when absent."""
    turn_rewards: Tensor | None = None
    """``[B, K]``: rewards of the turns of the row's *trajectory*, zero-padded. Where rows are turns, ``[B]`` will do:
    what each one's own turn paid."""
    anchor: Sequence[Any] | None = None
    """Per row, the observation before each turn of its *trajectory*: entry ``k`` belongs to turn ``k``. Where rows are
    turns, one value will do, a text or its number: what stood before its own turn."""
    failed: int = 0
    """Trajectories that were left out because their environment broke."""

    def __post_init__(self) -> None:
        self.mask = torch.as_tensor(self.mask).bool()
        if self.mask.dim() != 2:
            raise UsageError(f"mask must be [rows, tokens], not of shape {tuple(self.mask.shape)}")
        rows, width = self.mask.shape
        device = self.mask.device
        if self.length is None:
            self.length = self.extent
        if self.old_logprobs is None:
            self.old_logprobs = torch.zeros(rows, width, device=device)
        if self.old_entropy is None:
            self.old_entropy = torch.zeros_like(self.old_logprobs)
        if self.token_rewards is None:
            self.token_rewards = torch.zeros_like(self.old_logprobs)
        if self.group is None:
            self.group = torch.zeros(rows, dtype=torch.int64, device=device)
        if self.trajectory is None:
            self.trajectory = torch.arange(rows, device=device)
        if self.turn is None:
            self.turn = torch.where(self.mask, _rank(self.trajectory)[:, None], -1)
        if self.returns is None:
            paid = torch.where(self.mask, self.token_rewards, 0).double().sum(1)
            names, index = self.trajectory.unique(return_inverse=True)
            self.returns = paid.new_zeros(len(names)).index_add(0, index, paid)[index]
        self.returns = torch.as_tensor(self.returns).double()
        self._spread_turns()
        for name, value in self._tensors():
            wanted = (rows, width) if value.dim() == 2 and name != "turn_rewards" else (rows,)
            if tuple(value.shape[: len(wanted)]) != wanted:
                raise UsageError(f"{name} has shape {tuple(value.shape)}; the mask asks for {wanted}")

    def _spread_turns(self) -> None:
        """Gather what rows of single turns say of their own turn into what their whole trajectory was told and paid.

        Rows of several turns are left as they are; what needs to know their turns says so.
        """
        if isinstance(self.anchor, Tensor):
            self.anchor = self.anchor.tolist()
        own_rewards = self.turn_rewards is not None and self.turn_rewards.dim() == 1
        own_anchor = self.anchor is not None and not all(isinstance(seen, tuple | list) for seen in self.anchor)
        last = self.turn.amax(1) if self.mask.shape[1] else self.turn.sum(1)
        if not (own_rewards or own_anchor) or bool(((self.turn != last[:, None]) & self.mask).any()):
            return
        place = torch.where(last < 0, _rank(self.trajectory), last)
        names, owner = self.trajectory.unique(return_inverse=True)
        turns = int(place.max()) + 1
        if own_rewards:
            assert self.turn_rewards is not None
            table = self.turn_rewards.new_zeros(len(names), turns)
            table[owner, place] = self.turn_rewards
            self.turn_rewards = table[owner]
        if own_anchor:
            assert self.anchor is not None
            texts: list[list[Any]] = [[""] * turns for _ in names]
            for row, turn, seen in zip(owner.tolist(), place.tolist(), self.anchor, strict=True):
                texts[row][turn] = seen
            self.anchor = [tuple(texts[row]) for row in owner.tolist()]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = ((item.name, getattr(self, item.name)) for item in fields(self))
        return [(name, value) for name, value in named if isinstance(value, Tensor)]

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def extent(self) -> Tensor:
        """``[B]``: tokens up to and including the last trained one; what follows cannot matter to a loss."""
        positions = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        return (self.mask * positions).amax(1) if self.mask.shape[1] else self.mask.sum(1)

    def replace(self, **changes: Any) -> Minibatch:
        """A copy with some fields exchanged."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return Minibatch(**values | changes)

    def select(self, rows: Tensor | Sequence[int], width: int | None = None) -> Minibatch:
        """The rows of ``rows`` (indices), cut to the first ``width`` columns."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.mask.device)
        changes: dict[str, Any] = {
            name: value[index] if value.dim() == 1 or name == "turn_rewards" else value[index, :width]
            for name, value in self._tensors()
        }
        if self.anchor is not None:
            changes["anchor"] = [self.anchor[row] for row in index.tolist()]
        return self.replace(**changes)

    def to(self, device: torch.device | str) -> Minibatch:
        """A copy with every tensor on ``device``."""
        return self.replace(**{name: value.to(device) for name, value in self._tensors()})

    def microbatches(self, max_tokens: int) -> Iterator[Tensor]:
        """Row indices of parts, longest rows first; rows x longest extent stays within ``max_tokens``.

        A part holds rows of similar extent, so that at most a quarter of it is padding. Rows without a trained
        token are left out. A row longer than the budget goes alone.
        """
        extent = self.extent.tolist()
        order = sorted((row for row in range(len(self)) if extent[row]), key=lambda row: -extent[row])
        part: list[int] = []
        for row in order:
            longest = extent[part[0]] if part else 0
            if part and ((len(part) + 1) * longest > max_tokens or 4 * extent[row] < 3 * longest):
                yield torch.tensor(part)
                part = []
            part.append(row)
        if part:
            yield torch.tensor(part)

    @classmethod
    def from_trees(cls, trees: Sequence[Tree]) -> Minibatch:
        """One row per leaf of every trajectory, in order; trees are groups. Failed trajectories are left out.

        Raises:
            UsageError: no trajectory has acted.
        """
        rows: list[dict[str, Any]] = []
        failed = trajectories = nodes = 0
        for group, tree in enumerate(trees):
            for trajectory in tree.trajectories:
                if trajectory.failed:
                    failed += 1
                    continue
                actions = _actions(tree, trajectory.leaves)
                turns = 1 + max(actions, default=-1)
                rewards = [actions[turn][0].reward if turn in actions else 0.0 for turn in range(turns)]
                anchor = tuple(actions[turn][1] if turn in actions else "" for turn in range(turns))
                for leaf in trajectory.leaves:
                    row = _row(tree, leaf, nodes)
                    rows.append(
                        row
                        | {"group": group, "trajectory": trajectories, "returns": trajectory.reward}
                        | {"turn_rewards": np.asarray(rewards, np.float32), "anchor": anchor}
                    )
                trajectories += 1
            nodes += len(tree.nodes)
        if not rows:
            raise UsageError(
                f"there is nothing to learn from: no actions in {len(trees)} trees, {failed} episodes failed"
            )
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return cls(
            **{name: _pad(name, columns[name]) for name in _PADDED},
            **{name: torch.tensor(columns[name]) for name in ("length", "group", "trajectory")},
            returns=torch.tensor(columns["returns"], dtype=torch.float64),
            anchor=columns["anchor"],
            failed=failed,
        )


def _rank(trajectory: Tensor) -> Tensor:
    """``[B]``: how many earlier rows have the same trajectory."""
    seen: dict[int, int] = {}
    ranks = []
    for name in trajectory.tolist():
        ranks.append(seen.get(name, 0))
        seen[name] = ranks[-1] + 1
    return torch.tensor(ranks, dtype=torch.int64, device=trajectory.device)


_PADDED = ("tokens", "mask", "turn", "node", "old_logprobs", "old_entropy", "token_rewards", "turn_rewards")


def _pad(name: str, arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    width = max(map(len, arrays))
    out = np.full((len(arrays), width), _FILL.get(name, 0), arrays[0].dtype)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return torch.from_numpy(out)


def _actions(tree: Tree, leaves: Sequence[int]) -> Mapping[int, tuple[Node, str]]:
    """For each turn of a trajectory, its action and the text of the message before it."""
    found: dict[int, tuple[Node, str]] = {}
    for leaf in leaves:
        walk = tree.path(leaf)
        for before, node in pairwise(walk):
            if node.role == "action" and node.turn not in found:
                found[node.turn] = (node, before.text)
    return found


def _row(tree: Tree, leaf: int, nodes: int) -> dict[str, Any]:
    """``nodes`` is the number of the tree's first node in the batch."""
    mask = tree.mask(leaf)
    rewards, owner = np.zeros(len(mask), np.float32), np.full(len(mask), -1, np.int64)
    start = 0
    for node in tree.path(leaf):
        stop = start + len(node.tokens)
        if node.sampled and len(node.tokens):
            rewards[stop - 1] = node.reward
            owner[start:stop] = nodes + node.index
        start = stop
    return {
        "tokens": tree.tokens(leaf).astype(np.int64),
        "mask": mask,
        "turn": tree.turns(leaf).astype(np.int64),
        "node": owner,
        "old_logprobs": tree.logprobs(leaf),
        "old_entropy": tree.entropies(leaf),
        "token_rewards": rewards,
        "length": len(mask),
    }

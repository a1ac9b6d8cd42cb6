"""The trajectory tree: every rollout of one task, each token stored once.

- ``Node``: one message, holding only the tokens that it adds.
- ``Trajectory``: one episode, named by the leaves of its root-to-leaf walks.
- ``Tree``: the nodes and trajectories of one task, with the arrays of any walk.
- ``merge``: one tree from several of the same task, equal prompts shared.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError, nearest

Role = Literal["prompt", "observation", "action"]
Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

FORMAT_VERSION = 1
"""Version of ``Tree.to_dict``; raised when a reader of the old one would misread the new one."""

_NO_FLOATS: Float32Array = np.empty(0, np.float32)
_NO_FLOATS.flags.writeable = False


@dataclass(slots=True, eq=False)
class Node:
    """One message of a conversation: the tokens it appends to its parent's."""

    index: int
    parent: int
    """Index of the node before, -1 at a root."""
    role: Role
    tokens: Int32Array
    sampled: bool = False
    """Whether the policy being trained chose these tokens: all of them, or none."""
    logprobs: Float32Array = field(default_factory=lambda: _NO_FLOATS)
    """Nats at the sampling temperature, one per token; empty unless ``sampled``."""
    entropies: Float32Array = field(default_factory=lambda: _NO_FLOATS)
    """Nats of the full softmax at the sampling temperature, one per token; empty unless ``sampled``."""
    turn: int = -1
    """Turn of an action, or of the action that an observation answers; -1 for a prompt."""
    reward: float = 0.0
    """What the environment paid for this action."""
    text: str = ""
    """Decoded from the tokens of a sampled action; otherwise the text that was rendered into tokens."""
    version: int = 0
    """Version of the weights that sampled it."""


@dataclass(slots=True)
class Trajectory:
    """One episode: one leaf in ``full`` context, one per turn in ``window``, none if it never acted."""

    leaves: tuple[int, ...]
    reward: float = 0.0
    """Sum over turns."""
    won: bool = False
    score: float = 0.0
    turns: int = 0
    truncated: bool = False
    """Cut by the turn limit or by a full context."""
    failed: bool = False
    """The environment broke; says nothing about the policy, so it must not enter a loss."""
    seed: int = 0
    """Seed of the task's group; with the position in ``Tree.trajectories`` it replays the episode."""
    info: dict[str, Any] = field(default_factory=dict)
    """JSON-able remarks."""


class Tree:
    """All rollouts of one task. Nodes are only ever appended, and a parent precedes its children."""

    def __init__(self, task: str, split: str) -> None:
        self.task = task
        self.split = split
        self.nodes: list[Node] = []
        self.trajectories: list[Trajectory] = []
        self.info: dict[str, Any] = {}
        """JSON-able remarks on how the group was played."""

    def add(
        self,
        parent: int,
        role: Role,
        tokens: ArrayLike,
        *,
        sampled: bool = False,
        logprobs: ArrayLike | None = None,
        entropies: ArrayLike | None = None,
        turn: int = -1,
        reward: float = 0.0,
        text: str = "",
        version: int = 0,
    ) -> int:
        """Append a node and return its index.

        ``logprobs`` and ``entropies`` have one entry per token and are required exactly when ``sampled``.

        Raises:
            ValueError: the parent does not exist, or the arrays do not fit the tokens.
        """
        index = len(self.nodes)
        if not -1 <= parent < index:
            raise ValueError(f"parent {parent} is not a node of this tree (it has {index})")
        if (parent == -1) != (role == "prompt"):
            raise ValueError(f"a root is a prompt and nothing else is; got {role!r} under {parent}")
        if sampled and role != "action":
            raise ValueError(f"only an action can be sampled, not {role!r}")
        ids = np.asarray(tokens, np.int32)
        chances, spreads = _NO_FLOATS, _NO_FLOATS
        if sampled:
            if logprobs is None or entropies is None:
                raise ValueError("a sampled node needs its log-probabilities and entropies")
            chances, spreads = np.asarray(logprobs, np.float32), np.asarray(entropies, np.float32)
            if not ids.shape == chances.shape == spreads.shape:
                raise ValueError(f"{ids.shape} tokens, {chances.shape} logprobs, {spreads.shape} entropies")
        elif logprobs is not None or entropies is not None:
            raise ValueError("only a sampled node has log-probabilities and entropies")
        node = Node(index, parent, role, ids, sampled, chances, spreads, turn, float(reward), text, int(version))
        self.nodes.append(node)
        return index

    @property
    def env_steps(self) -> int:
        """Commands that environments were given for it; those before a fork count once, and those of a probe count."""
        played = sum(node.role == "action" for node in self.nodes)
        return played + int(self.info.get("probe", {}).get("env_steps", 0))

    def path(self, leaf: int) -> list[Node]:
        """Nodes from the root to ``leaf``, both included."""
        walk: list[Node] = []
        index = leaf
        while index != -1:
            node = self.nodes[index]
            walk.append(node)
            index = node.parent
        walk.reverse()
        return walk

    def children(self, index: int) -> list[int]:
        """Indices of the nodes under ``index``; the roots for -1."""
        return [node.index for node in self.nodes if node.parent == index]

    def tokens(self, leaf: int) -> Int32Array:
        """What the model read and wrote up to the end of ``leaf``, ``[L]``."""
        return np.concatenate([node.tokens for node in self.path(leaf)])

    def mask(self, leaf: int) -> NDArray[np.bool_]:
        """True exactly on sampled tokens, ``[L]``."""
        return self._spread(leaf, lambda node: node.sampled, False, np.bool_)

    def logprobs(self, leaf: int) -> Float32Array:
        """Log-probabilities of sampled tokens, 0 elsewhere, ``[L]``."""
        return self._spread(leaf, lambda node: node.logprobs, 0.0, np.float32)

    def entropies(self, leaf: int) -> Float32Array:
        """Entropies at sampled tokens, 0 elsewhere, ``[L]``."""
        return self._spread(leaf, lambda node: node.entropies, 0.0, np.float32)

    def turns(self, leaf: int) -> Int32Array:
        """Turn of each sampled token, -1 elsewhere, ``[L]``."""
        return self._spread(leaf, lambda node: node.turn, -1, np.int32)

    def _spread(self, leaf: int, value: Callable[[Node], Any], fill: Any, dtype: type) -> NDArray[Any]:
        walk = self.path(leaf)
        out: NDArray[Any] = np.full(sum(len(node.tokens) for node in walk), fill, dtype)
        start = 0
        for node in walk:
            stop = start + len(node.tokens)
            if node.sampled:
                out[start:stop] = value(node)
            start = stop
        return out

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form that ``from_dict`` reads back exactly; floats are base64 of ``<f4``."""
        return {
            "format": FORMAT_VERSION,
            "task": self.task,
            "split": self.split,
            "info": self.info,
            "nodes": [_node_to_dict(node) for node in self.nodes],
            "trajectories": [
                {item.name: getattr(trajectory, item.name) for item in fields(Trajectory)}
                | {"leaves": list(trajectory.leaves)}
                for trajectory in self.trajectories
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tree:
        """Inverse of ``to_dict``.

        Raises:
            UsageError: the data is not a tree, or a newer version of this package wrote it.
        """
        version = data.get("format")
        if not isinstance(version, int):
            raise UsageError("this is not a trajectory tree: expected a JSON object with an integer 'format'")
        if version > FORMAT_VERSION:
            raise UsageError(
                f"this trajectory tree has format {version}, newer than {FORMAT_VERSION}; "
                "upgrade it with `pip install --upgrade agentropy`"
            )
        tree = cls(data["task"], data["split"])
        for entry in data["nodes"]:
            if entry["role"] not in get_args(Role):
                raise UsageError(f"unknown role '{entry['role']}'{nearest(entry['role'], get_args(Role))}")
            floats = {name: _decode(entry[name]) for name in ("logprobs", "entropies") if entry["sampled"]}
            tree.add(**entry | floats)
        tree.info = dict(data.get("info", {}))
        tree.trajectories = [Trajectory(**entry | {"leaves": tuple(entry["leaves"])}) for entry in data["trajectories"]]
        return tree


def merge(trees: Sequence[Tree]) -> Tree:
    """One tree with the trajectories of ``trees`` in order; prompts with equal tokens become one node.

    Raises:
        ValueError: there are no trees, or they are of different tasks or splits.
    """
    if len({(tree.task, tree.split) for tree in trees}) != 1:
        raise ValueError("trees to merge must be one or more, of one task and split")
    merged = Tree(trees[0].task, trees[0].split)
    prompts: dict[bytes, int] = {}
    for tree in trees:
        merged.info |= tree.info
        renumbered: list[int] = []
        for node in tree.nodes:
            index = len(merged.nodes)
            if node.parent == -1:
                index = prompts.setdefault(node.tokens.tobytes(), index)
            if index == len(merged.nodes):
                parent = -1 if node.parent == -1 else renumbered[node.parent]
                merged.nodes.append(replace(node, index=index, parent=parent))
            renumbered.append(index)
        merged.trajectories.extend(
            replace(trajectory, leaves=tuple(renumbered[leaf] for leaf in trajectory.leaves))
            for trajectory in tree.trajectories
        )
    return merged


def _node_to_dict(node: Node) -> dict[str, Any]:
    return {
        "parent": node.parent,
        "role": node.role,
        "tokens": node.tokens.tolist(),
        "sampled": node.sampled,
        "logprobs": _encode(node.logprobs) if node.sampled else None,
        "entropies": _encode(node.entropies) if node.sampled else None,
        "turn": node.turn,
        "reward": node.reward,
        "text": node.text,
        "version": node.version,
    }


def _encode(array: Float32Array) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")


def _decode(text: str) -> Float32Array:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)

"""Trajectories as lists of turns, turns as lists of tokens.

The modules of this folder are the methods once more, in NumPy and loops, written from the papers' equations, to
compare the library with; nothing here knows the library. This one is what every method reads; ``statistics`` and
``loss`` are what they share.

A token is one that the policy sampled and is trained on; prompts, observations and padding do not exist here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Place = tuple[int, int]
"""Row and column of a token in the batch: its name."""

PerToken = dict[Place, float]


@dataclass
class Token:
    """One sampled token."""

    place: Place
    logp: float = 0.0
    """Nats, under the current policy; ``entropy`` likewise."""
    old_logp: float = 0.0
    """Nats, under the policy that sampled it; ``old_entropy`` likewise."""
    ref_logp: float = 0.0
    rollout_logp: float = 0.0
    """As the sampler reported it, where ``old_logp`` was computed anew."""
    entropy: float = 0.0
    old_entropy: float = 0.0
    value: float = 0.0
    """The critic's, now, of the state before this token."""
    old_value: float = 0.0
    """The critic's before the update."""
    reward: float = 0.0
    node: int = -1
    """Message of the rollout tree that it belongs to; forks share those before they part."""


@dataclass
class Turn:
    """One action."""

    index: int
    tokens: list[Token]


@dataclass
class Trajectory:
    """One episode."""

    group: int
    outcome: float
    """Its return."""
    turns: list[Turn]
    """Those with a token."""
    rewards: list[float] = field(default_factory=list)
    """What each turn paid, also those without a token."""
    anchors: list[str] = field(default_factory=list)
    """The observation before each turn, also of those without a token."""

    @property
    def tokens(self) -> list[Token]:
        return [token for turn in self.turns for token in turn.tokens]


def members(trajectories: list[Trajectory], group: int) -> list[Trajectory]:
    """The episodes of one task."""
    return [trajectory for trajectory in trajectories if trajectory.group == group]


def sequences(trajectories: list[Trajectory]) -> list[list[Token]]:
    """The tokens of each row of the batch, in order; a row holds a whole trajectory or one turn of it."""
    rows: dict[int, list[Token]] = {}
    for trajectory in trajectories:
        for token in trajectory.tokens:
            rows.setdefault(token.place[0], []).append(token)
    return list(rows.values())


def spread(trajectories: list[Trajectory], values: list[float]) -> PerToken:
    """Every token gets the value of its trajectory."""
    return {
        token.place: value
        for trajectory, value in zip(trajectories, values, strict=True)
        for token in trajectory.tokens
    }

"""Where rollouts fork: the schedulers of ARPO (2507.19849) and AEPO (2510.14545).

- ``Branching``: what the rollout loop asks; ``Group``: the same for one task, while its episodes run.
- ``Decision``: whether one episode forks at one observation.
- ``EntropyBranching``: fork where entropy rises after an observation.
- ``global_share``: how AEPO splits its budget between fresh episodes and forks.

An episode that acts on an observation may fork there: its children start from a copy of the world right after that
observation and choose their own action, while it goes on with the one it has already chosen. So the first tokens of
an action are the probe that ARPO generates after a tool's answer, and no token is sampled for the decision alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import UsageError
from .tree import Float32Array

_DRAWS = 7
"""Sets the random numbers of decisions apart from those of actions."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one episode after one observation."""

    delta_entropy: float
    """Entropy of the probe less that of the episode's root, in the unit of the scheduler."""
    probability: float
    """P of the rule: compared with a threshold, or the probability of each fork."""
    forks: int


class Group(Protocol):
    """The episodes of one task. Members are numbered in the order in which they were begun."""

    size: int
    """Episodes that there will be in the end, exactly."""
    probing: bool
    """The first episode only looks around: it is thrown away, and ``probed`` hears how it went."""
    initial: int
    """Episodes to begin with; ``probed`` may change it."""

    def probed(self, entropies: Sequence[Float32Array]) -> None:
        """The probe's episode is over; ``entropies`` are those of its actions, in nats."""

    def decide(self, member: int, turn: int, entropies: Float32Array, room: int) -> Decision | None:
        """Called for every action of turn ``turn``; ``entropies`` are its tokens', in nats.

        ``room`` is how many more episodes the group may begin. None where there is nothing to decide: at the first
        turn, without room, and for the action at which a child left its parent.
        """

    def forked(self, parent: int, child: int) -> None:
        """Episode ``child`` begins as a copy of ``parent``."""

    def end_round(self, begun: int) -> None:
        """Every running episode has acted once, and ``begun`` new ones were begun since the last round."""

    def top_up(self, missing: int) -> int:
        """How many of the ``missing`` episodes to begin afresh, now that no episode is left."""


class Branching(Protocol):
    """Makes a ``Group`` for every task of a rollout, and remembers what outlives it."""

    entropy_top_k: int
    """Entropies it wants: 0 for exact ones, else the estimate from so many most probable tokens."""

    def group(self, place: int, size: int, seed: int, vocabulary: int) -> Group:
        """For the task at ``place`` of the rollout's list, which is to have ``size`` episodes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def global_share(size: int, difference: float, beta: float = 0.5) -> float:
    """``m = k σ(β (H_root - H̄_tool))``: of ``k = size`` episodes, those to begin afresh (AEPO, Eq. of the
    pre-monitoring); a real number in (0, size)."""
    return size / (1 + math.exp(-beta * difference))


@dataclass(kw_only=True)
class EntropyBranching:
    """``P = (α + β ΔH) (1 - P̂(l))``, where ΔH is the rise of entropy over the episode's root.

    Raises:
        UsageError: an option is out of range.
    """

    initial: int | None = None
    """N: episodes begun afresh; half of the group when None."""
    branches: int = 1
    """Z: forks of one decision."""
    alpha: float = 0.5
    beta: float = 0.2
    tau: float = 0.5
    """Threshold; plays no part in the other rules."""
    probe_tokens: int = 20
    """k: tokens of an action that count."""
    rule: Literal["threshold", "bernoulli", "reversed"] = "threshold"
    """``threshold``: ``P > τ`` (the papers). ``bernoulli``: with probability P (ARPO's released code). ``reversed``:
    with probability ``1 - α / (1 - P̂) + β ΔH`` (AEPO's released code, which compares the other way round)."""
    scale: Literal["tokens", "vocab", "log_vocab"] = "tokens"
    """What the sum of entropy differences is divided by: the number of tokens compared, the vocabulary's size (ARPO,
    Eq. 4) or its logarithm (released code)."""
    align: bool = True
    """Compare token i with token i, as far as both actions go; off, the sums of both first k tokens (released code), so
    that a shorter action has less entropy."""
    lookahead: bool = True
    """Judge the tokens after the observation; off, those of the action before it (released code)."""
    root: Literal["episode", "slot"] = "episode"
    """Whose first action is the root: the episode's own, inherited by its forks, or (released code) the first one that
    was ever played at the same place of a rollout, also of another task and by other weights."""
    separate_draws: bool = False
    """Decide for each of the Z forks anew (released code)."""
    top_up: Literal["together", "one"] = "together"
    """When all episodes have ended early: begin all that are missing, or one after the other (released code)."""
    penalty: float = 0.0
    """``P̂(l) = penalty · l`` for l consecutive forks; 0 is ARPO, AEPO's released code has 0.05."""
    penalty_scope: Literal["chain", "group"] = "chain"
    """Whose forks are consecutive: those of one chain of parents and children (AEPO), or the group's rounds in which
    any episode was begun (released code)."""
    monitor: bool = False
    """Play one episode first, to split the group between fresh episodes and forks (AEPO's pre-monitoring)."""
    monitor_beta: float = 0.5
    monitor_root: bool = False
    """Count the root in the mean entropy after observations too (released code)."""
    rounding: Literal["nearest", "up"] = "nearest"
    """Of the share of fresh episodes; ``up``: integer part plus one (released code)."""
    entropy_top_k: int = 0
    slot_roots: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    """Root statistics by place, of ``root="slot"``; outlives rollouts, and so is checkpointed."""

    def __post_init__(self) -> None:
        least = {"branches": 1, "probe_tokens": 1, "entropy_top_k": 0, "penalty": 0, "initial": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"branching: {name} is {value}; expected at least {bound}")
        if self.root == "slot" and self.align:
            raise UsageError("branching: root='slot' keeps sums alone; expected align=False with it")

    def group(self, place: int, size: int, seed: int, vocabulary: int) -> _EntropyGroup:
        return _EntropyGroup(self, place, size, seed, vocabulary)

    def state_dict(self) -> dict[str, Any]:
        return {"slot_roots": dict(self.slot_roots)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.slot_roots = dict(state["slot_roots"])

    def divisor(self, tokens: int, vocabulary: int) -> float:
        """What a sum of entropies over ``tokens`` tokens is divided by."""
        if self.scale == "tokens":
            return max(tokens, 1)
        return float(vocabulary) if self.scale == "vocab" else math.log(vocabulary)

    def probability(self, delta_entropy: float, consecutive: int) -> float:
        """P of the rule after ``consecutive`` forks; in [0, 1] where it is a probability."""
        left = max(0.0, 1 - self.penalty * consecutive)
        if self.rule == "threshold":
            return (self.alpha + self.beta * delta_entropy) * left
        if self.rule == "bernoulli":
            return min(max((self.alpha + self.beta * delta_entropy) * left, 0.0), 1.0)
        return min(max(1 - self.alpha / left + self.beta * delta_entropy, 0.0), 1.0) if left > 0 else 0.0

    def fresh(self, size: int, difference: float) -> int:
        """Episodes to begin afresh of ``size``, when the root's entropy is ``difference`` above that after
        observations."""
        share = global_share(size, difference, self.monitor_beta)
        whole = int(share) + 1 if self.rounding == "up" else round(share)
        return min(max(whole, 1), size)


class _EntropyGroup:
    """One task's group under ``EntropyBranching``; see ``Group``."""

    def __init__(self, options: EntropyBranching, place: int, size: int, seed: int, vocabulary: int) -> None:
        self.size = size
        self.probing = options.monitor
        self.initial = min(options.initial or (size + 1) // 2, size)
        self._options = options
        self._place = place
        self._seed = seed
        self._vocabulary = vocabulary
        self._roots: dict[int, Float32Array] = {}
        self._last: dict[int, Float32Array] = {}
        self._run: dict[int, int] = {}
        """Consecutive forks on each member's chain."""
        self._rounds = 0
        """Consecutive rounds in which an episode was begun."""
        self._news: set[int] = set()
        """Children that have not yet acted on their own."""

    def probed(self, entropies: Sequence[Float32Array]) -> None:
        values = [self._statistic(tokens) for tokens in entropies]
        later = values if self._options.monitor_root else values[1:]
        difference = values[0] - float(np.mean(later)) if later else 0.0
        self.initial = self._options.fresh(self.size, difference)

    def decide(self, member: int, turn: int, entropies: Float32Array, room: int) -> Decision | None:
        options = self._options
        probe = entropies if options.lookahead else self._last.get(member)
        self._last[member] = entropies
        if turn == 0:
            self._roots[member] = entropies
        if options.root == "slot":
            options.slot_roots.setdefault(f"{self._place}/{member}", self._statistic(entropies))
        if member in self._news:
            self._news.discard(member)
            return None
        if turn == 0 or room < 1 or probe is None:
            return None
        delta = self._rise(member, probe)
        consecutive = self._rounds if options.penalty_scope == "group" else self._run.get(member, 0)
        chance = options.probability(delta, consecutive)
        forks = self._draw(member, turn, chance, min(options.branches, room))
        self._run[member] = self._run.get(member, 0) + 1 if forks else 0
        return Decision(delta, chance, forks)

    def forked(self, parent: int, child: int) -> None:
        self._news.add(child)
        self._run[child] = self._run.get(parent, 0)
        if parent in self._roots:
            self._roots[child] = self._roots[parent]

    def end_round(self, begun: int) -> None:
        self._rounds = self._rounds + 1 if begun else 0

    def top_up(self, missing: int) -> int:
        return missing if self._options.top_up == "together" else 1

    def _statistic(self, entropies: Float32Array) -> float:
        first = entropies[: self._options.probe_tokens].astype(np.float64)
        return float(first.sum()) / self._options.divisor(len(first), self._vocabulary)

    def _rise(self, member: int, probe: Float32Array) -> float:
        options = self._options
        if options.root == "slot":
            return self._statistic(probe) - options.slot_roots[f"{self._place}/{member}"]
        root = self._roots[member]
        if not options.align:
            return self._statistic(probe) - self._statistic(root)
        count = min(options.probe_tokens, len(probe), len(root))
        difference = float((probe[:count].astype(np.float64) - root[:count]).sum())
        return difference / options.divisor(count, self._vocabulary)

    def _draw(self, member: int, turn: int, chance: float, tries: int) -> int:
        options = self._options
        if options.rule == "threshold":
            return tries if chance > options.tau else 0
        uniforms = np.random.default_rng([self._seed, _DRAWS, member, turn]).random(tries)
        if options.separate_draws:
            return int((uniforms < chance).sum())
        return tries if uniforms[0] < chance else 0

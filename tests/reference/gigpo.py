"""GiGPO (2505.10978): whole episodes compared, and turns that began with the same observation."""

from __future__ import annotations

from difflib import SequenceMatcher

from . import grpo
from .statistics import compared
from .trajectories import PerToken, Trajectory, members


def step_return(trajectory: Trajectory, turn: int, gamma: float) -> float:
    """``R_t = Σ_{k≥t} γ^{k-t} r_k`` over the turns of the trajectory."""
    return sum(gamma ** (k - turn) * trajectory.rewards[k] for k in range(turn, len(trajectory.rewards)))


def step_advantages(
    trajectories: list[Trajectory], *, gamma: float = 0.95, std: bool = True, names: dict[str, str] | None = None
) -> PerToken:
    """``A^S``: a turn's return compared with those of all turns of its task that began with the same observation;
    0 for a turn that nobody shares. ``names`` says which observations count as one."""
    result = {}
    for trajectory in trajectories:
        for turn in trajectory.turns:
            here = trajectory.anchors[turn.index]
            sample = []
            for other in members(trajectories, trajectory.group):
                for candidate in other.turns:
                    there = other.anchors[candidate.index]
                    if (names or {}).get(here, here) == (names or {}).get(there, there):
                        sample.append(step_return(other, candidate.index, gamma))
            value = step_return(trajectory, turn.index, gamma)
            alone = len(sample) == 1
            for token in turn.tokens:
                result[token.place] = 0.0 if alone else compared(value, sample, std=std)
    return result


def advantages(
    trajectories: list[Trajectory],
    *,
    weight: float = 1.0,
    gamma: float = 0.95,
    std: bool = True,
    per_turn: bool = False,
    names: dict[str, str] | None = None,
) -> PerToken:
    """``A = A^E + ω A^S``."""
    episode = grpo.advantages(trajectories, std=std, per_turn=per_turn)
    step = step_advantages(trajectories, gamma=gamma, std=std, names=names)
    return {place: episode[place] + weight * step[place] for place in episode}


def clusters(observations: list[str], threshold: float) -> dict[str, str]:
    """Each observation's representative: the first of those so far that is at least so similar, else itself."""
    representatives: list[str] = []
    names = {}
    for observation in observations:
        for representative in representatives:
            if SequenceMatcher(None, representative, observation).ratio() >= threshold:
                names[observation] = representative
                break
        else:
            representatives.append(observation)
            names[observation] = observation
    return names

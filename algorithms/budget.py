"""What rollouts have cost, and where they forked.

- ``rollout_metrics``: both, per step of training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..agents.tree import Tree


def rollout_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """Metrics of all that was played for a step.

    - ``env/steps``: commands given to environments; those before a fork count once, and those of probes count.
    - ``env/steps_per_episode``: the same for each finished trajectory.
    - ``branch/…``, where episodes could fork: fresh episodes and forks in a group, decisions for each episode, and the
      mean rise of entropy at forks and where none was made. Rises are 0 where there was no such decision.
    """
    episodes = [trajectory for tree in trees for trajectory in tree.trajectories]
    steps = sum(tree.env_steps for tree in trees)
    metrics = {"env/steps": float(steps), "env/steps_per_episode": steps / len(episodes)}
    if not any("initial" in tree.info for tree in trees):
        return metrics
    decisions = [entry for episode in episodes for entry in episode.info.get("branching", ())]
    rises = {kind: [d["delta_entropy"] for d in decisions if (d["forks"] > 0) == kind] for kind in (True, False)}
    probes = [tree.info["probe"]["env_steps"] for tree in trees if "probe" in tree.info]
    return metrics | {
        "branch/initial": float(np.mean([tree.info["initial"] for tree in trees])),
        "branch/forks": sum("fork" in episode.info for episode in episodes) / len(trees),
        "branch/decisions": len(decisions) / len(episodes),
        "branch/rise_at_forks": float(np.mean(rises[True])) if rises[True] else 0.0,
        "branch/rise_elsewhere": float(np.mean(rises[False])) if rises[False] else 0.0,
        "branch/probe_steps": float(sum(probes)),
    }

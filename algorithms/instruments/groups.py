"""How different the episodes of one task are: what a group can still be compared by.

- ``group_metrics``: distinct trajectories, entropies over outcomes, answers, sequences and visited states.
- ``canonical``: an action without its thought and layout. ``actions_of``: those of a trajectory.
- ``shannon``: entropy of the frequencies of anything.

The entropy of tokens may rise while that of answers falls, and the reverse; so both are kept (the second is a semantic
entropy whose clusters are exact: equal actions, or equal states).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

from ...agents.tree import Node, Trajectory, Tree

_ACTION = re.compile(r"<action>(.*?)(?:</action>|\Z)", re.DOTALL)
_TOOL = re.compile(r"<([A-Za-z_][\w.-]*)>.*?(?:</\1>|\Z)", re.DOTALL)


def canonical(text: str) -> str:
    """What an action does, in one spelling: without thoughts, tags of the action and words around a tool's, with single
    blanks, in lower case.

    >>> canonical("<think>the key?</think> <action>Take  key</action>")
    'take key'
    >>> canonical("Who wrote it? <search>The Orchard</search>")
    '<search>the orchard</search>'
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    if found := _ACTION.findall(text):
        text = found[-1]
    elif tools := [tool.group() for tool in _TOOL.finditer(text)]:
        text = " ".join(tools)
    return " ".join(text.split()).lower()


def actions_of(tree: Tree, trajectory: Trajectory) -> list[Node]:
    """The trajectory's actions in the order of turns, whether it has one leaf or one a turn."""
    found: dict[int, Node] = {}
    for leaf in trajectory.leaves:
        for node in tree.path(leaf):
            if node.role == "action":
                found.setdefault(node.turn, node)
    return [found[turn] for turn in sorted(found)]


def shannon(items: Iterable[Hashable]) -> float:
    """Entropy in nats of the frequencies of ``items``; 0 for none."""
    counts = Counter(items).values()
    total = sum(counts)
    # Of equal items the sum is -0.0.
    return abs(-math.fsum(count / total * math.log(count / total) for count in counts)) if total else 0.0


def group_metrics(trees: Sequence[Tree]) -> dict[str, float]:
    """Means over the trees of a step; episodes whose world failed do not count, nor trees without another.

    - ``group/unique``: distinct canonical action sequences, as a share of the trajectories.
    - ``group/sequence_entropy``: Shannon entropy over those sequences; ``group/answer_entropy``: over the last actions;
      ``group/outcome_entropy``: over (won, score); ``group/state_entropy``: over the sets of observations that were
      seen. In nats; log of the group's size at most.
    - ``group/solved``, ``group/mastered``: groups with at least one trajectory won, and with all.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    groups = 0
    for tree in trees:
        played = [trajectory for trajectory in tree.trajectories if not trajectory.failed]
        if not played:
            continue
        groups += 1
        spelled: dict[int, str] = {}
        sequences: list[tuple[str, ...]] = []
        states: list[frozenset[str]] = []
        for trajectory in played:
            nodes = actions_of(tree, trajectory)
            for node in nodes:
                if node.index not in spelled:
                    spelled[node.index] = canonical(node.text)
            sequences.append(tuple(spelled[node.index] for node in nodes))
            states.append(frozenset(tree.nodes[node.parent].text for node in nodes if node.parent >= 0))
        sums["unique"] += len({*sequences}) / len(played)
        sums["sequence_entropy"] += shannon(sequences)
        sums["answer_entropy"] += shannon(sequence[-1:] for sequence in sequences)
        sums["outcome_entropy"] += shannon((trajectory.won, round(trajectory.score, 6)) for trajectory in played)
        sums["state_entropy"] += shannon(states)
        sums["solved"] += any(trajectory.won for trajectory in played)
        sums["mastered"] += all(trajectory.won for trajectory in played)
    return {f"group/{name}": total / groups for name, total in sums.items()} if groups else {}

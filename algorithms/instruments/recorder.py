"""The instruments of one run, as the trainer calls them.

- ``Recorder``: adds metrics to a step's row, raises alarms, stores credit, and watches updates where it is asked to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...agents.formats import PlainFormat
from ...agents.tree import Tree
from .alarms import alarm_metrics, alarms
from .credit import credit_of, credit_path, save_credit
from .entropies import entropy_metrics, token_table
from .groups import group_metrics
from .kinds import TokenKinds, kind_metrics
from .law import law_metrics
from .oracle import correlation_metrics, observed_update

if TYPE_CHECKING:
    from ..assembly import Agent
    from ..batch import Minibatch
    from ..display import Display
    from ..learner import Learner
    from ..runs import RunFolder

_KEPT = ("phase", "step", "success/", "entropy/action_mean", "entropy/fork_", "oracle/")
"""What metrics of later steps look at in earlier rows."""


class Recorder:
    """Remembers nothing but the run's own training rows, so a resumed run repeats what an undisturbed one records."""

    def __init__(self, run: RunFolder, display: Display, agent: Agent) -> None:
        """The run may yet be cut back to its checkpoint: its rows are read when they are first needed."""
        self._run, self._display, self._config = run, display, run.config
        # A message of the plain format is an action and nothing else.
        self._kinds = None if isinstance(agent.format, PlainFormat) else TokenKinds(agent.tokenizer)
        self._rows: list[dict[str, Any]] | None = None

    def update(self, learner: Learner, batch: Minibatch, generator: np.random.Generator) -> dict[str, float]:
        """``learner.update``, with metrics ``oracle/…`` where ``train.oracle`` is on."""
        if not self._config.train.oracle:
            return learner.update(batch, generator)
        temperature = self._config.agent.temperature
        return observed_update(learner, batch, lambda: learner.update(batch, generator), temperature)

    def save_credit(self, step: int, trees: Sequence[Tree], batch: Minibatch, learner: Learner) -> None:
        """Store what the learner's last update made of ``batch``, beside the trees that it was made of."""
        assert learner.plan is not None
        save_credit(credit_path(self._run.path, step), credit_of(trees, batch, learner.plan))

    def step_metrics(self, step: int, row: Mapping[str, Any], trees: Sequence[Tree]) -> dict[str, Any]:
        """What the instruments add to the ``row`` of ``step``; ``trees`` are all that were played for it. Alarms are
        shown when they are raised."""
        earlier = self._history()
        exact = not row.get("entropy/top_k")
        # Steps without a token have no threshold, nor have those of versions that knew none.
        first = next((known for known in earlier if "entropy/fork_threshold" in known), None)
        metrics: dict[str, Any] = entropy_metrics(token_table(trees), first, exact=exact)
        metrics |= group_metrics(trees)
        if self._kinds is not None:
            metrics |= kind_metrics(trees, self._kinds)
        earlier.append(_kept({"phase": "train", "step": step, **row, **metrics}))
        states, raised = alarm_metrics(earlier)
        for alarm in raised:
            self._display.alarm(f"step {alarm.step}: {alarm.text}")
        return metrics | law_metrics(earlier) | correlation_metrics(earlier) | states

    def _history(self) -> list[dict[str, Any]]:
        if self._rows is None:
            self._rows = [_kept(row) for row in self._run.rows() if row["phase"] == "train"]
            for alarm in alarms(self._rows):
                self._display.alarm(f"step {alarm.step}: {alarm.text}")
        return self._rows


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.startswith(_KEPT)}

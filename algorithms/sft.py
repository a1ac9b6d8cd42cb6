"""The supervised warm start: the expert plays, the model learns its actions.

- ``collect_demonstrations``: expert episodes as trees, with the same tokens and masks as rollouts.
- ``WarmStart``: the updates over them, resumable at any update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..agents.messages import Format
from ..agents.policies import ExpertPolicy
from ..agents.rollout import Progress, RolloutTask
from ..agents.tree import Tree
from ..config import RunConfig
from ..errors import UsageError
from .assembly import Agent, demonstrations_of, make_pool, play_tasks, seed_from, select_tasks, update_workers
from .batch import Minibatch
from .learner import Learner, LearnerConfig

SLOTS = 64
"""Expert episodes played side by side."""
POOL = 32
"""Updates whose episodes are sorted by length together."""


def collect_demonstrations(
    config: RunConfig,
    format: Format,
    tasks: Sequence[str],
    *,
    progress: Callable[[Progress], None] | None = None,
) -> list[Tree]:
    """Let the expert play ``config.sft.tasks`` tasks, evenly spaced over those of ``tasks`` that it has ready.

    In the shares ``noise`` and ``slips`` of the turns it errs, which is not imitated, so that the model sees how the
    expert goes on after a mistake.
    """
    ready = demonstrations_of(config.env, config.env.train_split, tasks)
    chosen = [
        RolloutTask(task, config.sft.episodes_per_task, seed_from(config.seed, 1, index))
        for index, task in enumerate(select_tasks(ready, config.sft.tasks))
    ]
    slots = min(SLOTS, len(chosen) * config.sft.episodes_per_task)
    with make_pool(config.env, config.env.train_split, slots, **config.sft.expert, expert_info=True) as pool:
        room = max(32, config.agent.max_action_tokens)
        expert = ExpertPolicy(format, noise=config.sft.noise, slips=config.sft.slips, max_action_tokens=room)
        return play_tasks(config, expert, pool, format, chosen, config.env.train_split, progress)


class WarmStart:
    """Epochs of masked maximum likelihood over demonstrations, in an order that the seed alone decides.

    Each epoch shuffles the episodes, and the episodes of an update are of similar length: in every run of
    ``POOL`` updates' worth they are sorted before they are dealt out, so that little of a batch is padding.
    """

    def __init__(self, agent: Agent, config: RunConfig, trees: Sequence[Tree], device: torch.device) -> None:
        batch = Minibatch.from_trees(trees)
        # A row may hold nothing but mistakes: in window context each turn is one.
        taught = batch.mask.any(1).nonzero()[:, 0]
        if not len(taught):
            raise UsageError("there is nothing to imitate: the expert's play holds no action of its own")
        self._batch = batch.select(taught)
        self._config = config
        rows = len(self._batch)
        self._per_epoch = math.ceil(rows / config.sft.batch_episodes)
        self.total = self._per_epoch * config.sft.epochs
        self.done = 0
        self._dealt: tuple[int, list[Tensor]] | None = None
        """An epoch and its updates' rows."""
        self._learner = Learner(
            agent.model,
            None,
            LearnerConfig(
                lr=config.sft.lr,
                schedule="cosine",
                warmup_steps=round(config.sft.warmup * self.total),
                total_steps=self.total,
                clip_norm=config.train.clip_norm,
                weight_decay=config.train.weight_decay,
                micro_batch_tokens=config.train.micro_batch_tokens,
                precision=config.train.precision,
                unique_tokens=config.train.unique_tokens,
                workers=update_workers(config, agent.model, device),
            ),
            device,
        )

    def update(self) -> dict[str, float]:
        """One optimiser step. Call it while ``done < total``."""
        epoch, position = divmod(self.done, self._per_epoch)
        if self._dealt is None or self._dealt[0] != epoch:
            self._dealt = epoch, self._deal(np.random.default_rng([self._config.seed, 2, epoch]))
        metrics = self._learner.sft_update(self._batch.select(self._dealt[1][position]))
        self.done += 1
        return metrics

    def close(self) -> None:
        """End the learner's threads."""
        self._learner.close()

    def _deal(self, generator: np.random.Generator) -> list[Tensor]:
        """Return the rows of each update of an epoch."""
        size, extent = self._config.sft.batch_episodes, self._batch.extent.numpy()
        order = generator.permutation(len(self._batch))
        batches: list[Tensor] = []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(extent[pool], kind="stable")]
            batches += [torch.from_numpy(pool[at : at + size]) for at in range(0, len(pool), size)]
        return [batches[index] for index in generator.permutation(len(batches))]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "learner": self._learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self._learner.load_state_dict(state["learner"])

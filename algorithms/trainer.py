"""The training loop: warm start, rollouts, updates, evaluations, checkpoints.

- ``Trainer``: runs or continues a run folder to its end.

Every random choice of step k comes from a seed made of (run seed, purpose, k), so the state of all generators is
the step's number, and a run that was killed and resumed repeats what an undisturbed one does.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from ..agents.models import place
from ..agents.rollout import Progress, RolloutTask
from ..agents.tree import Tree
from ..envs.pool import EnvPool
from ..errors import UsageError
from .assembly import (
    engine_policy,
    engine_workers,
    load_agent,
    make_engine,
    make_pool,
    new_agent,
    open_world,
    play_tasks,
    prepare_device,
    seed_from,
    select_tasks,
    tasks_of,
    update_workers,
)
from .batch import Minibatch
from .budget import rollout_metrics
from .checkpoint import latest_checkpoint, load_state, save_checkpoint
from .display import Display
from .evaluate import evaluate, panel_of, summarise
from .instruments.recorder import Recorder
from .learner import Learner, LearnerConfig
from .recipes import recipe
from .runs import TIME_PREFIX, RunFolder
from .sft import WarmStart, collect_demonstrations
from .slots import use
from .slots.weight import RolloutCorrection
from .stats import Proportion, Summary

SFT_CHECKPOINT_EVERY = 25
"""Updates of the warm start between checkpoints."""

MISMATCH_ALARM = 0.1
"""Mean difference of the engine's log-probabilities from the learner's, in nats a token, that is worth a word: bf16
against fp32 makes 0.02 to 0.07."""


class Trainer:
    """All parts of one run, and where it stands: its newest checkpoint, if it has one.

    Raises:
        UsageError: a part of the configuration cannot be had; nothing has been written by then.
    """

    def __init__(self, run: RunFolder, display: Display) -> None:
        self.run, self.display, self.config = run, display, run.config
        config = self.config
        self.device = prepare_device(config)
        self.tasks = select_tasks(tasks_of(config.env, config.env.train_split), config.env.train_tasks)
        splits = dict.fromkeys((config.env.eval_split, *config.eval.also))
        self.panels = {split: panel_of(config, split) for split in splits}
        overrides = {"total_steps": max(1, config.train.steps)} | config.algorithm.overrides
        self.recipe = recipe(config.algorithm.name, preset=config.algorithm.preset, **overrides)
        self._check_groups()
        self._check_forks()

        self._reference_model: PreTrainedModel | None = None
        self._minded = False
        self.step = -1  # -1: before or in the warm start; k: step k is done.
        self.warm_state: dict[str, Any] | None = None
        state: dict[str, Any] | None = None
        checkpoint = latest_checkpoint(run.checkpoints)
        self.rows = self.drawn = 0
        if checkpoint is None:
            self.agent = new_agent(config, self.device)
        else:
            self.agent = load_agent(config, checkpoint, self.device)
            state = load_state(checkpoint)
            self.step, self.rows, self.warm_state = state["step"], state["rows"], state["warm_start"]
            self.drawn = state.get("drawn", max(0, self.step) * config.train.tasks_per_step)
        self.learner, self.recorder = self._make_learner(), Recorder(run, display, self.agent)
        if state is not None and self.step >= 0:
            self.learner.load_state_dict(state["learner"])
            self.recipe.load_state_dict(state["recipe"])
        self.engine = make_engine(self.agent, config.engine, engine_workers(config, self.agent.model, self.device))
        if not getattr(self.engine, "trainable", True):
            self.engine.close()
            raise UsageError(
                "this server answers with text, which is for evaluation only; training needs one that takes token ids"
            )
        if not getattr(self.engine, "takes_weights", True):
            self.engine.close()
            raise UsageError(
                "this server takes no weights, so it would go on sampling from the old ones; training needs one of "
                "`agentropy serve model`, or the engine 'torch' or 'vllm'"
            )
        self._correct()

    def describe(self) -> str:
        """One line: what is trained on what."""
        config = self.config
        size = sum(parameter.numel() for parameter in self.agent.model.parameters()) / 1e6
        where = f" from step {self.step}" if self.step >= 0 else ""
        return (
            f"{config.algorithm.name} on {config.env.id}: {len(self.tasks)} training tasks, "
            f"{', '.join(f'{len(panel)} held-out tasks ({split})' for split, panel in self.panels.items())}, "
            f"{self.agent.model.config.model_type} of {size:.1f} M parameters, seed {config.seed}{where}"
        )

    def train(self) -> Summary:
        """Do what is left of the run; call it once."""
        # Collections need not look at modules and packages every time: that was a tenth of a small model's rollouts.
        gc.collect()
        gc.freeze()
        try:
            return self._train()
        finally:
            gc.unfreeze()
            self.engine.close()
            self.learner.close()

    def _train(self) -> Summary:
        config, steps = self.config, self.config.train.steps
        self.run.make()
        self.run.rewind(self.rows)
        if self.step < 0:
            if config.sft.tasks:
                self._warm_start()
                self.learner = self._make_learner()  # a critic begins as a copy of the policy
            self.step = 0
            if config.eval.before or not steps:
                self._evaluate()
            self._checkpoint()
        else:
            self._show_history()
        if self.step < steps:
            slots = config.train.tasks_per_step * config.train.group_size
            with make_pool(config.env, config.env.train_split, slots, **(config.env.train_kwargs or {})) as pool:
                durations: list[float] = []
                while self.step < steps:
                    started = time.perf_counter()
                    self.step += 1
                    left = float(np.median(durations)) * (steps - self.step) if durations else None
                    self._train_step(pool, left)
                    if self.step == steps or (config.eval.every and self.step % config.eval.every == 0):
                        self._evaluate()
                    if self.step == steps or self.step % config.train.checkpoint_every == 0:
                        self._checkpoint()
                    durations.append(time.perf_counter() - started)
        return Summary.of([row for row in self.run.rows() if row["phase"] == "eval"])

    def _train_step(self, pool: EnvPool, seconds_left: float | None) -> None:
        """Rollouts of this step's tasks under the current weights, then the update."""
        config, step = self.config, self.step
        self.display.status(f"step {step}/{config.train.steps}", "rollouts")
        started = time.perf_counter()
        # New version: nothing computed by older weights is reused, and a resumed run starts as empty as this one.
        self.engine.load_weights(None, version=step)
        before = (
            self.engine.stats.decode_tokens,
            self.engine.stats.prefill_tokens,
            self.engine.stats.cached_tokens,
        )
        played, trees, kept = self._rollouts(pool)
        rollout_seconds = time.perf_counter() - started
        summary = summarise(played, config.env.train_split)
        self.display.status(f"step {step}/{config.train.steps}", f"update; rollouts took {rollout_seconds:.1f} s")

        started = time.perf_counter()
        generator = np.random.default_rng([config.seed, 4, step])
        batch = Minibatch.from_trees(trees)
        if not self._exact:
            if not batch.old_logprobs[batch.mask].isfinite().all():
                raise UsageError(
                    "the engine does not tell the log-probabilities of what it sampled at this temperature; start "
                    "vLLM's server with --logprobs-mode processed_logprobs, or sample with agent.temperature=1"
                )
            logprobs, entropy = self.learner.score(batch)
            batch = batch.replace(rollout_logprobs=batch.old_logprobs, old_logprobs=logprobs, old_entropy=entropy)
        elif self._entropy_top_k:
            batch = batch.replace(old_entropy=self.learner.score(batch)[1])
        if self.recipe.needs_reference:
            batch = batch.replace(ref_logprobs=self.learner.score(batch, self._reference())[0])
        metrics = self.recorder.update(self.learner, batch, generator)
        self.recipe.on_step_end(metrics)
        self._mind(metrics.get("mismatch/abs_mean", 0.0))
        update_seconds = time.perf_counter() - started
        if config.train.save_trajectories:
            self.run.save_trees(step, trees)
            self.recorder.save_credit(step, trees, batch, self.learner)

        stats = self.engine.stats
        decoded = stats.decode_tokens - before[0]
        low, high = summary.success.interval
        top_k = self._entropy_top_k or self._own_top_k
        row = {
            "success/rate": summary.success.rate,
            "success/low": low,
            "success/high": high,
            "episodes": summary.success.trials,
            "turns": summary.turns,
            "reward": float(np.mean([episode.reward for tree in played for episode in tree.trajectories])),
            "env/failed": summary.failed,
            **rollout_metrics(played),
            "sampler/kept": kept / len(played),
            **{("entropy/update" if k == "entropy/action_mean" else k): v for k, v in _split_times(metrics).items()},
            "entropy/action_mean": metrics["entropy/old_mean"] if top_k else summary.entropy,
            **({"entropy/estimate": summary.entropy} if top_k else {}),
            "entropy/top_k": top_k,
            "tokens/sampled": decoded,
            "tokens/prefilled": stats.prefill_tokens - before[1],
            "tokens/cached": stats.cached_tokens - before[2],
            TIME_PREFIX + "rollout_seconds": rollout_seconds,
            TIME_PREFIX + "update_seconds": update_seconds,
            TIME_PREFIX + "tokens_per_second": decoded / rollout_seconds,
        }
        self._log("train", row | self.recorder.step_metrics(step, row, played))
        self.display.row(
            f"{step}",
            summary.success,
            summary.turns,
            summary.entropy,
            decoded / rollout_seconds,
            seconds_left,
        )

    def _rollouts(self, pool: EnvPool) -> tuple[list[Tree], list[Tree], int]:
        """All trees that were played for this step, the ``tasks_per_step`` of them to learn from, and how many of all
        the recipe would keep.

        Where the recipe keeps only some groups, more tasks are played until there are enough of them; what is still
        missing after the last round is filled up with groups that were not kept.
        """
        config, wanted = self.config, self.config.train.tasks_per_step
        policy = engine_policy(self.agent, self.engine, config, config.agent.temperature, self._entropy_top_k)
        played: list[Tree] = []
        kept: list[int] = []
        for _ in range(self.recipe.max_batches):
            tasks, first = self._rollout_tasks(len(played)), len(played)
            played += play_tasks(
                config,
                policy,
                pool,
                self.agent.format,
                tasks,
                config.env.train_split,
                branching=self.recipe.branching,
            )
            kept += [first + place for place in self._kept(played[first:])]
            if len(kept) >= wanted:
                break
            self.display.status(
                f"step {self.step}/{config.train.steps}", f"{len(kept)} of {wanted} groups to learn from"
            )
        rest = sorted(set(range(len(played))) - set(kept))
        chosen = sorted(kept[:wanted] + rest[: max(0, wanted - len(kept))])
        return played, [played[place] for place in chosen], len(kept)

    def _kept(self, trees: Sequence[Tree]) -> list[int]:
        """The places of trees that the recipe wants to learn from."""
        if all(sampler.branching is not None for sampler in self.recipe.slots.samplers):
            return list(range(len(trees)))
        try:
            batch = Minibatch.from_trees(trees)
        except UsageError:  # every episode failed
            return []
        return sorted(set(batch.group[self.recipe.kept(batch)].tolist()))

    @property
    def _entropy_top_k(self) -> int:
        """0 where entropies of rollouts are exact."""
        branching = self.recipe.branching
        return (branching.entropy_top_k if branching is not None else 0) or self.config.agent.entropy_top_k

    @property
    def _own_top_k(self) -> int:
        """Other than 0 for an engine that estimates entropies also where exact ones are asked for."""
        return getattr(self.engine, "entropy_top_k", 0)

    def _check_groups(self) -> None:
        """What compares the members of a group would learn nothing from groups of one."""
        parts = [self.recipe.slots.baseline, *self.recipe.slots.samplers]
        names = {getattr(part, "name", "") for part in parts} & {"leave_one_out", "group_filter"}
        if self.config.train.group_size < 2 and names:
            raise UsageError(
                f"train.group_size is 1; '{self.recipe.name}' compares the episodes of a group ({min(names)}) "
                "and needs at least 2"
            )

    def _check_forks(self) -> None:
        """A world that cannot be forked is found out before anything is spent."""
        if self.recipe.branching is None:
            return
        world = open_world(self.config.env, self.config.env.train_split)
        able = world.has_wrapper_attr("snapshot") and world.has_wrapper_attr("restore")
        world.close()
        if not able:
            raise UsageError(
                f"'{self.config.env.id}' cannot be forked: it has no snapshot() and restore(), which "
                f"'{self.recipe.name}' needs"
            )

    def _mind(self, gap: float) -> None:
        """Say once when the engine samples from another distribution than the learner believes."""
        if gap > MISMATCH_ALARM and not self._minded:
            self._minded = True
            self.display.say(
                f"the engine's log-probabilities differ from the learner's by {gap:.2f} nats a token; look at the "
                "metrics mismatch/…, the engine's dtype, and whether its sampling filters tokens"
            )

    @property
    def _exact(self) -> bool:
        """Whether the engine says of a token what the learner would, so that nobody need compute it again."""
        return self.engine.exact and self.config.train.precision == "float32"

    def _correct(self) -> None:
        """Weigh tokens by importance where the engine's probabilities are not the learner's, if the recipe does not."""
        options, slots = self.config.engine, self.recipe.slots
        mode = options.correction
        if mode == "auto":
            mode = "none" if self._exact else "truncate"
        if mode == "none" or any(isinstance(weight, RolloutCorrection) for weight in slots.weights):
            return
        self.recipe.slots = slots.extend(weights=(use("weight", "rollout_correction", mode=mode, cap=options.cap),))

    def _reference(self) -> PreTrainedModel:
        """The policy as reinforcement learning found it; kept in the run folder for resumed runs."""
        if self._reference_model is None:
            folder = self.run.path / "reference"
            if not folder.exists():
                assert self.step == 1, "the reference is the policy before the first update"
                temporary = folder.with_name(".reference.tmp")
                self.agent.model.save_pretrained(temporary)
                temporary.rename(folder)
            model = type(self.agent.model).from_pretrained(folder, dtype=self.agent.model.dtype)
            self._reference_model = place(model, self.device).requires_grad_(False)
        return self._reference_model

    def _warm_start(self) -> None:
        config, display = self.config, self.display
        display.status("expert play")

        def progress(count: Progress) -> None:
            display.status("expert play", f"{count.episodes}/{count.total} episodes")

        started = time.perf_counter()
        trees = collect_demonstrations(config, self.agent.format, self.tasks, progress=progress)
        warm = WarmStart(self.agent, config, trees, self.device)
        if self.warm_state is not None:
            warm.load_state_dict(self.warm_state)
        else:
            shown = summarise(trees, config.env.train_split)
            seconds = time.perf_counter() - started
            display.say(f"expert: success {shown.success} in {seconds:.0f} s")
        with closing(warm):
            while warm.done < warm.total:
                metrics = warm.update()
                self._log("sft", _split_times(metrics), step=warm.done)
                display.status("warm start", f"update {warm.done}/{warm.total}, loss {metrics['loss']:.3f}")
                if warm.done % SFT_CHECKPOINT_EVERY == 0 and warm.done < warm.total:
                    self._checkpoint(warm)

    def _evaluate(self) -> None:
        """Play the panel of every split. Rows of the first have the phase ``eval``, the others' ``eval/<split>``."""
        config, display = self.config, self.display
        self.engine.load_weights(None, version=self.step)
        policy = engine_policy(self.agent, self.engine, config, config.eval.temperature)
        samples = config.eval.samples if self.step == config.train.steps else 1
        for split, panel in self.panels.items():
            main = split == config.env.eval_split
            label = f"evaluating after step {self.step}" + ("" if main else f" on {split}")
            display.status(label)
            started, decoded = time.perf_counter(), self.engine.stats.decode_tokens
            result = evaluate(
                policy,
                self.agent.format,
                config,
                split,
                panel,
                samples=samples,
                progress=partial(_count, display, label),
            )
            seconds = time.perf_counter() - started
            rate = (self.engine.stats.decode_tokens - decoded) / seconds
            row = {"entropy/top_k": config.agent.entropy_top_k or self._own_top_k, TIME_PREFIX + "seconds": seconds}
            self.run.save_outcomes(self.step, split, {"temperature": config.eval.temperature, **result.outcomes})
            self._log("eval" if main else f"eval/{split}", result.metrics() | row)
            label = f"eval {self.step}" if main else split
            display.row(label, result.success, result.turns, result.entropy, rate, None)

    def _rollout_tasks(self, first: int) -> list[RolloutTask]:
        """The next tasks of an endless sequence of shuffled passes over the training tasks; this step has had
        ``first``."""
        config, count = self.config, len(self.tasks)
        chosen = []
        for index in range(first, first + config.train.tasks_per_step):
            epoch, position = divmod(self.drawn, count)
            self.drawn += 1
            order = np.random.default_rng([config.seed, 3, epoch]).permutation(count)
            seed = seed_from(config.seed, 5, self.step, index)
            chosen.append(RolloutTask(self.tasks[order[position]], config.train.group_size, seed))
        return chosen

    def _make_learner(self) -> Learner:
        options = self.config.train
        return Learner(
            self.agent.model,
            self.recipe,
            LearnerConfig(
                lr=options.lr,
                critic_lr=options.critic_lr,
                schedule=options.schedule,
                warmup_steps=options.warmup_steps,
                total_steps=options.steps * options.epochs * options.minibatches,
                weight_decay=options.weight_decay,
                clip_norm=options.clip_norm,
                epochs=options.epochs,
                minibatches=options.minibatches,
                micro_batch_tokens=options.micro_batch_tokens,
                temperature=self.config.agent.temperature,
                precision=options.precision,
                unique_tokens=options.unique_tokens,
                shuffle=self._shuffle,
                workers=update_workers(self.config, self.agent.model, self.device),
            ),
            self.device,
        )

    @property
    def _shuffle(self) -> Literal["rows", "groups"]:
        if self.config.train.shuffle != "auto":
            return self.config.train.shuffle
        return "rows" if self.recipe.branching is None else "groups"

    def _log(self, phase: str, metrics: dict[str, Any], *, step: int | None = None) -> None:
        self.run.log(phase, self.step if step is None else step, metrics)
        self.rows += 1

    def _checkpoint(self, warm: WarmStart | None = None) -> None:
        name = f"sft-{warm.done:06d}" if warm is not None else f"step-{self.step:06d}"
        state = {
            "step": -1 if warm is not None else self.step,
            "rows": self.rows,
            "drawn": self.drawn,
            "warm_start": warm.state_dict() if warm is not None else None,
            "learner": self.learner.state_dict(),
            "recipe": self.recipe.state_dict(),
        }
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.run.checkpoints, name, self.agent.model, self.agent.tokenizer, state, keep=keep)

    def _show_history(self) -> None:
        """After a resume, the table starts with the rows that the run already has."""
        for row in self.run.rows():
            if row["phase"] not in ("train", "eval"):
                continue
            trials = row.get("episodes") or row["success/tasks"]
            success = Proportion(round(row["success/rate"] * trials), trials)
            label = f"eval {row['step']}" if row["phase"] == "eval" else str(row["step"])
            known = {name: value for name, value in row.items() if value is not None}
            entropy, rate = (
                known.get(name, math.nan) for name in ("entropy/action_mean", TIME_PREFIX + "tokens_per_second")
            )
            self.display.row(label, success, row["turns"], entropy, rate, None)


def _count(display: Display, label: str, count: Progress) -> None:
    display.status(label, f"{count.episodes}/{count.total} episodes, {count.won} won")


def _split_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """Put the figures that depend on the machine's speed under ``time/``."""
    return {
        (TIME_PREFIX + name if name.endswith(("_seconds", "_per_second")) else name): value
        for name, value in metrics.items()
    }

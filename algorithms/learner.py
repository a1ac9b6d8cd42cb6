"""From a batch to new weights.

- ``LearnerConfig``: the optimiser's settings.
- ``Learner``: ``update`` by a recipe, ``sft_update`` by imitation, ``score`` without learning.

Micro-batches only bound memory: the recipe plans once over the whole batch, and the losses of the parts add up
to the batch's. An *optimiser* minibatch, too, keeps the batch's plan, and its loss is scaled by the number of
minibatches. So every token has the same weight wherever the shuffle puts it, and the losses of an epoch average
to the batch's. A denominator per minibatch, as in verl, would give more weight to tokens that share a minibatch
with short episodes.

A recipe with values has its learner own a critic, which learns beside the policy from the same loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.linear import onednn_linear
from .batch import Minibatch
from .crew import Crew
from .critic import Critic
from .forward import token_statistics
from .mismatch import mismatch
from .packing import Part, packable, parts
from .recipe import Plan, Recipe, merge_metrics
from .slots.regulariser import ValueLoss

Generator = torch.Generator | np.random.Generator
Metrics = Mapping[str, Tensor]
Objective = Callable[[Minibatch, Tensor, int, Tensor, Tensor, Tensor | None], tuple[Tensor, Metrics]]
"""``(part, its rows in the minibatch, its width, logprobs, entropy, values) → (loss, metrics)``, both additive."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Steps are optimiser steps: one per minibatch, ``epochs * minibatches`` per update."""

    lr: float = 3e-4
    critic_lr: float | None = None
    """Of the critic, under the same schedule; ``lr`` when absent."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Not applied to norms, biases and embeddings."""
    clip_norm: float = 1.0
    """Largest gradient norm, of the policy and of the critic each; ``inf`` for no clipping."""
    epochs: int = 1
    minibatches: int = 1
    """Optimiser steps per epoch; more than one shuffles the rows."""
    micro_batch_tokens: int = 16384
    """Tokens per forward pass: distinct ones of packed trees, or padded ones."""
    warmup_steps: int = 0
    total_steps: int | None = None
    """Where ``cosine`` and ``linear`` reach ``min_lr_ratio``."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the highest."""
    temperature: float = 1.0
    """Of the rollouts: log-probabilities and entropies are those of the distribution that was sampled."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: autocast; weights and optimiser state keep their own type."""
    unique_tokens: bool = True
    """Compute a prefix that rows share once, where the model's attention can be told of it; gradients are the same to
    rounding."""
    workers: int = 1
    """Threads that share an update, each with passes of its own; see ``Crew``."""
    shuffle: Literal["rows", "groups"] = "rows"
    """What is dealt out to minibatches: single rows, or whole groups, whose members then share their prefixes."""

    def lr_at(self, step: int, highest: float | None = None) -> float:
        """Learning rate of optimiser step ``step``, from 0, on a schedule whose top is ``highest``, or ``lr``."""
        highest = self.lr if highest is None else highest
        if step < self.warmup_steps:
            return highest * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or self.total_steps is None:
            return highest
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        left = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return highest * (self.min_lr_ratio + (1 - self.min_lr_ratio) * left)


class Learner:
    """Owns the optimiser of ``model``, and the critic with its optimiser where the recipe has values. The recipe's
    memory belongs to whoever made it: save it beside this state."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | None = None,
        config: LearnerConfig | None = None,
        device: torch.device | str = "cpu",
        critic: Critic | None = None,
    ) -> None:
        """``critic`` is made from ``model`` when the recipe has values and none is given.

        Raises:
            UsageError: a schedule without its end, or a critic that the recipe has no use for.
        """
        self.config = config or LearnerConfig()
        if self.config.schedule != "constant" and self.config.total_steps is None:
            raise UsageError(f"the schedule '{self.config.schedule}' needs total_steps")
        self.recipe = recipe
        self.device = torch.device(device)
        # Evaluation mode: with dropout the policy that is trained would not be the one that sampled.
        self.model = model.to(self.device).eval()
        self.step = 0
        """Optimiser steps, skipped ones included."""
        self.plan: Plan | None = None
        """What the last update made of its batch."""
        self.skipped = 0
        self._packs: bool | None = None
        """Whether rows are packed; found out when they first are."""
        self._computed = self._read = 0
        """Tokens of the last update: those computed, and those of all its rows."""
        self._workers: Crew | None = None
        self.optimizer = self._adamw(model, self.config.lr)
        self.critic: Critic | None = None
        if recipe is not None and recipe.needs_values:
            self.critic = (Critic(self.model) if critic is None else critic).to(self.device).eval()
            self.critic_optimizer = self._adamw(self.critic, self.config.lr_at(0, self.config.critic_lr))
        elif critic is not None:
            name = "no recipe" if recipe is None else f"recipe '{recipe.name}'"
            raise UsageError(f"{name} has no use for a critic; a recipe with the regulariser 'value' has")

    def update(self, batch: Minibatch, generator: Generator | None = None) -> dict[str, float]:
        """``epochs`` passes over ``batch`` by the recipe; ``generator`` shuffles the rows into minibatches.

        Metrics are means over the optimiser steps (maxima for ``…/max``). The caller still has to tell the
        recipe ``on_step_end``.

        Raises:
            UsageError: there is no recipe, or the batch lacks what it needs.
        """
        if self.recipe is None:
            raise UsageError("this learner has no recipe; it can only imitate")
        recipe, started = self.recipe, time.perf_counter()
        batch = batch.to(self.device)
        if self.critic is not None and batch.values is None:
            batch = batch.replace(values=self.values(batch))
        plan = self.plan = recipe.plan(batch)
        dealt = self._minibatches(batch, generator)
        pieces = max(1, len(dealt) // max(1, self.config.epochs))
        self._computed = self._read = 0
        seen: dict[int, Tensor] = {}
        steps = []
        for number, rows in enumerate(dealt):
            objective = _recipe_objective(recipe, plan.select(rows), pieces)
            if number == 0:  # before the first step, the weights are still those that sampled
                objective = _watched(objective, seen)
            steps.append(self._optimise(batch.select(rows), objective, self.critic))
        known = dict(plan.metrics) | _value_metrics(plan, batch.mask)
        known |= mismatch(*torch.cat([seen[row] for row in sorted(seen)], 1)) if seen else {}
        return _mean_metrics(steps) | known | self._report(batch, started, self.config.epochs)

    def sft_update(self, batch: Minibatch) -> dict[str, float]:
        """One optimiser step on the mean negative log-likelihood of the trained tokens of ``batch``.

        Raises:
            UsageError: there are none.
        """
        started = time.perf_counter()
        batch = batch.to(self.device)
        tokens = batch.mask.sum()
        if not tokens:
            raise UsageError("there is nothing to imitate: no token of the batch is marked as trained")

        def objective(
            part: Minibatch, rows: Tensor, width: int, logprobs: Tensor, entropy: Tensor, values: Tensor | None
        ) -> tuple[Tensor, Metrics]:
            loss = -logprobs.sum() / tokens
            return loss, {"loss": loss.detach(), "entropy/action_mean": entropy.detach().sum() / tokens}

        self._computed = self._read = 0
        return _mean_metrics([self._optimise(batch, objective)]) | self._report(batch, started, 1)

    def gradient(self, batch: Minibatch, objective: Objective) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Metrics of ``objective``, and its gradient by each of the model's parameters; no step is taken."""
        metrics = self._accumulate(batch.to(self.device), objective)
        found = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return metrics, found

    @torch.no_grad()
    def score(self, batch: Minibatch, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[B, L]`` of the trained tokens under ``model``, or the learner's
        own."""
        batch = batch.to(self.device)
        logprobs = torch.zeros(batch.mask.shape, device=self.device)
        entropy = torch.zeros_like(logprobs)
        work = self._parts(batch)
        if model is None:
            found = self._crew().run(lambda part, model, *_: self._forward(model, part), work)
        else:
            found = [self._forward(model, part) for part in work]
        for part, (chances, spread) in zip(work, found, strict=True):
            logprobs[part.rows, : part.width], entropy[part.rows, : part.width] = chances, spread
        return logprobs, entropy

    @torch.no_grad()
    def values(self, batch: Minibatch) -> Tensor:
        """``[B, L]`` float32: the critic's values of the states before the trained tokens, 0 elsewhere.

        Raises:
            UsageError: this learner has no critic.
        """
        if self.critic is None:
            raise UsageError("this learner has no critic; one whose recipe has the regulariser 'value' has")
        batch = batch.to(self.device)
        values = torch.zeros(batch.mask.shape, device=self.device)
        for part in self._parts(batch):
            values[part.rows, : part.width] = self._values(self.critic, part)
        return values

    def close(self) -> None:
        """End the threads that updates were shared with; the next update starts new ones."""
        if self._workers is not None:
            self._workers.close()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and counters, and the critic with its optimiser; neither the model's weights nor the recipe's
        memory."""
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step, "skipped": self.skipped}
        if self.critic is not None:
            state["critic"] = {"model": self.critic.state_dict(), "optimizer": self.critic_optimizer.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            UsageError: the state has a critic and this learner has none, or the reverse.
        """
        if ("critic" in state) != (self.critic is not None):
            saved, here = ("a", "no") if "critic" in state else ("no", "a")
            raise UsageError(f"the saved learner has {saved} critic, and this recipe's learner has {here} critic")
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"]["model"])
            self.critic_optimizer.load_state_dict(dict(state["critic"]["optimizer"]))
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.step, self.skipped = int(state["step"]), int(state["skipped"])

    def _minibatches(self, batch: Minibatch, generator: Generator | None) -> list[Tensor]:
        """The rows of each optimiser step of all epochs: those with a trained token, once per epoch."""
        active = batch.mask.any(1).nonzero()[:, 0].cpu()
        unit = torch.arange(len(batch)) if self.config.shuffle == "rows" else batch.group.cpu()
        names, owner = unit[active].unique(return_inverse=True)
        pieces = min(self.config.minibatches, len(names))
        if pieces > 1 and generator is None:
            raise UsageError("more than one minibatch needs a generator to shuffle the rows with")
        dealt: list[Tensor] = []
        for _ in range(self.config.epochs if pieces else 0):
            if pieces == 1:
                dealt.append(active)
                continue
            if isinstance(generator, np.random.Generator):
                order = torch.from_numpy(generator.permutation(len(names)))
            else:
                order = torch.randperm(len(names), generator=generator)
            if self.config.shuffle == "rows":
                dealt += active[order].tensor_split(pieces)
            else:
                dealt += [active[torch.isin(owner, chosen)] for chosen in order.tensor_split(pieces)]
        return dealt

    def _parts(self, batch: Minibatch) -> list[Part]:
        if self._packs is None:
            self._packs = self.config.unique_tokens and packable(self.model)
        budget, workers = self.config.micro_batch_tokens, self.config.workers
        return list(parts(batch, budget, packed=self._packs, workers=workers))

    def _crew(self) -> Crew:
        """Made when it is first needed: on the last device, with the weights that are trained."""
        if self._workers is None:
            modules = [self.model] if self.critic is None else [self.model, self.critic]
            self._workers = Crew(modules, self.config.workers)
        return self._workers

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """How products are computed."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        with autocast, onednn_linear():
            yield

    def _forward(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        tokens, temperature = part.batch.tokens, self.config.temperature
        assert tokens is not None
        with self._computing():
            return token_statistics(model, tokens, part.batch.mask, temperature=temperature, pack=part.pack)

    def _values(self, critic: Critic, part: Part) -> Tensor:
        assert part.batch.tokens is not None
        with self._computing():
            return critic.values(part.batch.tokens, part.batch.mask, part.pack)

    def _adamw(self, module: nn.Module, lr: float) -> torch.optim.AdamW:
        groups = _decay_groups(module, self.config.weight_decay)
        if not groups:
            raise UsageError(f"all parameters of {type(module).__name__} are frozen; expected one that is trained")
        return torch.optim.AdamW(groups, lr=lr, betas=self.config.betas, fused=True)

    def _optimise(self, batch: Minibatch, objective: Objective, critic: Critic | None = None) -> dict[str, Tensor]:
        """Accumulate the gradients of the parts and take one step, unless loss or gradient is not finite.

        Both are looked at because the clamp of the log-ratio turns the gradient of a NaN into 0. With a critic, one
        backward pass serves it too, and neither it nor the policy takes a step without the other.
        """
        merged = self._accumulate(batch, objective, critic)
        lr = self.config.lr_at(self.step)
        outcome = {"grad_norm": self._clip(self.model, self.optimizer, lr)}
        optimizers = [self.optimizer]
        if critic is not None:
            critic_lr = self.config.lr_at(self.step, self.config.critic_lr)
            outcome["critic/grad_norm"] = self._clip(critic, self.critic_optimizer, critic_lr)
            optimizers.append(self.critic_optimizer)
        finite = all(bool(number.isfinite()) for number in (merged["loss"], *outcome.values()))
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += not finite
        return merged | outcome | {"lr": torch.tensor(lr), "skipped": torch.tensor(float(not finite))}

    def _accumulate(self, batch: Minibatch, objective: Objective, critic: Critic | None = None) -> dict[str, Tensor]:
        """Add up the gradients and the metrics of the parts."""
        work = self._parts(batch)

        def learn(part: Part, model: nn.Module, critic: Critic | None = None) -> Metrics:
            values = None if critic is None else self._values(critic, part)
            loss, metrics = objective(part.batch, part.rows, part.width, *self._forward(model, part), values)
            loss.backward()
            return metrics

        try:
            merged = merge_metrics(self._crew().run(learn, work))
        except BaseException:  # what was added up so far must not join the next step
            for module in (self.model, self.critic):
                if module is not None:
                    module.zero_grad(set_to_none=True)
            raise
        self._computed += sum(part.computed for part in work)
        self._read += sum(int((part.batch.extent - 1).sum()) for part in work)
        return merged

    def _clip(self, module: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> Tensor:
        """Clip the gradient of ``module`` and set the learning rate; the norm before clipping."""
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return norm.detach()

    def _report(self, batch: Minibatch, started: float, epochs: int) -> dict[str, float]:
        seconds = time.perf_counter() - started
        return {
            "tokens": float(batch.mask.sum()),
            "tokens/unique_ratio": self._computed / max(1, self._read),
            "tokens_per_second": float(batch.extent.sum()) * epochs / seconds,
            "update_seconds": seconds,
        }


def _recipe_objective(recipe: Recipe, plan: Plan, scale: int) -> Objective:
    def objective(
        part: Minibatch, rows: Tensor, width: int, logprobs: Tensor, entropy: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        loss, metrics = recipe.loss(part, plan.select(rows, width), logprobs, entropy, values)
        scaled = {name: value if name.endswith("/max") else value * scale for name, value in metrics.items()}
        return loss * scale, scaled

    return objective


def _watched(objective: Objective, seen: dict[int, Tensor]) -> Objective:
    """``objective``, noting what learner and sampler say of each trained token, and the entropy there: ``[3, N]``, by
    the first row of the part."""

    def call(
        part: Minibatch, rows: Tensor, width: int, logprobs: Tensor, entropy: Tensor, values: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        sampled = part.old_logprobs if part.rollout_logprobs is None else part.rollout_logprobs
        seen[int(rows[0])] = torch.stack([each.detach()[part.mask].double() for each in (logprobs, sampled, entropy)])
        return objective(part, rows, width, logprobs, entropy, values)

    return call


def _value_metrics(plan: Plan, mask: Tensor) -> dict[str, float]:
    """How well the values that the plan was made with foretell its targets; nothing without values or
    trained tokens.

    The explained variance is ``1 - Var(R - V) / Var(R)`` over trained tokens: 1 is perfect, 0 no better than a
    constant. It is 0 by convention where the targets differ by no more than rounding.
    """
    term = plan.terms.get(ValueLoss.name)
    if term is None or not mask.any():
        return {}
    target, old = (term.inputs[name][mask].double() for name in ("target", "old"))
    differ = target.max() - target.min() > 1e-6 * target.abs().max().clamp(min=1)
    explained = 1 - float((target - old).var() / target.var()) if differ else 0.0
    return {"critic/explained_variance": explained, "values/mean": float(old.mean())}


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1 and id(parameter) not in embeddings]
    chosen = set(map(id, decayed))
    rest = [parameter for parameter in trained if id(parameter) not in chosen]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _mean_metrics(steps: Sequence[Metrics]) -> dict[str, float]:
    """Means over optimiser steps, of the finite values where there are any; maxima for names ending in
    ``/max``."""
    means: dict[str, float] = {}
    for name in steps[0] if steps else ():
        values = torch.stack([step[name].double().cpu() for step in steps])
        kept = values[values.isfinite()] if values.isfinite().any() else values
        if name == "skipped":
            means[name] = float(values.sum())
        else:
            means[name] = float(kept.amax() if name.endswith("/max") else kept.mean())
    return means

"""A recipe: ten filled slots that turn a batch into a plan, and a plan into a loss.

- ``Method``: the options and slots of one published method; ``register`` makes it available by name.
- ``Plan``: everything about a batch that needs no gradient.
- ``Recipe``: one or more methods, composed; what the trainer holds.
- ``merge_metrics``: metrics of a batch from those of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..errors import UsageError
from .batch import Minibatch
from .signals import informative_groups, trajectory_rows
from .slots import DEFAULT_SLOTS, Slots, Term
from .slots.clip import log_ratio
from .slots.regulariser import kl_estimate

if TYPE_CHECKING:
    from ..agents.branching import Branching

METHODS: dict[str, type[Method]] = {}


class Method(BaseModel):
    """Options of one method. A subclass per method, each in a file of ``recipes/``, which is found by
    itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    summary: ClassVar[str]
    """One line."""
    equations: ClassVar[tuple[str, ...]]
    sources: ClassVar[tuple[str, ...]]
    base: ClassVar[str | None] = None
    """Method that comes first when none is named that can stand alone; None for one that can."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of options, of this method or of its base."""

    def compose(self, slots: Slots, total_steps: int) -> Slots:
        """Fill slots on top of what earlier methods filled. ``total_steps`` is the length of the run."""
        raise NotImplementedError

    def objection(self, others: Mapping[str, Method]) -> str | None:
        """Why this method contradicts one of ``others``, if it does; one clause without a full stop."""
        return None


def register(name: str) -> Any:
    """Class decorator: make a ``Method`` available as ``recipe(name)``."""

    def add(method: type[Method]) -> type[Method]:
        METHODS[name] = method
        return method

    return add


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known about a batch before the update; every tensor is ``[B, L]`` and 0 off the mask.

    Denominators are those of the whole batch, so the losses of any split of the rows add up to the batch's.
    """

    advantages: Tensor
    weights: Tensor
    """Product of the Weight slot."""
    keep: Tensor
    """Bool: tokens in the policy loss."""
    coefficients: Tensor
    """Of each token's policy loss: aggregation x weights x stream."""
    share: Tensor
    """1 / trained tokens of the batch, for means in metrics."""
    terms: Mapping[str, Term] = field(default_factory=dict)
    """Plans of the regularisers."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def selected(self) -> dict[str, Tensor]:
        """Bool token sets that the recipe singled out, by the name of the part that uses them."""
        return {name: term.selected for name, term in self.terms.items() if term.selected is not None}

    def select(self, rows: Tensor | Sequence[int], width: int | None = None) -> Plan:
        """The plan of some rows, as part of the same batch; pairs with ``Minibatch.select``."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.keep.device)

        def part(tensor: Tensor) -> Tensor:
            return tensor[index, :width]

        terms = {
            name: Term(
                part(term.coefficient),
                {key: part(value) for key, value in term.inputs.items()},
                None if term.selected is None else part(term.selected),
            )
            for name, term in self.terms.items()
        }
        return Plan(
            advantages=part(self.advantages),
            weights=part(self.weights),
            keep=part(self.keep),
            coefficients=part(self.coefficients),
            share=part(self.share),
            terms=terms,
            metrics=self.metrics,
        )


class Recipe:
    """A loss with memory. ``plan`` once per batch, ``loss`` on its rows, ``on_step_end`` after the RL
    step."""

    def __init__(
        self,
        name: str,
        methods: Mapping[str, Method],
        total_steps: int,
        preset: str | None = None,
        slots: Mapping[str, Any] | None = None,
        allow_conflicts: bool = False,
    ) -> None:
        """Let each of ``methods`` fill slots in turn; ``slots`` (``Slots.override``) has the last word.

        Raises:
            UsageError: methods contradict each other, and ``allow_conflicts`` is off.
        """
        self.name = name
        self.preset = preset
        self.methods = dict(methods)
        self.step = 0
        filled = DEFAULT_SLOTS
        owners: dict[str, str] = {}
        for part, method in self.methods.items():
            before, filled = filled, method.compose(filled, total_steps)
            if not allow_conflicts:
                others = {other: made for other, made in self.methods.items() if other != part}
                _refuse_conflicts(part, method, others, before, filled, owners)
        self.slots = filled.override(slots or {})
        _refuse_halves(name, self.slots)
        forking = [sampler.name for sampler in self.slots.samplers if sampler.branching is not None]
        if len(forking) > 1:
            raise UsageError(f"recipe '{name}' forks rollouts in {len(forking)} ways; expected at most one")

    @property
    def needs_reference(self) -> bool:
        """Whether batches must hold ``ref_logprobs``."""
        charged = any(getattr(reward, "name", None) == "kl_penalty" for reward in self.slots.rewards)
        return charged or any(regulariser.name == "kl" for regulariser in self.slots.regularisers)

    @property
    def needs_values(self) -> bool:
        """Whether batches must hold ``values``, and the learner a critic."""
        return any(regulariser.name == "value" for regulariser in self.slots.regularisers)

    @property
    def branching(self) -> Branching | None:
        """Where rollouts fork; None for independent episodes."""
        return next((s.branching for s in self.slots.samplers if s.branching is not None), None)

    @property
    def max_batches(self) -> int:
        """Rounds of rollouts that may be made to fill a step with groups that the samplers keep."""
        return max((sampler.max_batches for sampler in self.slots.samplers), default=1)

    def kept(self, batch: Minibatch) -> Tensor:
        """``[B]`` bool: rows that every sampler keeps."""
        keep = torch.ones(len(batch), dtype=torch.bool, device=batch.mask.device)
        for sampler in self.slots.samplers:
            keep = keep & sampler.keep(batch)
        return keep

    @torch.no_grad()
    def plan(self, batch: Minibatch) -> Plan:
        """Advantages, weights and coefficients, with statistics over the whole of ``batch``.

        Raises:
            UsageError: the batch lacks something that the recipe needs.
        """
        slots, mask, dtype = self.slots, batch.mask, batch.old_logprobs.dtype
        batch, returns = _paid(batch, [reward(batch) for reward in slots.rewards])
        advantages = slots.credit(batch, returns, slots.baseline)
        scalars: dict[str, Any] = {}
        if batch.values is not None:
            # What the critic should have said, before anything reshapes the advantages.
            scalars["critic/target"] = torch.where(mask, advantages + batch.values, 0)
        for shape in slots.shapes:
            advantages = shape(batch, advantages)
        weights = torch.ones_like(advantages)
        keep = mask & self.kept(batch)[:, None]
        for weight in slots.weights:
            factor, kept = weight(batch, advantages)
            weights, keep = weights * factor, keep & kept
        coefficients = torch.where(keep, slots.aggregation(batch, keep) * weights * slots.stream(batch)[:, None], 0)
        for controller in slots.controllers:
            scalars |= controller.begin(batch, self.step)
        terms = {regulariser.name: regulariser.plan(batch, scalars) for regulariser in slots.regularisers}
        share = mask.double() / mask.sum().clamp(min=1)
        metrics = {
            "advantage/abs_mean": float((torch.where(mask, advantages, 0).abs() * share).sum()),
            "entropy/old_mean": float((torch.where(mask, batch.old_entropy, 0) * share).sum()),
            "groups/informative": float(informative_groups(batch, returns)[0].double().mean()),
        }
        metrics |= {name: float(value) for name, value in scalars.items() if isinstance(value, int | float)}
        for name, term in terms.items():
            if term.selected is not None:
                metrics[f"{name}/selected"] = float((term.selected * share).sum())
        return Plan(
            advantages=torch.where(mask, advantages, 0).to(dtype),
            weights=torch.where(mask, weights, 0).to(dtype),
            keep=keep,
            coefficients=coefficients.to(dtype),
            share=share.to(dtype),
            terms={name: _cast(term, dtype) for name, term in terms.items()},
            metrics=metrics,
        )

    def loss(
        self, batch: Minibatch, plan: Plan, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the rows of ``batch``, whose plan is ``plan``; ``logprobs`` and ``entropy`` are ``[B, L]``.

        What stands off the mask, even NaN, changes neither loss nor gradient. Metrics are detached scalars;
        those of a split add up, but for names that end in ``/max`` (see ``merge_metrics``).
        """
        mask = batch.mask
        logprobs, entropy = torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)
        values = None if values is None else torch.where(mask, values, 0)
        token_loss, clipped = self.slots.clip(logprobs, batch.old_logprobs, plan.advantages, mask)
        loss = policy_loss = (plan.coefficients * token_loss).sum()
        metrics = {"pg_loss": policy_loss.detach()}
        for regulariser in self.slots.regularisers:
            term = plan.terms[regulariser.name]
            part = (term.coefficient * regulariser.value(batch, term, logprobs, entropy, values)).sum()
            loss = loss + part
            metrics[f"{regulariser.name}_loss"] = part.detach()
        metrics["loss"] = loss.detach()
        with torch.no_grad():
            metrics |= _ratio_metrics(batch, plan, logprobs, entropy, clipped)
        return loss, metrics

    def on_step_end(self, metrics: Mapping[str, float]) -> None:
        """The RL step is over: controllers remember what they saw, and the step counter rises."""
        for controller in self.slots.controllers:
            controller.end(metrics)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; all that the recipe remembers."""
        controllers = {controller.name: controller.state_dict() for controller in self.slots.controllers}
        state: dict[str, Any] = {"step": self.step, "controllers": controllers}
        return state if self.branching is None else state | {"branching": self.branching.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            UsageError: the state is that of a different recipe.
        """
        names = {controller.name for controller in self.slots.controllers}
        if set(state["controllers"]) != names:
            raise UsageError(
                f"the saved state belongs to a recipe with {sorted(state['controllers']) or 'no controllers'}; "
                f"'{self.name}' has {sorted(names) or 'none'}"
            )
        self.step = int(state["step"])
        if self.branching is not None:
            self.branching.load_state_dict(state["branching"])
        for controller in self.slots.controllers:
            controller.load_state_dict(state["controllers"][controller.name])

    def describe(self) -> dict[str, Any]:
        """Name, summary, slots, options, equations and sources, for people."""
        methods = self.methods.values()
        slots = {
            name: [str(part) for part in value] if isinstance(value, tuple) else str(value)
            for name, value in vars(self.slots).items()
        }
        return {
            "name": self.name,
            "preset": self.preset,
            "summary": "; ".join(method.summary for method in methods),
            "slots": slots,
            "options": {name: method.model_dump() for name, method in self.methods.items()},
            "equations": [equation for method in methods for equation in method.equations],
            "sources": [source for method in methods for source in method.sources],
        }


def merge_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of a batch from those of a split of its rows: sums, and maxima for names ending in ``/max``."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            else:
                merged[name] = torch.maximum(merged[name], value) if name.endswith("/max") else merged[name] + value
    return merged


def _ratio_metrics(
    batch: Minibatch, plan: Plan, logprobs: Tensor, entropy: Tensor, clipped: Tensor
) -> dict[str, Tensor]:
    ratio = log_ratio(logprobs, batch.old_logprobs, batch.mask).exp()
    old = torch.where(batch.mask, batch.old_logprobs, 0)
    return {
        "entropy/action_mean": (plan.share * entropy).sum(),
        "ratio/mean": (plan.share * ratio).sum(),
        "ratio/max": torch.where(batch.mask, ratio, 0).amax(),
        "clip_fraction": (plan.share * clipped).sum(),
        "kl/old": (plan.share * kl_estimate(logprobs, old)).sum(),
    }


def _paid(batch: Minibatch, parts: Sequence[Tensor]) -> tuple[Minibatch, Tensor]:
    """The batch with every reward of a token in its ``token_rewards``, and the returns ``[B]`` with all parts."""
    returns = torch.zeros_like(batch.returns)
    for part in parts:
        if part.dim() == 2:
            paid = torch.where(batch.mask, part, 0)
            index, rows = trajectory_rows(batch)
            sums = returns.new_zeros(len(rows)).index_add(0, index, paid.double().sum(1))
            returns = returns + sums[index]
            batch = batch.replace(token_rewards=torch.where(batch.mask, batch.token_rewards, 0) + paid)
        else:
            returns = returns + part
    return batch, returns


def _refuse_conflicts(
    part: str, method: Method, others: Mapping[str, Method], before: Slots, after: Slots, owners: dict[str, str]
) -> None:
    """``owners`` names the method that fills each single slot, of those that stand on another one."""
    reason = method.objection(others)
    if reason is None and method.base is not None:
        for slot, filling in vars(after).items():
            if isinstance(filling, tuple) or filling is vars(before)[slot]:
                continue
            if slot in owners:
                reason = f"{owners[slot]} and {part} both fill the slot '{slot}', and the later one would win"
            owners[slot] = part
    if reason is not None:
        raise UsageError(f"{reason}; allow_conflicts=true composes them all the same")


def _refuse_halves(name: str, slots: Slots) -> None:
    """Slots that need each other, and regularisers that would overwrite each other's plan."""
    names = [regulariser.name for regulariser in slots.regularisers]
    if twice := sorted({entry for entry in names if names.count(entry) > 1}):
        raise UsageError(f"recipe '{name}' has two regularisers '{twice[0]}'; expected one, with the sum of both")
    if getattr(slots.credit, "name", None) == "gae" and "value" not in names:
        raise UsageError(f"recipe '{name}': the credit 'gae' needs the regulariser 'value', which trains its critic")
    if "corridor" in names and "entropy_history" not in {controller.name for controller in slots.controllers}:
        raise UsageError(f"recipe '{name}': the regulariser 'corridor' needs the controller 'entropy_history'")


def _cast(term: Term, dtype: torch.dtype) -> Term:
    inputs = {name: value.to(dtype) for name, value in term.inputs.items()}
    return Term(term.coefficient.to(dtype), inputs, term.selected)

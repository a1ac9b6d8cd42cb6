"""What each of the ten slots is, as a type; ``B`` rows, ``L`` tokens, ``N`` samples of a statistic.

- ``Sampler``: rollouts. ``Reward``, ``Credit``, ``Baseline``, ``Shape``, ``Weight``: advantages and weights.
- ``Clip``, ``Aggregation``, ``Regulariser`` with its ``Term``: the loss.
- ``Stream``, ``Controller``: where rows come from, and what changes from step to step.

Everything but ``Clip`` and ``Regulariser.value`` runs once per batch, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..batch import Minibatch

if TYPE_CHECKING:
    from ...agents.branching import Branching

Reward = Callable[[Minibatch], Tensor]
"""``batch → [B]`` float64, a part of each trajectory's return, or ``[B, L]``, what single tokens are paid (0 off the
mask); the parts of a recipe are added."""

Baseline = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(values [N], group [N], count [N]) → [N]``: each value compared with its group, in which it counts
``count`` times."""

Credit = Callable[[Minibatch, Tensor, Baseline], Tensor]
"""``(batch, returns [B], baseline) → [B, L]`` advantages; what stands at untrained tokens is ignored.
``batch.token_rewards`` hold the rewards of single tokens; what of ``returns`` they lack belongs to the trajectory's
last trained token."""

Shape = Callable[[Minibatch, Tensor], Tensor]
"""``(batch, advantages [B, L]) → [B, L]``. The order of shapes is part of a recipe."""

Weight = Callable[[Minibatch, Tensor], tuple[Tensor, Tensor]]
"""``(batch, advantages [B, L]) → (weight [B, L], keep [B, L] bool)``. Weights multiply and keep the loss's
denominator; tokens that are not kept leave the loss and its denominator."""

Clip = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(logprobs, old_logprobs, advantages, mask) → (loss [B, L], clipped [B, L] bool)``: the loss of each token, finite
where the mask is off, and where the clip took away or bounded its gradient."""

Aggregation = Callable[[Minibatch, Tensor], Tensor]
"""``(batch, keep [B, L] bool) → [B, L]`` float64 coefficients, 0 off ``keep``: the loss is ``Σ coefficient ·
ℓ``."""

Stream = Callable[[Minibatch], Tensor]
"""``batch → [B]``: the weight of the source that each row comes from."""


@dataclass(frozen=True)
class Term:
    """A regulariser's plan for one batch."""

    coefficient: Tensor
    """``[B, L]``, 0 off the mask: the term adds ``Σ coefficient · value`` to the loss."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """``[B, L]`` tensors that its value needs."""
    selected: Tensor | None = None
    """``[B, L]`` bool: the tokens on which it acts, where that is known before the update."""


class Sampler(Protocol):
    """What is rolled out, and which of it takes part. The rollout loop and the trainer ask the same object."""

    name: str
    max_batches: int
    """Rounds of rollouts that may be made to fill a step with groups that are kept; 1 takes what comes."""
    branching: Branching | None
    """Where rollouts fork, or None for independent episodes."""

    def keep(self, batch: Minibatch) -> Tensor:
        """``[B]`` bool: rows that take part; the same for all rows of a group."""


class Regulariser(Protocol):
    """A part of the loss besides the policy gradient."""

    name: str

    def plan(self, batch: Minibatch, scalars: Mapping[str, Any]) -> Term:
        """Coefficients and inputs over the global batch; ``scalars`` come from the controllers."""

    def value(
        self, batch: Minibatch, term: Term, logprobs: Tensor, entropy: Tensor, values: Tensor | None = None
    ) -> Tensor:
        """``[B, L]``, with gradient; the inputs are 0 off the mask, and ``values`` the critic's, if there is one."""


class Controller(Protocol):
    """What a recipe remembers from step to step. Its state is JSON-able and in every checkpoint."""

    name: str

    def begin(self, batch: Minibatch, step: int) -> dict[str, Any]:
        """See the batch of RL step ``step`` (from 0) and return scalars (or ``[B, L]`` tensors) for other
        slots."""

    def end(self, metrics: Mapping[str, float]) -> None:
        """The update of this step is done."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

"""Slot 3, credit: how a trajectory's outcome reaches its tokens.

- ``broadcast``: every trained token gets the whole trajectory's advantage.
- ``turns``: on top of that, a turn's tokens get how the rewards from this turn on compare with other turns'.
- ``anchors``: GiGPO; as ``turns``, compared with the turns that began with the same observation.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from ...errors import UsageError
from ..batch import Minibatch
from ..signals import Cells, trajectory_rows, turn_cells
from .registry import register
from .signatures import Baseline

Unit = Literal["trajectories", "turns"]


@register("credit", "broadcast")
def broadcast(batch: Minibatch, returns: Tensor, baseline: Baseline, *, unit: Unit = "trajectories") -> Tensor:
    """Compare each trajectory's return with its group's and give the result to all of its tokens.

    A trajectory counts once, however many rows it has (spec of GRPO), or with ``unit="turns"`` as many times
    as it has trained turns, which is how verl-agent normalises over rows and favours long trajectories.
    """
    index, row = trajectory_rows(batch)
    count = turn_cells(batch.mask, batch.trajectory, batch.turn).turns if unit == "turns" else torch.ones_like(row)
    advantages = baseline(returns[row], batch.group[row], count)
    return advantages[index][:, None].expand(batch.mask.shape)


@register("credit", "turns")
def turns(
    batch: Minibatch,
    returns: Tensor,
    baseline: Baseline,
    *,
    weight: float = 1.0,
    gamma: float = 0.5,
    unit: Unit = "trajectories",
) -> Tensor:
    """Add to the trajectory's advantage, times ``weight``, that of each turn.

    A turn's value is ``Σ_k γ^k r_{t+k}``, the discounted rewards of its trajectory from turn ``t`` on, and is compared
    with those of all turns of all trajectories of the group. What a single command has cost or gained is then held
    against that command, which the trajectory's sum cannot do. GiGPO (2505.10978) has the same two levels, and compares
    a turn with those that began with the same observation.

    Raises:
        UsageError: the batch does not say what each turn paid.
    """
    cells, row, values = _step_returns(batch, gamma, "turns")
    whole = broadcast(batch, returns, baseline, unit=unit)
    if not len(values):
        return whole
    compared = baseline(values, batch.group[row], torch.ones_like(row))
    return whole + weight * compared[cells.index]


@register("credit", "anchors")
def anchors(
    batch: Minibatch,
    returns: Tensor,
    baseline: Baseline,
    *,
    weight: float = 1.0,
    gamma: float = 0.95,
    unit: Unit = "trajectories",
    similarity: float | None = None,
) -> Tensor:
    """``A^E + weight · A^S``: the trajectory's advantage, and that of a turn among those that began alike (GiGPO).

    A turn's value is ``R_t = Σ_{k≥t} γ^{k-t} r_k`` over its trajectory's ``turn_rewards``. It is compared with the
    values of the turns of its group, of any index in any trajectory, before which the world said exactly the same. The
    baseline is that of the trajectories, but a turn like no other has nothing to be compared with and gets 0. With
    ``similarity`` a text joins the first cluster whose representative it resembles at least so much (``ratio`` of
    ``difflib.SequenceMatcher``, in ``(0, 1]``); the texts of a group come in alphabetical order.

    Source: GiGPO, arXiv 2505.10978, §4.

    Raises:
        UsageError: the batch does not say what each turn paid, or what stood before it.
    """
    cells, row, values = _step_returns(batch, gamma, "anchors")
    whole = broadcast(batch, returns, baseline, unit=unit)
    if not len(values):
        return whole
    alike = torch.tensor(_anchor_groups(batch, cells, row, similarity), device=row.device)
    compared = baseline(values, alike, torch.ones_like(alike))
    step = torch.where(torch.bincount(alike)[alike] > 1, compared, 0)
    return whole + weight * step[cells.index]


def _step_returns(batch: Minibatch, gamma: float, name: str) -> tuple[Cells, Tensor, Tensor]:
    """The cells of the batch, a row ``[C]`` of the trajectory of each, and its discounted rewards ``[C]``, float64."""
    if batch.turn_rewards is None:
        raise UsageError(f"credit by {name} needs turn_rewards; build the batch with Minibatch.from_trees")
    if batch.turn_rewards.dim() == 1:
        raise UsageError("turn_rewards [B] are for rows of one turn each; expected [B, K], one column for each turn")
    cells = turn_cells(batch.mask, batch.trajectory, batch.turn)
    rows = trajectory_rows(batch)[1]
    ahead = batch.turn_rewards[rows].double()
    if len(cells.turn) and int(cells.turn.max()) >= ahead.shape[1]:
        raise UsageError(f"turn_rewards hold {ahead.shape[1]} turns; there are tokens of turn {int(cells.turn.max())}")
    for turn in reversed(range(ahead.shape[1] - 1)):
        ahead[:, turn] += gamma * ahead[:, turn + 1]
    return cells, rows[cells.trajectory], ahead[cells.trajectory, cells.turn]


def _anchor_groups(batch: Minibatch, cells: Cells, row: Tensor, similarity: float | None) -> list[int]:
    """Number of the anchor group of each cell."""
    if batch.anchor is None:
        raise UsageError("credit by anchors needs anchor; build the batch with Minibatch.from_trees")
    found = []
    for group, source, turn in zip(batch.group[row].tolist(), row.tolist(), cells.turn.tolist(), strict=True):
        seen = batch.anchor[source]
        if not isinstance(seen, tuple | list):
            raise UsageError("an anchor of one value is for a row of one turn; expected one value for each turn")
        if turn >= len(seen):
            raise UsageError(f"anchor of row {source} holds {len(seen)} turns; there are tokens of turn {turn}")
        found.append((group, seen[turn]))
    distinct = sorted(set(found))
    if similarity is None:
        number = {place: count for count, place in enumerate(distinct)}
    else:
        number = {}
        for group, places in groupby(distinct, key=lambda place: place[0]):
            clusters = _clusters([text for _, text in places], similarity)
            start = len(number)
            number |= {(group, text): start + cluster for text, cluster in clusters.items()}
    return [number[place] for place in found]


def _clusters(texts: list[str], similarity: float) -> dict[str, int]:
    """Cluster of each text: the first whose first text resembles it, else a new one."""
    representatives: list[str] = []
    clusters = {}
    # Without autojunk, which beyond 200 characters takes every common letter for noise and makes ratios too small.
    matcher = SequenceMatcher(None, autojunk=False)
    for text in texts:
        matcher.set_seq2(text)
        for cluster, representative in enumerate(representatives):
            matcher.set_seq1(representative)
            # Cheap upper bounds of the ratio come first.
            if all(bound() >= similarity for bound in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)):
                clusters[text] = cluster
                break
        else:
            clusters[text] = len(representatives)
            representatives.append(text)
    return clusters

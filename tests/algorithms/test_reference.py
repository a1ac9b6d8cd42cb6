"""Every method against its plain reference on random ragged batches: loss, advantages and gradients.

Off the mask everything is NaN, so that neither side can have read it. Where a method divides by the standard deviation
of a group, rounding in groups of equal values is divided by 1e-6, which the absolute tolerances allow for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.recipe import Recipe

from ..reference import (
    aepo,
    arpo,
    dapo,
    empg,
    epo,
    gigpo,
    grpo,
    gspo,
    loss,
    ppo,
    reinforce_pp,
    rewards,
    rloo,
    rollout_correction,
)
from ..reference.loss import Loss
from ..reference.statistics import whitened
from ..reference.trajectories import PerToken, Token, Trajectory, Turn

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
    "turn-mean",
)
DIVIDED = 1e-8
"""Absolute tolerance where something is divided by a standard deviation that may be rounding alone."""
PLAIN = 1e-11

Drawn = tuple[int, bool, tuple[int, int], float]
DRAWN = st.tuples(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([(3, 4), (1, 3), (3, 1), (2, 2)]),
    # On policy, hardly moved, moved, beyond every clip, and beyond what an exponential should be asked.
    st.sampled_from([0.0, 0.01, 1.0, 3.0, 30.0]),
)
COEFFICIENTS = st.sampled_from([0.0, 0.3])
MODE = st.sampled_from(MODES)
FEW = settings(max_examples=60)


@dataclass
class Case:
    """One random batch, for the library and for the references."""

    batch: Minibatch
    inputs: tuple[Tensor, Tensor, Tensor]
    """Current log-probabilities, entropies and values, ``[B, L]``."""
    trajectories: list[Trajectory]

    @property
    def width(self) -> int:
        return self.batch.mask.shape[1]

    def table(self, values: PerToken) -> Tensor:
        """``[B, L]``, 0 where nothing is said."""
        out = torch.zeros(self.batch.mask.shape, dtype=torch.float64)
        for place, value in values.items():
            out[place] = value
        return out


def case(ragged: Callable[..., tuple[Minibatch, Tensor, Tensor]], drawn: Drawn, *, binary: bool = False) -> Case:
    """A batch of ``groups`` by ``size`` trajectories, whose policy has moved by 0.4 times ``moved`` nats; with
    ``binary`` returns are 0 or 1, so that many groups have equal ones."""
    seed, window, (groups, size), moved = drawn
    batch, logprobs, entropy = ragged(seed, groups=groups, size=size, window=window)
    rng = np.random.default_rng(seed)
    values = batch.values + torch.from_numpy(rng.normal(0, 0.5, batch.mask.shape))
    logprobs = batch.old_logprobs + moved * (logprobs - batch.old_logprobs)

    def unknown_off_the_mask(tensor: Tensor) -> Tensor:
        return torch.where(batch.mask, tensor, math.nan)

    fields = ("old_logprobs", "old_entropy", "ref_logprobs", "rollout_logprobs", "token_rewards", "values")
    batch = batch.replace(**{name: unknown_off_the_mask(getattr(batch, name)) for name in fields})
    if binary:
        batch = batch.replace(returns=(batch.returns > 0).double())
    inputs = tuple(unknown_off_the_mask(tensor) for tensor in (logprobs, entropy, values))
    return Case(batch, inputs, trajectories_of(batch, *inputs))


def trajectories_of(batch: Minibatch, logprobs: Tensor, entropy: Tensor, values: Tensor) -> list[Trajectory]:
    """The batch as the references read it: trajectories by their id, turns by their index, tokens by their column."""
    made: dict[int, Trajectory] = {}
    turns: dict[tuple[int, int], Turn] = {}
    for row in range(len(batch)):
        owner = int(batch.trajectory[row])
        if owner not in made:
            made[owner] = Trajectory(
                group=int(batch.group[row]),
                outcome=float(batch.returns[row]),
                turns=[],
                rewards=batch.turn_rewards[row].tolist(),
                anchors=list(batch.anchor[row]),
            )
        for column in range(batch.mask.shape[1]):
            if not batch.mask[row, column]:
                continue
            place = row, column
            cell = owner, int(batch.turn[place])
            if cell not in turns:
                turns[cell] = Turn(cell[1], [])
                made[owner].turns.append(turns[cell])
            turns[cell].tokens.append(
                Token(
                    place,
                    logp=float(logprobs[place]),
                    old_logp=float(batch.old_logprobs[place]),
                    ref_logp=float(batch.ref_logprobs[place]),
                    rollout_logp=float(batch.rollout_logprobs[place]),
                    entropy=float(entropy[place]),
                    old_entropy=float(batch.old_entropy[place]),
                    value=float(values[place]),
                    old_value=float(batch.values[place]),
                    reward=float(batch.token_rewards[place]),
                    node=int(batch.node[place]),
                )
            )
    for trajectory in made.values():
        trajectory.turns.sort(key=lambda turn: turn.index)
    return [made[owner] for owner in sorted(made)]


def agree(case: Case, made: Recipe, advantages: PerToken, expected: Loss, tolerance: float = DIVIDED) -> None:
    """The recipe's advantages, loss and gradients are the expected ones, and 0 off the mask."""
    plan = made.plan(case.batch)
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    value, _ = made.loss(case.batch, plan, *inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=tolerance)
    close(plan.advantages, case.table(advantages), msg=lambda text: f"advantages: {text}")
    assert value.item() == pytest.approx(expected.value, rel=1e-10, abs=tolerance)
    wanted = {"logprobs": expected.logp, "entropies": expected.entropy, "values": expected.values}
    for gradient, (name, values) in zip(gradients, wanted.items(), strict=True):
        close(gradient, case.table(values), msg=lambda text, name=name: f"gradient by {name}: {text}")


@FEW
@given(
    drawn=DRAWN,
    mode=MODE,
    per_turn=st.booleans(),
    std=st.booleans(),
    dual=st.sampled_from([None, 1.5]),
    kl=COEFFICIENTS,
    estimator=st.sampled_from(["k1", "k2", "k3", "k1+", "k3+"]),
)
@example((1925516, False, (3, 4), 1.0), "seq-mean-token-mean", True, True, None, 0.0, "k1")
def test_grpo(ragged, drawn, mode, per_turn, std, dual, kl, estimator):
    made = recipe(
        "grpo",
        aggregation=mode,
        group_stats="turns" if per_turn else "trajectories",
        normalize_std=std,
        clip_low=0.1,
        clip_high=0.28,
        dual_clip=dual,
        kl_coef=kl,
        kl_estimator=estimator,
    )
    c = case(ragged, drawn)
    a = grpo.advantages(c.trajectories, std=std, per_turn=per_turn)
    clip = partial(loss.ppo_clip, low=0.1, high=0.28, dual=dual)
    expected = loss.policy_loss(c.trajectories, a, clip, mode, c.width)
    agree(c, made, a, expected + loss.kl_loss(c.trajectories, kl, estimator, mode, c.width))


@FEW
@given(drawn=DRAWN)
def test_dr_grpo(ragged, drawn):
    c = case(ragged, drawn)
    a = grpo.advantages(c.trajectories, std=False)
    clip = partial(loss.ppo_clip, dual=None)
    expected = loss.policy_loss(c.trajectories, a, clip, "seq-mean-token-sum-norm", c.width)
    agree(c, recipe("dr_grpo"), a, expected, PLAIN)


@FEW
@given(drawn=DRAWN, clip=st.booleans(), kl=COEFFICIENTS, mode=MODE)
def test_rloo(ragged, drawn, clip, kl, mode):
    c = case(ragged, drawn)
    made = recipe("rloo", clip="ppo" if clip else "none", kl_reward_coef=kl, aggregation=mode)
    a = rloo.advantages(rewards.with_kl_penalty(c.trajectories, kl))
    surrogate = loss.ppo_clip if clip else loss.unclipped
    agree(c, made, a, loss.policy_loss(c.trajectories, a, surrogate, mode, c.width), PLAIN)


@FEW
@given(drawn=DRAWN)
def test_rloo_as_in_its_paper(ragged, drawn):
    c = case(ragged, drawn)
    a = rloo.advantages(rewards.with_kl_penalty(c.trajectories, 0.05))
    expected = loss.policy_loss(c.trajectories, a, loss.unclipped, "seq-mean-token-sum")
    agree(c, recipe("rloo", "paper"), a, expected, PLAIN)


@FEW
@given(drawn=DRAWN, gamma=st.sampled_from([1.0, 0.9, 0.0]), kl=COEFFICIENTS, grouped=st.booleans(), mode=MODE)
def test_reinforce_pp(ragged, drawn, gamma, kl, grouped, mode):
    c = case(ragged, drawn)
    made = recipe(
        "reinforce_pp",
        gamma=gamma,
        kl_reward_coef=kl,
        baseline="group" if grouped else "none",
        aggregation=mode,
    )
    paid = rewards.with_kl_penalty(c.trajectories, kl)
    a = reinforce_pp.group_advantages(paid) if grouped else reinforce_pp.advantages(paid, gamma=gamma)
    agree(c, made, a, loss.policy_loss(c.trajectories, a, loss.ppo_clip, mode, c.width))


@FEW
@given(
    drawn=DRAWN,
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    rows=st.booleans(),
    whiten=st.booleans(),
    clip=st.sampled_from([0.5, 0.05, None]),
    kl=COEFFICIENTS,
    mode=MODE,
)
def test_ppo(ragged, drawn, gamma, lam, rows, whiten, clip, kl, mode):
    c = case(ragged, drawn)
    made = recipe(
        "ppo",
        gamma=gamma,
        lam=lam,
        gae_unit="rows" if rows else "trajectories",
        whiten=whiten,
        value_coef=0.7,
        value_clip=clip,
        kl_reward_coef=kl,
        aggregation=mode,
    )
    paid = rewards.with_kl_penalty(c.trajectories, kl)
    raw = (ppo.row_advantages if rows else ppo.advantages)(paid, gamma=gamma, lam=lam)
    a = whitened(raw) if whiten else raw
    expected = loss.policy_loss(c.trajectories, a, loss.ppo_clip, mode, c.width)
    critic = ppo.value_loss(c.trajectories, raw, coefficient=0.7, clip=clip, mode=mode, width=c.width)
    agree(c, made, a, expected + critic)


@FEW
@given(drawn=DRAWN)
def test_ppo_as_in_verl_agent(ragged, drawn):
    c = case(ragged, drawn)
    raw = ppo.row_advantages(c.trajectories)
    a = whitened(raw)
    expected = loss.policy_loss(c.trajectories, a, loss.ppo_clip) + ppo.value_loss(c.trajectories, raw)
    agree(c, recipe("ppo", "verl-agent"), a, expected + loss.kl_loss(c.trajectories, 0.01, "k3", "token-mean"))


@FEW
@given(
    drawn=DRAWN,
    binary=st.booleans(),
    filtered=st.booleans(),
    limits=st.sampled_from([None, (12, 8), (5, 5)]),
    kl=COEFFICIENTS,
    mode=MODE,
)
def test_dapo(ragged, drawn, binary, filtered, limits, kl, mode):
    c = case(ragged, drawn, binary=binary)
    options = {} if limits is None else {"overlong_length": limits[0], "overlong_buffer": limits[1]}
    made = recipe("dapo", filter_groups=filtered, overlong_factor=0.5, kl_coef=kl, aggregation=mode, **options)
    fined = c.trajectories if limits is None else dapo.with_overlong(c.trajectories, *limits, factor=0.5)
    a = grpo.advantages(fined)
    taught = dapo.informative(c.trajectories) if filtered else c.trajectories
    expected = loss.policy_loss(taught, a, partial(loss.ppo_clip, low=0.2, high=0.28), mode, c.width)
    agree(c, made, a, expected + loss.kl_loss(c.trajectories, kl, "k3", mode, c.width))


@FEW
@given(
    drawn=DRAWN,
    clip=st.sampled_from([(3e-4, 4e-4), (0.1, 0.2)]),
    mode=st.sampled_from([None, *MODES]),
    by_turn=st.booleans(),
)
def test_gspo(ragged, drawn, clip, mode, by_turn):
    """Also where the turns of a row differ in their advantage (GSPO-token)."""
    c = case(ragged, drawn)
    options = {} if mode is None else {"aggregation": mode}
    made = recipe("gspo+gigpo" if by_turn else "gspo", clip_low=clip[0], clip_high=clip[1], **options)
    a = (gigpo if by_turn else grpo).advantages(c.trajectories)
    width = {} if mode is None else {"mode": mode, "width": c.width}
    agree(c, made, a, gspo.policy_loss(c.trajectories, a, low=clip[0], high=clip[1], **width))


ROOMS = ("You are in the hall.", "You are in the hall!", "You see a mug 1.", "You see a mug 12.", "Nothing happens.")


@FEW
@given(
    drawn=DRAWN,
    weight=st.sampled_from([0.0, 1.0, 2.5]),
    gamma=st.sampled_from([0.95, 0.5, 0.0, 1.0]),
    std=st.booleans(),
    per_turn=st.booleans(),
    similarity=st.sampled_from([None, 0.5, 0.9, 1.0]),
)
def test_gigpo(ragged, drawn, weight, gamma, std, per_turn, similarity):
    c = case(ragged, drawn)
    said = np.random.default_rng(drawn[0]).integers(0, len(ROOMS), (int(c.batch.trajectory.max()) + 1, 5))
    anchors = [tuple(ROOMS[place] for place in said[owner]) for owner in c.batch.trajectory.tolist()]
    c.batch = c.batch.replace(anchor=anchors)
    c.trajectories = trajectories_of(c.batch, *c.inputs)
    made = recipe(
        "gigpo",
        step_weight=weight,
        step_gamma=gamma,
        normalize_std=std,
        group_stats="turns" if per_turn else "trajectories",
        similarity=similarity,
    )
    a = {}
    for group in {trajectory.group for trajectory in c.trajectories}:
        own = [trajectory for trajectory in c.trajectories if trajectory.group == group]
        seen = sorted({trajectory.anchors[turn.index] for trajectory in own for turn in trajectory.turns})
        names = None if similarity is None else gigpo.clusters(seen, similarity)
        a |= gigpo.advantages(own, weight=weight, gamma=gamma, std=std, per_turn=per_turn, names=names)
    agree(c, made, a, loss.policy_loss(c.trajectories, a, loss.ppo_clip))


@FEW
@given(drawn=DRAWN, preset=st.sampled_from(["alfworld", "webshop"]))
def test_gigpo_as_in_verl_agent(ragged, drawn, preset):
    c = case(ragged, drawn)
    a = gigpo.advantages(c.trajectories, std=preset == "alfworld", per_turn=True)
    expected = loss.policy_loss(c.trajectories, a, loss.ppo_clip)
    agree(c, recipe("gigpo", preset), a, expected + loss.kl_loss(c.trajectories, 0.01, "k3", "token-mean"))


def base_loss(c: Case) -> tuple[PerToken, Loss]:
    """GRPO's advantages and loss."""
    a = grpo.advantages(c.trajectories)
    return a, loss.policy_loss(c.trajectories, a, loss.ppo_clip)


EPO_PRESETS = {
    "paper": {},
    "corridor": {"alpha": 2.0, "kappa_low": 0.5, "kappa_high": 1.5},
    "official": {
        "kappa_low": 0.5,
        "kappa_high": 1.5,
        "penalty": "indicator",
        "per_turn": True,
        "append": "before",
        "beta": "official",
        "mode": "token-mean",
    },
}
HISTORIES = st.sampled_from(
    [
        {},
        {"history": "window", "history_window": 2},
        {"history": "window", "history_window": 1},
        {"history": "ema", "history_decay": 0.7},
    ]
)


@settings(max_examples=12)
@pytest.mark.parametrize("preset", EPO_PRESETS)
@given(
    drawn=DRAWN,
    history=HISTORIES,
    turns=st.sampled_from([4, 6, 50]),
    steps=st.integers(1, 4),
    first=st.sampled_from([0, 73, 120]),
)
def test_epo_over_several_steps(ragged, preset, drawn, history, turns, steps, first):
    """From RL step ``first`` on, with nothing remembered yet."""
    seed, window, shape, moved = drawn
    options = {} if preset != "official" else {"max_turns": turns}
    made = recipe("epo", preset, total_steps=151, entropy_coef=0.5, **history, **options)
    made.step = first
    renamed = {name.replace("history", "history_kind") if name == "history" else name: x for name, x in history.items()}
    official = {"gate_turn": turns // 2, "pad": turns} if options else {}
    memory = epo.EPO(151, 0.5, first=first, **EPO_PRESETS[preset] | renamed | official)
    for step in range(steps):
        c = case(ragged, (seed + step, window, shape, moved))
        a, expected = base_loss(c)
        agree(c, made, a, expected + memory.step(c.trajectories))
        made.on_step_end({})


@settings(max_examples=12)
@given(
    drawn=DRAWN,
    history=HISTORIES,
    per_turn=st.booleans(),
    append=st.sampled_from(["before", "after"]),
    beta=st.sampled_from(["paper", "official", "constant"]),
    penalty=st.sampled_from(["hinge", "indicator"]),
    mode=st.sampled_from(["token-mean", "turn-mean", "seq-mean-token-mean"]),
)
def test_epo_with_single_options(ragged, drawn, history, per_turn, append, beta, penalty, mode):
    """Each of its departures from the paper, in any combination, after two steps of other lengths."""
    seed, window, shape, moved = drawn
    made = recipe(
        "epo",
        total_steps=5,
        entropy_coef=1.0,
        alpha=1.5,
        kappa_low=0.8,
        kappa_high=1.2,
        gamma=1.0,
        reference="per_turn" if per_turn else "scalar",
        append=append,
        beta=beta,
        penalty=penalty,
        agg=mode,
        **history,
    )
    memory = epo.EPO(
        5,
        1.0,
        1.5,
        0.8,
        1.2,
        1.0,
        penalty,
        per_turn,
        append,
        beta,
        mode=mode,
        **{("history_kind" if name == "history" else name): value for name, value in history.items()},
    )
    for step in range(3):
        c = case(ragged, (seed + step, window, shape, moved))
        a, expected = base_loss(c)
        agree(c, made, a, expected + memory.step(c.trajectories))
        made.on_step_end({})


@FEW
@given(drawn=DRAWN, hard=st.booleans(), once=st.booleans(), mode=MODE)
def test_arpo(ragged, drawn, hard, once, mode):
    c = case(ragged, drawn)
    made = recipe("arpo", credit="hard" if hard else "soft", deduplicate=once, aggregation=mode)
    a = grpo.advantages(c.trajectories)
    a = arpo.hard_credit(c.trajectories, a) if hard else a
    weights = arpo.shared_weights(c.trajectories) if once else None
    agree(c, made, a, loss.policy_loss(c.trajectories, a, loss.ppo_clip, mode, c.width, weights))


@FEW
@given(
    drawn=DRAWN,
    hard=st.booleans(),
    weight=st.sampled_from([0.0, 0.2, 1.0]),
    clamp=st.sampled_from([None, (0.0, 2.0), (0.9, 1.0)]),
    dual=st.sampled_from([None, 3.0]),
    mode=MODE,
)
def test_aepo(ragged, drawn, hard, weight, clamp, dual, mode):
    c = case(ragged, drawn)
    made = recipe(
        "aepo",
        credit="hard" if hard else "soft",
        entropy_advantage=weight,
        factor_clamp=clamp,
        dual_clip=dual,
        clip_low=0.1,
        aggregation=mode,
    )
    a = grpo.advantages(c.trajectories)
    a = arpo.hard_credit(c.trajectories, a) if hard else a
    a = aepo.modulate(c.trajectories, a, weight, clamp)
    clip = partial(aepo.preserving_clip, low=0.1, dual=dual)
    agree(c, made, a, loss.policy_loss(c.trajectories, a, clip, mode, c.width))


@FEW
@given(drawn=DRAWN, both_sides=st.booleans())
def test_the_gradient_preserving_clip_on_one_side_and_on_both(ragged, drawn, both_sides):
    c = case(ragged, drawn)
    clip = {"type": "gradient_preserving", "both_sides": both_sides, "high": 0.28}
    a = grpo.advantages(c.trajectories)
    expected = loss.policy_loss(
        c.trajectories, a, partial(aepo.preserving_clip, high=0.28, both_sides=both_sides), "token-mean"
    )
    agree(c, recipe("grpo", slots={"clip": clip}), a, expected)


EMPG_OPTIONS = {
    "k": st.sampled_from([0.0, 1.0, 2.0]),
    "k_future": st.sampled_from([0.0, 1.0, 3.0]),
    "zeta": st.sampled_from([0.0, 0.05, 1.0]),
    "last_bonus": st.sampled_from(["zero", "mean", "drop"]),
    "minmax": st.sampled_from(["exact", "percentile"]),
}


@settings(max_examples=100)
@given(drawn=DRAWN, options=st.fixed_dictionaries(EMPG_OPTIONS), gated=st.booleans(), binary=st.booleans())
def test_empg(ragged, drawn, options, gated, binary):
    c = case(ragged, drawn, binary=binary)
    a = empg.modulate(c.trajectories, grpo.advantages(c.trajectories), successes_only=gated, **options)
    made = recipe("empg", bonus_gate="success" if gated else "none", **options)
    agree(c, made, a, loss.policy_loss(c.trajectories, a, loss.ppo_clip))


def preset_loss(name: str, preset: str, c: Case) -> tuple[PerToken, Loss]:
    """Advantages and loss of the presets that only choose among what the other tests vary."""
    a = grpo.advantages(c.trajectories, per_turn=preset == "verl-agent")
    clip = partial(loss.ppo_clip, high=0.28 if name == "dapo" else 0.2, dual=None if preset == "paper" else 3.0)
    taught = dapo.informative(c.trajectories) if name == "dapo" else c.trajectories
    mode, kl = ("seq-mean-token-mean", 0.04) if (name, preset) == ("grpo", "paper") else ("token-mean", 0.01)
    if name == "aepo":
        a = aepo.modulate(c.trajectories, a, 0.2) if preset == "paper" else a
        clip = aepo.preserving_clip
    elif name == "arpo":
        clip = loss.ppo_clip
    expected = loss.policy_loss(taught, a, clip, mode)
    charged = preset == "verl-agent" or name == "grpo"
    return a, expected + loss.kl_loss(c.trajectories, kl, "k3", mode) if charged else expected


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *(("grpo", preset) for preset in ("paper", "verl-agent")),
        *(("dapo", preset) for preset in ("paper", "verl-agent")),
        *(("arpo", preset) for preset in ("paper", "official")),
        *(("aepo", preset) for preset in ("paper", "official")),
    ],
)
@settings(max_examples=10)
@given(drawn=DRAWN)
def test_presets(ragged, name, preset, drawn):
    c = case(ragged, drawn)
    agree(c, recipe(name, preset), *preset_loss(name, preset, c))


@FEW
@given(
    drawn=DRAWN,
    level=st.sampled_from(["token", "sequence"]),
    masks=st.booleans(),
    band=st.sampled_from([None, (0.7, 1.5)]),
    normalize=st.booleans(),
    mode=MODE,
)
def test_rollout_correction(ragged, drawn, level, masks, band, normalize, mode):
    c = case(ragged, drawn)
    weight = {
        "type": "rollout_correction",
        "level": level,
        "mode": "mask" if masks else "truncate",
        "cap": 1.2,
        "band": band,
        "normalize": normalize,
    }
    made = recipe("grpo", aggregation=mode, slots={"weights": [weight]})
    whole = level == "sequence"
    w = rollout_correction.weights(c.trajectories, per_trajectory=whole)
    low, high = band or (0.0, 1.2)
    left = rollout_correction.masked(c.trajectories, w, low, high) if masks else c.trajectories
    w = rollout_correction.truncated(w, 1.2) if band is None else rollout_correction.zeroed(w, low, high)
    if normalize:
        w = rollout_correction.normalised(left, w, per_trajectory=whole)
    a = grpo.advantages(c.trajectories)
    agree(c, made, a, loss.policy_loss(left, a, loss.ppo_clip, mode, c.width, w))


@FEW
@given(drawn=DRAWN, mode=MODE)
def test_methods_on_top_of_each_other(ragged, drawn, mode):
    """Advantages of steps, then the mean over forks, then EMPG; DAPO's clip; EPO's terms."""
    c = case(ragged, drawn)
    made = recipe("dapo+gigpo+arpo+empg+epo", aggregation=mode, filter_groups=False, **{"arpo.credit": "hard"})
    a = empg.modulate(c.trajectories, arpo.hard_credit(c.trajectories, gigpo.advantages(c.trajectories)))
    expected = loss.policy_loss(c.trajectories, a, partial(loss.ppo_clip, high=0.28), mode, c.width)
    agree(c, made, a, expected + epo.EPO(150).step(c.trajectories))


@FEW
@given(drawn=DRAWN, hard=st.booleans(), modulated=st.booleans())
def test_methods_on_top_of_a_critic(ragged, drawn, hard, modulated):
    """There the tokens of a step, and of a message that forks share, differ in their advantage."""
    c = case(ragged, drawn)
    made = recipe("ppo+arpo+empg" if modulated else "ppo+aepo", credit="hard" if hard else "soft")
    raw = ppo.advantages(c.trajectories)
    a = whitened(raw)
    if hard:
        a = arpo.hard_credit(c.trajectories, a)
    a = empg.modulate(c.trajectories, a) if modulated else aepo.modulate(c.trajectories, a, clamp=(0.0, 2.0))
    expected = loss.policy_loss(c.trajectories, a, loss.ppo_clip if modulated else aepo.preserving_clip)
    agree(c, made, a, expected + ppo.value_loss(c.trajectories, raw))


ENTROPY = st.floats(0, 6, width=32)
ACTIONS = st.lists(st.lists(ENTROPY, min_size=1, max_size=5), min_size=1, max_size=6)
VOCABULARY = 50


def play(group, actions, member=0, room=100):
    """The group's decisions along one episode with these entropies; there is none at the first turn."""
    made = [group.decide(member, turn, np.float32(action), room) for turn, action in enumerate(actions)]
    assert made[0] is None
    return made[1:]


@given(
    actions=ACTIONS,
    scale=st.sampled_from(["tokens", "vocab", "log_vocab"]),
    alpha=st.sampled_from([0.5, 0.3]),
    beta=st.sampled_from([0.2, 2.0]),
    penalty=st.sampled_from([None, 0.05, 0.4]),
    branches=st.integers(1, 3),
)
def test_the_threshold_rule_of_arpo_and_aepo(actions, scale, alpha, beta, penalty, branches):
    """Statistic, probability and decision, along a chain of decisions; without a penalty it is ARPO's."""
    options = {} if penalty is None else {"penalty": penalty, "dynamic": False}
    made = recipe(
        "arpo" if penalty is None else "aepo",
        scale=scale,
        alpha=alpha,
        beta=beta,
        probe_tokens=3,
        branches=branches,
        **options,
    )
    deltas = arpo.rises(actions, scale, VOCABULARY, probe=3)
    expected = aepo.chain(deltas, alpha, beta, 0.5, penalty or 0.0)
    decisions = play(made.branching.group(0, 100, 7, VOCABULARY), actions)
    assert [decision.delta_entropy for decision in decisions] == pytest.approx(deltas, rel=1e-12, abs=1e-12)
    assert [decision.probability for decision in decisions] == pytest.approx([p for p, _ in expected], abs=1e-12)
    assert [decision.forks for decision in decisions] == [branches * fires for _, fires in expected]
    if penalty is None:
        assert [fires for _, fires in expected] == [arpo.branches(delta, alpha, beta) for delta in deltas]


@given(first=ACTIONS, second=ACTIONS, rounds=st.lists(st.integers(0, 2), min_size=6, max_size=6))
@pytest.mark.parametrize("name", ["arpo", "aepo"])
def test_the_released_rules(name, first, second, rounds):
    """One episode, and in the next step another one at the same place, which is compared with the first one's root.
    The penalty of AEPO's code counts the group's rounds in a row that began an episode."""
    branching = recipe(name, "official").branching
    remembered = None
    for actions in (first, second):
        group = branching.group(0, 100, 7, VOCABULARY)
        deltas = arpo.official_rises(actions, VOCABULARY, remembered=remembered)
        if remembered is None:
            remembered = arpo.statistic(actions[0], "log_vocab", VOCABULARY)
        consecutive = 0
        for turn, action in enumerate(actions):
            decision = group.decide(0, turn, np.float32(action), 100)
            if turn:
                delta = deltas[turn - 1]
                chance = (
                    aepo.official_probability(delta, consecutive)
                    if name == "aepo"
                    else float(np.clip(arpo.probability(delta), 0, 1))
                )
                assert decision.delta_entropy == pytest.approx(delta, rel=1e-12, abs=1e-12)
                assert decision.probability == pytest.approx(chance, abs=1e-12)
            group.end_round(rounds[turn])
            consecutive = consecutive + 1 if rounds[turn] else 0


@pytest.mark.parametrize("name", ["arpo", "aepo"])
@pytest.mark.parametrize("rise", [-3.0, -1.0, 0.0, 0.5, 1.0])
def test_forks_are_as_frequent_as_their_probability(name, rise):
    """4000 independent decisions; the bound is five standard deviations."""
    branching = recipe(name, "official", lookahead=True, root="episode", scale="tokens").branching
    chance = aepo.official_probability(rise, 0) if name == "aepo" else float(np.clip(arpo.probability(rise), 0, 1))
    forks = 0
    for seed in range(4000):
        (decision,) = play(branching.group(0, 16, seed, VOCABULARY), [[4.0], [4.0 + rise]])
        forks += decision.forks
    assert abs(forks - 4000 * chance) <= 5 * math.sqrt(4000 * chance * (1 - chance))


@given(
    actions=st.lists(st.lists(ENTROPY, min_size=1, max_size=5), min_size=2, max_size=6),
    size=st.integers(2, 16),
    beta=st.sampled_from([0.5, 2.0]),
    official=st.booleans(),
)
def test_the_split_between_fresh_episodes_and_forks(actions, size, beta, official):
    options = {"dynamic": True, "monitor_root": True, "monitor_rounding": "up"} if official else {"scale": "log_vocab"}
    made = recipe("aepo", "official" if official else None, monitor_beta=beta, **options)
    values = [arpo.statistic(action, "log_vocab", VOCABULARY) for action in actions]
    later = float(np.mean(values if official else values[1:]))
    group = made.branching.group(0, size, 7, VOCABULARY)
    assert group.probing
    group.probed([np.float32(action) for action in actions])
    # Halves may go to either side.
    near = {later - 1e-9, later, later + 1e-9}
    split = aepo.official_fresh_rollouts if official else aepo.rounded_fresh_rollouts
    assert group.initial in {split(size, values[0], tool, beta) for tool in near}

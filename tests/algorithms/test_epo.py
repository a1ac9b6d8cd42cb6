"""EPO: penalty, gradient, schedule and memory, with the golden tables of arXiv 2509.22576 v2 and of its code."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.slots.controller import official_phase_weight, phase_weight
from agentropy.errors import UsageError

FLAT = {"entropy_coef": 1.0, "alpha": 1.0, "beta": "constant", "agg": "token-sum"}
"""Options that leave the bare penalty and the bare entropy in the loss."""


def remembering(history, /, step=1, **options):
    """EPO that has already seen ``history``: numbers, or vectors over turns."""
    epo = recipe("epo", **options)
    entries = [list(entry) if isinstance(entry, list) else [entry] for entry in history]
    memory = {"history": entries, "pending": [[], []]}
    epo.load_state_dict({"step": step, "controllers": {"entropy_history": memory}})
    return epo


def row(entropy, turn=None):
    """One trajectory with a token per entropy, and return 0, so that the policy loss is 0."""
    values = torch.tensor([entropy], dtype=torch.float64)
    return Minibatch(
        mask=torch.ones_like(values).bool(),
        turn=torch.tensor([turn]) if turn else None,
        old_logprobs=torch.zeros_like(values),
        old_entropy=values,
        returns=torch.zeros(1),
    )


def penalty(epo, batch):
    """P of each token."""
    term, corridor = epo.plan(batch).terms["corridor"], epo.slots.regularisers[1]
    return corridor.value(batch, term, batch.old_logprobs, batch.old_entropy)[0].tolist()


def reference(epo, batch):
    """The reference that each token is compared with, NaN where there is none."""
    terms = epo.plan(batch).terms["corridor"]
    known = terms.coefficient != 0
    return torch.where(known, terms.inputs["high"] / epo.methods["epo"].kappa_high, math.nan)[0].tolist()


def test_hinge_and_indicator_golden():
    """Reference .6, corridor .5 to 1.5 of it: the hinge's band is closed, the indicator's open."""
    batch = row([0.1, 0.4, 0.9, 1.3])
    options = {**FLAT, "kappa_low": 0.5, "kappa_high": 1.5}
    assert penalty(remembering([0.6], **options), batch) == pytest.approx([0.2, 0, 0, 0.4], abs=1e-12)
    assert penalty(remembering([0.5], **options), row([0.1, 0.25, 0.75, 1.3]))[1:3] == [0, 0]
    indicator = remembering([0.5], penalty="indicator", **options)
    assert penalty(indicator, row([0.1, 0.3, 0.75, 1.3])) == [1, 0, 1, 1]
    assert indicator.plan(row([0.1, 0.3, 0.75, 1.3])).selected["corridor"].tolist() == [[True, False, True, True]]


@given(
    entropy=st.lists(st.floats(0, 5), min_size=1, max_size=8),
    mean=st.floats(0.05, 2),
    low=st.floats(0, 1),
    high=st.floats(1, 3),
)
def test_the_penalty_is_zero_inside_the_corridor_and_the_distance_outside(entropy, mean, low, high):
    epo = remembering([mean], kappa_low=low, kappa_high=high)
    expected = [max(low * mean - h, 0) + max(h - high * mean, 0) for h in entropy]
    assert penalty(epo, row(entropy)) == pytest.approx(expected, abs=1e-12)


def test_the_first_step_has_no_penalty():
    epo, batch = recipe("epo", kappa_high=0.0), row([5.0, 7.0])
    _, metrics = epo.loss(batch, epo.plan(batch), batch.old_logprobs, batch.old_entropy)
    assert metrics["corridor_loss"] == 0 and metrics["entropy_loss"].item() == pytest.approx(-0.006)


@pytest.mark.parametrize(
    ("alpha", "gradients"), [(0.1, (-0.00115, -0.001, -0.00085)), (1.0, (-0.0025, -0.001, 0.0005))]
)
def test_gradient_golden(alpha, gradients):
    """dL/dH is -λ(1 + αβ) below, -λ inside and -λ(1 - αβ) above; β 1.5, reference .6, corridor .5 to 1.5."""
    epo = remembering([0.6], step=1, total_steps=2, gamma=math.log(2), alpha=alpha, kappa_low=0.5, kappa_high=1.5)
    batch = row([0.1, 0.6, 1.5])
    plan = epo.plan(batch)
    assert plan.metrics["epo/beta"] == pytest.approx(1.5)
    entropy = batch.old_entropy.clone().requires_grad_()
    epo.loss(batch, plan, batch.old_logprobs, entropy)[0].backward()
    assert (3 * entropy.grad[0]).tolist() == pytest.approx(gradients, abs=1e-12)


@pytest.mark.parametrize(
    ("total", "table"),
    [
        (150, {0: 2.0, 1: 1.960789, 37: 1.227638, 75: 1.049787, 100: 1.018316, 150: 1.002479}),
        (125, {0: 2.0, 31: 1.223130, 62: 1.049787, 125: 1.002362}),
    ],
)
def test_phase_weight_golden(total, table):
    for step, beta in table.items():
        assert phase_weight(step, total, 3.0) == pytest.approx(beta, abs=1e-6)
        metrics = remembering([], step=step, total_steps=total).plan(row([1.0])).metrics
        assert metrics["epo/beta"] == pytest.approx(beta, abs=1e-6)
    values = [phase_weight(step, total, 3.0) for step in range(total)]
    assert all(a > b > 1 for a, b in pairwise(values))


def test_official_phase_weight_golden_with_its_jump():
    table = {0: 1, 1: 0.994737, 37: 0.874563, 75: 0.827067, 76: 0.768632, 100: 0.294304}
    table |= {112: 0.182110, 125: 0.108268, 150: 0.039830}
    for step, beta in table.items():
        assert official_phase_weight(step) == pytest.approx(beta, abs=1e-6)


def test_the_reference_is_the_mean_of_all_earlier_steps():
    epo = remembering([1.0, 3.0], step=2)
    assert reference(epo, row([5.0, 5.0])) == [2, 2]
    epo.on_step_end({})
    assert reference(epo, row([9.0, 9.0])) == [3, 3]
    long = remembering([1.0] * 99, step=99)
    long.plan(row([2.0]))
    long.on_step_end({})
    assert reference(long, row([0.0])) == pytest.approx([1.01])


def test_append_before_includes_the_batch_itself():
    assert reference(remembering([1.0], append="before"), row([2.0])) == [1.5]


def test_the_reference_is_the_token_mean_over_all_batches_of_a_step():
    epo = recipe("epo")
    epo.plan(row([1.0]))
    epo.plan(row([4.0, 4.0]))
    epo.on_step_end({})
    assert reference(epo, row([0.0])) == [3]


def test_a_step_without_a_batch_is_counted_and_not_remembered():
    epo = remembering([0.5], step=4)
    epo.on_step_end({})
    assert epo.state_dict() == {
        "step": 5,
        "controllers": {"entropy_history": {"history": [[0.5]], "pending": [[], []]}},
    }


def test_per_turn_references_ignore_turns_that_nobody_reached():
    epo = remembering([[0.8, 0.6, 0.4], [0.6, 0.4]], reference="per_turn")
    assert reference(epo, row([0.1] * 5, turn=[0, 1, 1, 2, 3])) == pytest.approx(
        [0.7, 0.5, 0.5, 0.4, math.nan], nan_ok=True
    )
    epo = recipe("epo", reference="per_turn")
    epo.plan(row([1.0, 3.0, 5.0], turn=[0, 0, 2]))
    epo.on_step_end({})
    history = epo.state_dict()["controllers"]["entropy_history"]["history"]
    assert history == [[2.0, pytest.approx(math.nan, nan_ok=True), 5.0]]


def test_official_references_count_missing_turns_as_zero_from_the_left():
    assert reference(
        remembering([[0.8, 0.6, 0.4], [0.6, 0.4, 0.0]], reference="per_turn"), row([0.1] * 3, turn=[0, 1, 2])
    ) == pytest.approx([0.7, 0.5, 0.2])
    epo = recipe("epo", reference="per_turn", pad_turns=True, max_turns=4)
    epo.plan(row([1.0, 2.0], turn=[0, 1]))
    epo.on_step_end({})
    assert epo.state_dict()["controllers"]["entropy_history"]["history"] == [[0, 0, 1, 2]]


def test_the_official_gate_opens_when_a_row_reaches_half_the_turns():
    epo = remembering([[0.1] * 50], penalty="indicator", reference="per_turn", gate_turn="half")
    assert not epo.plan(row([9.0, 9.0], turn=[0, 24])).selected["corridor"].any()
    assert epo.plan(row([9.0, 9.0], turn=[0, 25])).selected["corridor"].all()


def test_rows_move_with_their_turns():
    """With one reference per turn, permuting rows changes nothing and permuting turns alone does."""
    epo = remembering([[0.2, 1.0, 3.0]], reference="per_turn", alpha=1.0, entropy_coef=1.0)
    entropy = torch.tensor([[0.3], [1.2], [2.0]], dtype=torch.float64)

    def loss(turns, order):
        batch = Minibatch(
            mask=torch.ones(3, 1).bool(),
            turn=torch.tensor(turns)[:, None],
            returns=torch.zeros(3),
            old_logprobs=torch.zeros(3, 1, dtype=torch.float64),
            old_entropy=entropy,
        ).select(order)
        return epo.loss(batch, epo.plan(batch), batch.old_logprobs, batch.old_entropy)[0].item()

    assert loss([0, 1, 2], [2, 0, 1]) == pytest.approx(loss([0, 1, 2], [0, 1, 2]), abs=1e-15)
    assert loss([1, 0, 2], [0, 1, 2]) != pytest.approx(loss([0, 1, 2], [0, 1, 2]), abs=1e-3)


KINDS = ("cumulative", "window", "ema")


@pytest.mark.parametrize(
    ("options", "after", "before"),
    [
        ({}, 3.0, 3.5),
        ({"history": "window", "history_window": 2}, 4.0, 4.5),
        ({"history": "window", "history_window": 1}, 4.0, 5.0),
        ({"history": "window", "history_window": 9}, 3.0, 3.5),
        ({"history": "ema", "history_decay": 0.75}, 2.3125, 2.984375),
        ({"history": "ema", "history_decay": 0.0}, 4.0, 5.0),
    ],
)
def test_a_history_is_of_all_steps_of_the_last_ones_or_fades(options, after, before):
    """Earlier steps 1, 4 and 4 and a batch of 5, which joins the reference after its update or before it.

    With decay 3/4 the reference is 1, then 1.75, then 2.3125, then 2.984375.
    """
    assert reference(remembering([1.0, 4.0, 4.0], **options), row([5.0])) == [after]
    assert reference(remembering([1.0, 4.0, 4.0], append="before", **options), row([5.0])) == [before]


@pytest.mark.parametrize("kind", KINDS)
def test_every_history_begins_with_the_first_step_and_then_takes_the_next(kind):
    epo = recipe("epo", history=kind, history_window=1, history_decay=0.5)
    assert epo.plan(row([2.0])).terms["corridor"].coefficient.eq(0).all()
    epo.on_step_end({})
    assert reference(epo, row([4.0])) == [2]
    epo.on_step_end({})
    assert reference(epo, row([0.0])) == [{"cumulative": 3, "window": 4, "ema": 3}[kind]]


@given(
    history=st.lists(st.floats(0.0, 4.0), min_size=1, max_size=15),
    window=st.integers(1, 20),
    decay=st.floats(0.0, 0.99),
)
def test_histories_equal_plain_loops(history, window, decay):
    fading = history[0]
    for value in history[1:]:
        fading = decay * fading + (1 - decay) * value
    for kind, expected in [("window", np.mean(history[-window:])), ("ema", fading)]:
        epo = remembering(history, history=kind, history_window=window, history_decay=decay)
        assert reference(epo, row([0.5])) == pytest.approx([expected], abs=1e-12)


def test_histories_per_turn_treat_each_turn_by_itself():
    """Nobody reached turn 1 in the second step nor turn 2 after the first one.

    A window forgets a turn that its steps did not reach; what fades keeps the turn's old value.
    """
    history = [[1.0, 2.0, 3.0], [2.0, math.nan], [4.0, 6.0]]
    batch = row([0.1] * 4, turn=[0, 1, 2, 3])

    def references(**options):
        return reference(remembering(history, reference="per_turn", **options), batch)

    assert references() == pytest.approx([7 / 3, 4, 3, math.nan], nan_ok=True)
    assert references(history="window", history_window=2) == pytest.approx([3, 6, math.nan, math.nan], nan_ok=True)
    assert references(history="ema", history_decay=0.5) == pytest.approx([2.75, 4, 3, math.nan], nan_ok=True)
    late = remembering([[1.0], [2.0, 5.0], [2.0, 7.0]], reference="per_turn", history="ema", history_decay=0.5)
    assert reference(late, batch)[1] == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference_of", ["scalar", "per_turn"])
@pytest.mark.parametrize("append", ["after", "before"])
def test_every_history_survives_a_checkpoint_between_and_within_steps(ragged, kind, reference_of, append):
    def made():
        options = {"history": kind, "history_window": 2, "history_decay": 0.7, "append": append}
        return recipe("epo", "corridor", total_steps=9, reference=reference_of, entropy_coef=1.0, **options)

    kept, resumed = made(), made()
    for seed in range(4):
        kept.plan(ragged(seed)[0])
        if seed < 3:
            kept.on_step_end({})
    resumed.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    for epo in (kept, resumed):
        epo.on_step_end({})
    batch, logprobs, entropy = ragged(9)
    losses = [epo.loss(batch, epo.plan(batch), logprobs, entropy)[0] for epo in (kept, resumed, made())]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_histories_out_of_range_are_refused():
    for options in ({"history_window": 0}, {"history_decay": 1.0}, {"history": "windows"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            recipe("epo", **options)


@pytest.mark.parametrize("preset", ["paper", "corridor", "official"])
def test_memory_survives_a_checkpoint_exactly(ragged, preset):
    first, second = ragged(0)[0], ragged(1)
    batch, logprobs, entropy = second

    def made():
        return recipe("epo", preset, total_steps=10, gate_turn="none", kappa_high=1.0)

    kept, resumed, fresh = made(), made(), made()
    kept.plan(first)
    kept.on_step_end({})
    resumed.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    losses = [epo.loss(batch, epo.plan(batch), logprobs, entropy)[0] for epo in (kept, resumed, fresh)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def descend(epo, start, steps=120, rate=4.0):
    """Entropies along gradient descent on the logit of a two-way choice with zero advantage."""
    logit = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    path = []
    for _ in range(steps):
        logprobs = torch.stack((logit, torch.zeros_like(logit))).log_softmax(0)
        entropy = -(logprobs.exp() * logprobs).sum()
        path.append(entropy.item())
        batch = row([entropy.item()])
        loss, _ = epo.loss(batch, epo.plan(batch), logprobs[:1, None], entropy[None, None])
        (gradient,) = torch.autograd.grad(loss, logit)
        logit = (logit - rate * gradient).detach().requires_grad_()
    return path


def test_the_bonus_alone_raises_entropy_and_a_strong_corridor_stops_it_at_its_edge():
    """The published α leaves the push above the corridor upwards; α β > 1 turns it round."""
    strong = {"alpha": 2.0, "beta": "constant", "entropy_coef": 0.05, "kappa_low": 0.5, "kappa_high": 1.5}
    rising = descend(remembering([0.3], **strong | {"alpha": 0.0}), 3.0)
    assert all(a < b for a, b in pairwise(rising[:51])) and rising[-1] > 0.6
    falling = descend(remembering([0.3], **strong), 0.5)
    assert falling[0] > 0.6 and all(a > b for a, b in pairwise(falling[:6]))
    assert falling[-1] == pytest.approx(0.45, abs=0.02)
    assert descend(remembering([0.3], **strong), 3.0)[-1] == pytest.approx(0.45, abs=0.02)
    assert descend(remembering([0.3], **strong | {"alpha": 0.1}), 0.5)[-1] > 0.68


@given(seed=st.integers(0, 2**32 - 1), window=st.booleans(), corridor=st.booleans())
def test_loss_equals_a_plain_reference(ragged, seed, window, corridor):
    batch, logprobs, entropy = ragged(seed, window=window)
    epo = remembering([0.3, 0.5], step=7, preset="corridor" if corridor else "paper", total_steps=20, entropy_coef=0.3)
    loss, _ = epo.loss(batch, epo.plan(batch), logprobs, entropy)
    base = recipe("grpo")
    expected, _ = base.loss(batch, base.plan(batch), logprobs, entropy)
    alpha, low, high = (2.0, 0.5, 1.5) if corridor else (0.1, 0.0, 2.0)
    beta = 1 + math.exp(-3 * 7 / 10)

    def smooth(h):
        return alpha * (max(low * 0.4 - h, 0) + max(h - high * 0.4, 0))

    per_trajectory = []
    for name in batch.trajectory.unique().tolist():
        turns: dict[int, list[float]] = {}
        for r, t in (batch.mask & (batch.trajectory == name)[:, None]).nonzero().tolist():
            turns.setdefault(int(batch.turn[r, t]), []).append(float(entropy[r, t]))
        if turns:
            per_trajectory.append(np.mean([np.mean([h - beta * smooth(h) for h in turn]) for turn in turns.values()]))
    assert loss.item() == pytest.approx(expected.item() - 0.3 * np.mean(per_trajectory), rel=1e-10, abs=1e-9)


def test_presets_hold_the_published_values():
    paper = recipe("epo", preset="paper").methods["epo"]
    assert paper == recipe("epo").methods["epo"]
    assert (paper.entropy_coef, paper.alpha, paper.kappa_low, paper.kappa_high, paper.gamma) == (
        0.001,
        0.1,
        0,
        2,
        3,
    )
    assert (paper.penalty, paper.reference, paper.append, paper.beta, paper.agg) == (
        "hinge",
        "scalar",
        "after",
        "paper",
        "turn-mean",
    )
    corridor = recipe("epo", preset="corridor", total_steps=50)
    assert all(corridor.methods["epo"].alpha * phase_weight(step, 50, 3.0) > 1 for step in range(51))
    official = recipe("epo", preset="official").methods["epo"]
    assert (
        official.penalty,
        official.reference,
        official.append,
        official.beta,
        official.gate_turn,
        official.agg,
    ) == ("indicator", "per_turn", "before", "official", "half", "token-mean")

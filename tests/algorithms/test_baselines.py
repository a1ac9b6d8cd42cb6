"""The GRPO family: Dr. GRPO, RLOO, DAPO and GSPO, and the slots that they brought.

Golden numbers were computed in float64 from the formulas of the papers and of verl's ``core_algos`` and
``rollout_corr_helper``, where no other source is named.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.slots import use
from agentropy.errors import UsageError

SEEDS = st.integers(0, 2**32 - 1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def rows(returns, **fields):
    """A batch of one group whose rows have one token."""
    fields.setdefault("mask", torch.ones(len(returns), 1).bool())
    fields.setdefault("old_logprobs", torch.zeros(fields["mask"].shape, dtype=torch.float64))
    return Minibatch(returns=torch.tensor(returns, dtype=torch.float64), **fields)


def advantages(name, returns, *, plan_of=rows, **options):
    return recipe(name, **options).plan(plan_of(returns)).advantages[:, 0].tolist()


def apply_clip(name, log_ratios, advantage, *, mask=None, **options):
    """Loss, gradient with respect to the log-probabilities, and the clipped tokens of one row."""
    logprobs = tensor(*log_ratios)[None].requires_grad_()
    mask = torch.ones_like(logprobs).bool() if mask is None else torch.tensor([mask]).bool()
    level = torch.full_like(logprobs, float(advantage)).detach()
    loss, clipped = use("clip", name, **options)(logprobs, torch.zeros_like(level), level, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.detach()[0], gradient[0], clipped[0]


def test_leave_one_out_golden():
    for values, expected in [
        ((1, 0, 0, 1), [0.666667, -0.666667, -0.666667, 0.666667]),
        ((2, 0, 1, -1), [2, -0.666667, 0.666667, -2]),
    ]:
        found = use("baseline", "leave_one_out")(tensor(*values), torch.zeros(4).long(), torch.ones(4))
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=12), data=st.data())
def test_leave_one_out_is_the_value_minus_the_mean_of_the_others(values, data):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    found = use("baseline", "leave_one_out")(tensor(*values), torch.tensor(groups), torch.ones(len(values)))
    for index, value in enumerate(values):
        others = [v for j, v in enumerate(values) if groups[j] == groups[index] and j != index]
        expected = value - np.mean(others) if others else 0
        assert found[index].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("values", [[0.7], [0.1] * 3, [1 / 3] * 7, [-1e8] * 5])
def test_leave_one_out_of_equal_values_and_of_one_is_exactly_zero(values):
    size = len(values)
    found = use("baseline", "leave_one_out")(tensor(*values), torch.zeros(size).long(), torch.ones(size))
    assert found.tolist() == [0.0] * size


@pytest.mark.parametrize("name", ["group", "leave_one_out"])
def test_a_value_that_counts_several_times_is_like_several_equal_values(name):
    count, group = torch.tensor([1, 3, 2, 1]), torch.tensor([0, 0, 0, 1])
    values = tensor(1.0, 0.0, 0.25, 4.0)
    found = use("baseline", name)(values, group, count)
    longer = [tensor_.repeat_interleave(count) for tensor_ in (values, group)]
    repeated = use("baseline", name)(*longer, torch.ones(7))
    torch.testing.assert_close(found.repeat_interleave(count), repeated, rtol=1e-14, atol=1e-14)


def test_leave_one_out_over_turns_is_verl_agents():
    """One trajectory of one turn earns 1 and one of three turns 0: n / (n - 1) (s - mean) over four rows."""
    found = use("baseline", "leave_one_out")(tensor(1, 0), torch.zeros(2).long(), torch.tensor([1, 3]))
    assert found.tolist() == pytest.approx([1, -1 / 3], abs=1e-12)


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "dapo", "gspo"])
def test_equal_returns_give_exactly_zero_and_no_gradient(ragged, name):
    batch, logprobs, entropy = ragged(2)
    batch = batch.replace(returns=torch.full_like(batch.returns, 0.1))
    made, logprobs = recipe(name), logprobs.requires_grad_()
    plan = made.plan(batch)
    loss, _ = made.loss(batch, plan, logprobs, entropy)
    loss.backward()
    assert loss == 0 and not plan.advantages.any() and not logprobs.grad.any()


@pytest.mark.parametrize(("name", "own"), [("dr_grpo", 0.7), ("gspo", 0.7), ("rloo", 0.0)])
def test_the_only_episode_of_a_group(name, own):
    """GRPO's convention is mean 0 and standard deviation 1; without others RLOO has no baseline and learns nothing."""
    assert advantages(name, [0.7]) == [own]


@pytest.mark.parametrize("name", ["ppo", "none", "gradient_preserving", "sequence"])
@given(seed=SEEDS)
def test_on_policy_no_clip_acts(ragged, name, seed):
    batch, *_ = ragged(seed)
    level = torch.where(batch.mask, torch.sin(batch.old_logprobs * 40), 0)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    loss, clipped = use("clip", name)(logprobs, batch.old_logprobs, level, batch.mask)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.equal(gradient, -level) and not clipped.any()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize("name", ["ppo", "none", "gradient_preserving", "sequence"])
def test_a_clip_is_blind_to_what_is_masked(ragged, name, junk):
    batch, logprobs, _ = ragged(4)
    level = torch.where(batch.mask, torch.sin(batch.old_logprobs * 40), 0)
    results = []
    for fill in (0.0, junk):
        current, old = (torch.where(batch.mask, t, fill) for t in (logprobs, batch.old_logprobs))
        current.requires_grad_()
        loss, clipped = use("clip", name)(current, old, level, batch.mask)
        (gradient,) = torch.autograd.grad(loss.sum(), current)
        assert loss.isfinite().all() and not gradient[~batch.mask].any() and not clipped[~batch.mask].any()
        results.append((loss.detach(), gradient, clipped))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", {}),
        ("ppo", {"dual": None}),
        ("none", {}),
        ("gradient_preserving", {}),
        ("gradient_preserving", {"both_sides": True, "dual": None}),
        ("sequence", {"low": 0.2, "high": 0.2}),
    ],
)
@given(log_ratios=st.lists(st.floats(-3, 3), min_size=1, max_size=5), advantage=st.sampled_from([-1.5, 0.0, 0.5]))
def test_clipped_names_the_tokens_whose_gradient_is_not_the_plain_one(name, options, log_ratios, advantage):
    _, gradient, clipped = apply_clip(name, log_ratios, advantage, **options)
    ratio = tensor(*log_ratios).exp()
    if name == "sequence":
        ratio = tensor(*log_ratios).mean().exp().expand_as(ratio)
    plain = -advantage * ratio
    assert clipped.tolist() == ((gradient - plain).abs() > 1e-9).tolist()


def test_without_a_clip_the_loss_is_the_importance_weighted_one():
    loss, gradient, clipped = apply_clip("none", [math.log(r) for r in (0.01, 1.0, 50.0)], -2.0)
    assert loss.tolist() == pytest.approx([0.02, 2, 100]) and gradient.tolist() == pytest.approx([0.02, 2, 100])
    assert not clipped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "ppo_gradient"),
    [
        (0.5, 1, -0.5, -0.5, -0.5),
        (1.1, 1, -1.1, -1.1, -1.1),
        (1.5, 1, -1.2, -1.2, 0),
        (4.0, 1, -1.2, -1.2, 0),
        (0.5, -1, 0.8, 0, 0),
        (1.5, -1, 1.5, 1.5, 1.5),
        (4.0, -1, 3.0, 0, 0),
    ],
)
def test_gradient_preserving_golden(ratio, advantage, loss, gradient, ppo_gradient):
    """AEPO's bound (2510.14545): PPO's values, and 1 + high as gradient where PPO has clipped a good action."""
    for name, expected in {"gradient_preserving": gradient, "ppo": ppo_gradient}.items():
        value, slope, _ = apply_clip(name, [math.log(ratio)], advantage)
        assert value.item() == pytest.approx(loss, abs=1e-12)
        assert slope.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("dual", [3.0, None])
@given(log_ratio=st.floats(-3, 3), advantage=st.floats(-2, 2))
def test_gradient_preserving_differs_from_ppo_only_in_the_gradient_of_clipped_tokens(
    both_sides, dual, log_ratio, advantage
):
    options = {"low": 0.1, "high": 0.28, "dual": dual}
    value, slope, clipped = apply_clip("gradient_preserving", [log_ratio], advantage, both_sides=both_sides, **options)
    ppo_value, ppo_slope, ppo_clipped = apply_clip("ppo", [log_ratio], advantage, **options)
    assert torch.equal(value, ppo_value) and torch.equal(clipped, ppo_clipped)
    ratio = tensor(log_ratio).exp().item()
    expected = ppo_slope.item()
    if advantage > 0 and ratio > 1.28:
        expected = -advantage * 1.28
    elif both_sides and advantage < 0 and ratio < 0.9:
        expected = -advantage * 0.9
    assert slope.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_gradient_preserving_goes_on_where_ppo_stops():
    """A second update on the same good token: PPO leaves it where it is, AEPO raises it further."""
    ends = {}
    for name in ("ppo", "gradient_preserving"):
        logprob = math.log(1.3)
        _, gradient, _ = apply_clip(name, [logprob], 1.0)
        ends[name] = logprob - 0.1 * gradient.item()
    assert ends["ppo"] == math.log(1.3) and ends["gradient_preserving"] == pytest.approx(math.log(1.3) + 0.12)


def test_sequence_golden():
    """The geometric mean of a row's ratios; the second numbers are those of a clip of single tokens."""
    for advantage, loss in {1: -1.0004, -1: 1.013423}.items():
        value, *_ = apply_clip("sequence", [0.02, -0.01, 0.03], advantage)
        assert value.tolist() == pytest.approx([loss] * 3, abs=1e-6)
    uneven = [3, -3, 0.6]
    plain, *_ = apply_clip("sequence", uneven, 1, low=0.2, high=1.0)
    assert plain.tolist() == pytest.approx([-1.221403] * 3, abs=1e-6)
    value, *_ = apply_clip("sequence", uneven, 1, low=0.2, high=0.2)
    assert value.tolist() == pytest.approx([-1.2] * 3, abs=1e-12)
    by_token, *_ = apply_clip("ppo", uneven, 1)
    assert by_token.mean().item() == pytest.approx(-0.816596, abs=1e-6)


def test_opposite_extremes_in_a_sequence_cancel():
    """Log-ratios of 100 and -100 must neither overflow nor be clamped one by one (OpenRLHF, issue 1293)."""
    loss, gradient, clipped = apply_clip("sequence", [100.0, -100.0], 1)
    assert loss.tolist() == [-1, -1] and gradient.tolist() == [-1, -1] and not clipped.any()
    _, gradient, clipped = apply_clip("sequence", [100.0, -60.0, -40.0], -1)
    assert gradient.tolist() == [1, 1, 1] and not clipped.any()


def test_tokens_far_outside_the_band_are_clipped_by_ppo_and_not_by_the_sequence():
    spread = [2.0, -2.0, 1.0, -1.0]
    assert not apply_clip("sequence", spread, 1)[2].any()
    assert apply_clip("ppo", spread, 1)[2].tolist() == [True, False, True, False]


def test_a_masked_token_is_no_part_of_the_sequence():
    for log_ratio in (0.0, 7.0, math.nan, math.inf):
        loss, gradient, _ = apply_clip("sequence", [0.02, log_ratio, 0.03], -1, mask=[1, 0, 1])
        assert loss[0].item() == pytest.approx(math.exp(0.025), abs=1e-12)
        assert gradient.tolist() == pytest.approx([math.exp(0.025), 0, math.exp(0.025)], abs=1e-12)
    assert apply_clip("sequence", [0.02, 7.0, 0.03], 1, mask=[1, 0, 1])[2].tolist() == [True, False, True]
    loss, gradient, clipped = apply_clip("sequence", [5.0, -7.0], -1, mask=[0, 0])
    assert loss.isfinite().all() and not gradient.any() and not clipped.any()


def test_the_sequences_ratio_is_bounded_at_e_to_the_ten():
    loss, gradient, clipped = apply_clip("sequence", [30.0, 0.0], -1)
    assert loss.tolist() == pytest.approx([math.exp(10)] * 2) and not gradient.any() and clipped.all()


@given(log_ratios=st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=6), advantage=st.sampled_from([-2.0, 1.0]))
def test_the_token_form_has_the_gradient_of_the_papers_sequence_form(log_ratios, advantage):
    """With one advantage per sequence, the mean over tokens equals max(-A s, -A clip(s)) of GSPO's Eq. 5."""
    loss, gradient, _ = apply_clip("sequence", log_ratios, advantage, low=0.1, high=0.15)
    logprobs = tensor(*log_ratios).requires_grad_()
    ratio = logprobs.mean().exp()
    whole = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.15))
    (expected,) = torch.autograd.grad(whole, logprobs)
    assert loss.mean().item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradient / len(log_ratios), expected, rtol=1e-12, atol=1e-15)


def test_overlong_golden():
    """DAPO's fine for a limit of 20480 tokens with a buffer of 4096."""
    lengths = torch.tensor([16000, 16384, 18432, 20480, 30000])
    mask = torch.arange(30000)[None] < lengths[:, None]
    fine = use("reward", "overlong", length=20480, buffer=4096)
    assert fine(Minibatch(mask=mask)).tolist() == [0, 0, -0.5, -1, -1]
    double = use("reward", "overlong", length=20480, buffer=4096, factor=2.0)
    assert double(Minibatch(mask=mask)).tolist() == [0, 0, -1, -2, -2]


def test_the_fine_counts_the_trained_tokens_of_all_rows_of_a_trajectory():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 1]]).bool()
    batch = Minibatch(mask=mask, trajectory=torch.tensor([5, 5, 2]), returns=torch.tensor([1.0, 1.0, 0.0]))
    assert use("reward", "overlong", length=4, buffer=2)(batch).tolist() == [-0.5, -0.5, -0.5]
    assert use("reward", "overlong", length=4, buffer=1)(batch).tolist() == [0, 0, 0]


def test_kl_penalty_charges_each_token_and_the_return_pays_the_sum():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0]]).bool()
    old, reference = tensor([-1, -2, math.nan], [0, -0.5, 0], [-1, 0, 0]), tensor([-2, -1.5, 0], [0, -1, 9], [-1, 0, 0])
    fields = {"mask": mask, "old_logprobs": old, "ref_logprobs": reference, "trajectory": torch.tensor([0, 0, 1])}
    batch = rows([1.0, 1.0, 0.0], **fields)
    paid = use("reward", "kl_penalty", coefficient=0.1)(batch)
    assert paid[mask].tolist() == pytest.approx([-0.1, 0.05, -0.05, 0]) and not paid[~mask].any()
    # Trajectory 0 earns 1 - 0.1 and trajectory 1 nothing, so each is 0.9 away from the other.
    found = recipe("rloo", kl_reward_coef=0.1).plan(batch).advantages
    assert found[mask].tolist() == pytest.approx([0.9, 0.9, 0.9, -0.9])


def test_the_filter_keeps_groups_whose_trajectories_differ():
    keep = use("sampler", "group_filter").keep
    batch = rows([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.3], group=torch.tensor([7, 7, 2, 2, 4, 4, 9]))
    assert keep(batch).tolist() == [False, False, False, False, True, True, False]


def test_the_filter_compares_trajectories_and_not_rows(ragged):
    batch, *_ = ragged(8, window=True)
    keep = use("sampler", "group_filter").keep(batch)
    for group in batch.group.unique():
        inside = batch.group == group
        outcomes = {(int(t), float(r)) for t, r in zip(batch.trajectory[inside], batch.returns[inside], strict=True)}
        assert keep[inside].tolist() == [len({outcome for _, outcome in outcomes}) > 1] * int(inside.sum())
    # One trajectory in two rows has nothing to be compared with.
    alone = rows([1.0, 1.0], trajectory=torch.tensor([3, 3]))
    assert not use("sampler", "group_filter").keep(alone).any()


def correct(batch, **options):
    return use("weight", "rollout_correction", **options)(batch, torch.zeros_like(batch.old_logprobs))


def mismatched(*log_weights, **fields):
    """A batch whose learner and sampler differ by these log-weights, one list per row."""
    old = tensor(*log_weights)
    return Minibatch(
        mask=fields.pop("mask", torch.ones(old.shape).bool()),
        old_logprobs=old - 1,
        rollout_logprobs=torch.full_like(old, -1.0),
        **fields,
    )


def test_truncated_importance_sampling_golden():
    batch = mismatched([0.5, -0.2, 1.2])
    weight, keep = correct(batch)
    assert weight[0].tolist() == pytest.approx([1.648721, 0.818731, 2.0], abs=1e-6) and keep.all()
    weight, _ = correct(batch, level="sequence")
    assert weight[0].tolist() == [2, 2, 2]
    weight, _ = correct(batch, level="sequence", cap=5.0)
    assert weight[0].tolist() == pytest.approx([math.exp(1.5)] * 3)


def test_a_band_zeroes_weights_outside_and_masking_removes_their_tokens():
    batch = mismatched([0.5, -2.0, 1.2])
    weight, keep = correct(batch, band=(0.5, 2.0))
    assert weight[0].tolist() == pytest.approx([1.648721, 0, 0], abs=1e-6) and keep.all()
    weight, keep = correct(batch, band=[0.5, 2.0], mode="mask")
    assert keep[0].tolist() == [True, False, False] and weight[keep].item() == pytest.approx(1.648721, abs=1e-6)
    weight, keep = correct(batch, mode="mask")
    assert keep[0].tolist() == [True, True, False] and weight[0, 1].item() == pytest.approx(math.exp(-2))


def test_masking_whole_trajectories_and_single_tokens():
    """Two tokens at 0.5 each: within a cap of 2 alone, beyond it together."""
    batch = mismatched([0.5, 0.5], [-0.1, 0.3], trajectory=torch.tensor([4, 1]))
    assert correct(batch, mode="mask")[1].all()
    assert correct(batch, mode="mask", level="sequence")[1].tolist() == [[False, False], [True, True]]


def test_rows_of_one_trajectory_share_its_sequence_weight():
    mask = torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()
    batch = mismatched([0.3, 9.0], [9.0, -0.1], [0.1, 0.2], mask=mask, trajectory=torch.tensor([6, 6, 2]))
    weight, _ = correct(batch, level="sequence")
    assert weight[mask].tolist() == pytest.approx([math.exp(0.2), math.exp(0.2), math.exp(0.3), math.exp(0.3)])


def test_weights_are_finite_however_far_apart_the_policies_are():
    batch = mismatched([1e4, -1e4, math.inf])
    weight, _ = correct(batch, cap=1e12)
    assert weight[0].tolist() == pytest.approx([math.exp(20), math.exp(-20), math.exp(20)])
    # 300 tokens at 0.7 each underflow single precision as a product; the clamp keeps the weight above 0.
    long = mismatched([math.log(0.7)] * 300)
    assert correct(long, level="sequence")[0][0, 0].item() == pytest.approx(math.exp(-20))


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("band", [None, (0.6, 1.5)])
def test_normalised_weights_have_mean_one(ragged, mode, band):
    for window in (False, True):
        batch, *_ = ragged(6, window=window)
        weight, keep = correct(batch, normalize=True, mode=mode, band=band)
        assert weight[keep].mean().item() == pytest.approx(1, rel=1e-12)
        weight, keep = correct(batch, normalize=True, mode=mode, band=band, level="sequence")
        each = {int(batch.trajectory[row]): weight[row, column].item() for row, column in keep.nonzero().tolist()}
        assert np.mean(list(each.values())) == pytest.approx(1, rel=1e-12)
    nothing = mismatched([5.0])
    assert correct(nothing, normalize=True, band=(0.5, 2.0))[0].tolist() == [[0]]


def test_without_the_samplers_probabilities_every_weight_is_one(ragged):
    batch, *_ = ragged(1)
    for level in ("token", "sequence"):
        weight, keep = correct(batch.replace(rollout_logprobs=None), level=level)
        assert (weight == 1).all() and torch.equal(keep, batch.mask)


def test_a_zero_weight_stays_in_the_denominator_and_a_masked_token_leaves_it():
    fields = {"returns": tensor(1, 0), "group": torch.zeros(2).long()}
    batch = mismatched([0.0, 1.2], [0.0, 0.0], **fields)
    shares = {}
    for mode in ("truncate", "mask"):
        tables = [{"type": "rollout_correction", "mode": mode, "band": [0.5, 2.0]}]
        plan = recipe("grpo", slots={"weights": tables}).plan(batch)
        shares[mode] = plan.coefficients.flatten().tolist()
    assert shares["truncate"] == pytest.approx([1 / 4, 0, 1 / 4, 1 / 4])
    assert shares["mask"] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_a_token_in_several_rows_counts_once_in_all():
    node = torch.tensor([[1, 1, 2, -1], [1, 1, -1, 3], [4, 4, 5, 1]])
    batch = Minibatch(mask=node >= 0, node=node)
    weight, keep = use("weight", "shared")(batch, torch.zeros(3, 4))
    third = 1 / 3
    assert torch.equal(keep, batch.mask)
    assert weight.tolist() == [[third, third, 1, 1], [third, third, 1, 1], [1, 1, 1, third]]
    assert (use("weight", "shared")(batch.replace(node=None), torch.zeros(3, 4))[0] == 1).all()


@given(seed=SEEDS, window=st.booleans())
def test_the_shares_of_a_node_add_up_to_one_per_token(ragged, seed, window):
    batch, *_ = ragged(seed, window=window)
    weight, _ = use("weight", "shared")(batch, torch.zeros_like(batch.old_logprobs))
    for node in batch.node[batch.mask].unique():
        standing = batch.mask & (batch.node == node)
        holders = standing.any(1).sum()
        assert weight[standing].sum().item() == pytest.approx((standing.sum() / holders).item())


def test_weights_commute(ragged):
    batch, *_ = ragged(3)
    tables = [{"type": "shared"}, {"type": "rollout_correction", "mode": "mask", "normalize": True}]
    plans = [recipe("grpo", slots={"weights": order}).plan(batch) for order in (tables, tables[::-1])]
    assert torch.equal(plans[0].coefficients, plans[1].coefficients)


PARTS = (
    {"clip": {"type": "none"}},
    {"clip": {"type": "gradient_preserving", "both_sides": True}},
    {"weights": [{"type": "shared"}]},
    {"weights": [{"type": "rollout_correction", "normalize": True}]},
    {"weights": [{"type": "rollout_correction", "level": "sequence", "mode": "mask", "normalize": True}]},
    {"weights": [{"type": "rollout_correction", "level": "sequence", "band": [0.5, 2.0]}]},
    {"rewards": [{"type": "environment"}, {"type": "overlong", "length": 12, "buffer": 9}]},
    {"rewards": [{"type": "environment"}, {"type": "kl_penalty", "coefficient": 0.5}]},
    {"samplers": [{"type": "group_filter"}], "baseline": {"type": "leave_one_out"}},
)


def result(batch, logprobs, entropy, slots):
    made, logprobs = recipe("grpo", slots=slots), logprobs.clone().requires_grad_()
    plan = made.plan(batch)
    loss, _ = made.loss(batch, plan, logprobs, entropy)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, plan.advantages, plan.coefficients


@pytest.mark.parametrize("slots", PARTS)
@given(seed=SEEDS, window=st.booleans(), data=st.data())
def test_every_part_follows_a_permutation_of_the_rows_and_ignores_padding(ragged, slots, seed, window, data):
    batch, logprobs, entropy = ragged(seed, window=window)
    loss, *whole = result(batch, logprobs, entropy, slots)
    order = data.draw(st.permutations(range(len(batch))))
    wide = batch.mask.shape[1] + 5

    def moved(tensor_, fill=math.nan):
        return torch.nn.functional.pad(tensor_, (0, 5), value=fill)[order]

    # The last rows' own columns are cut or padded alike, so only the names of two-dimensional fields matter.
    names = ("old_logprobs", "old_entropy", "ref_logprobs", "rollout_logprobs", "token_rewards", "values")
    other = batch.select(order).replace(
        mask=moved(batch.mask, 0),
        turn=moved(batch.turn, -1),
        node=moved(batch.node, -1),
        **{name: moved(getattr(batch, name)) for name in names},
    )
    assert other.mask.shape[1] == wide
    again, *parts = result(other, moved(logprobs), moved(entropy), slots)
    assert again.item() == pytest.approx(loss.item(), rel=1e-11, abs=1e-11)
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(two, moved(one, 0), rtol=1e-11, atol=1e-11)


def test_dr_grpo_golden():
    assert advantages("dr_grpo", [1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages("dr_grpo", [2, 0, 1, -1]) == [1.5, -0.5, 0.5, -1.5]


def test_dr_grpo_is_grpo_with_other_options_bit_for_bit(ragged):
    batch, logprobs, entropy = ragged(12)
    options = {"normalize_std": False, "aggregation": "seq-mean-token-sum-norm", "dual_clip": None}
    made = [recipe("dr_grpo", kl_coef=0.1), recipe("grpo", kl_coef=0.1, **options)]
    losses = [part.loss(batch, part.plan(batch), logprobs, entropy)[0] for part in made]
    assert losses[0] == losses[1] != 0


def test_dr_grpo_divides_by_rows_and_a_constant_so_that_no_token_counts_less_in_a_long_row():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    batch = rows([1.0, 0.0, 0.5], mask=mask)
    assert recipe("dr_grpo").plan(batch).coefficients[mask].tolist() == [1 / 8] * 4
    fixed = {"aggregation": {"type": "seq-mean-token-sum-norm", "length": 100}}
    assert recipe("dr_grpo", slots=fixed).plan(batch).coefficients[mask].tolist() == [1 / 200] * 4


def test_rloo_golden():
    assert advantages("rloo", [1, 0, 0, 1]) == pytest.approx([0.666667, -0.666667, -0.666667, 0.666667], abs=1e-6)
    assert advantages("rloo", [2, 0, 1, -1]) == pytest.approx([2, -0.666667, 0.666667, -2], abs=1e-6)


def test_rloo_counts_a_trajectory_once_however_many_rows_it_has():
    found = advantages("rloo", [1, 0, 0, 0], plan_of=lambda r: rows(r, trajectory=torch.tensor([0, 1, 1, 1])))
    assert found == [1, -1, -1, -1]


def test_rloo_paper_is_reinforce_with_the_kl_in_the_return(ragged):
    batch, logprobs, entropy = ragged(7)
    made = recipe("rloo", preset="paper")
    loss, metrics = made.loss(batch, made.plan(batch), logprobs, entropy)
    total, trained = {}, batch.mask.any(1)
    for row in range(len(batch)):
        d = (batch.old_logprobs - batch.ref_logprobs)[row][batch.mask[row]]
        total[row] = (batch.returns[row] - 0.05 * d.sum()).item()
    expected = 0.0
    for row in range(len(batch)):
        others = [total[j] for j in total if batch.group[j] == batch.group[row] and j != row]
        ratio = (logprobs - batch.old_logprobs)[row][batch.mask[row]].exp().sum().item()
        expected -= (total[row] - np.mean(others)) * ratio / trained.sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert metrics["clip_fraction"] == 0 and made.needs_reference and not recipe("rloo").needs_reference


def test_dapo_without_its_changes_is_grpo_bit_for_bit(ragged):
    batch, logprobs, entropy = ragged(13)
    made = [recipe("dapo", clip_high=0.2, filter_groups=False), recipe("grpo")]
    found = [(*part.loss(batch, part.plan(batch), logprobs, entropy),) for part in made]
    assert found[0][0] == found[1][0] != 0 and found[0][1] == found[1][1]


def test_dapo_clips_higher_on_the_upper_side_only():
    clip = recipe("dapo").slots.clip
    for ratio, advantage, loss in [(1.25, 1, -1.25), (1.5, 1, -1.28), (0.5, -1, 0.8), (0.9, -1, 0.9)]:
        value, _ = clip(tensor(math.log(ratio)), tensor(0), tensor(advantage), torch.tensor([True]))
        assert value.item() == pytest.approx(loss, abs=1e-12)


def test_dapo_leaves_groups_without_a_contrast_out_of_the_denominator():
    batch = rows([1.0, 0.0, 1.0, 1.0], group=torch.tensor([0, 0, 1, 1]))
    filtered, plain = recipe("dapo").plan(batch), recipe("dapo", filter_groups=False).plan(batch)
    assert filtered.coefficients[:, 0].tolist() == [0.5, 0.5, 0, 0]
    assert plain.coefficients[:, 0].tolist() == [0.25] * 4
    assert torch.equal(filtered.advantages, plain.advantages)
    assert (recipe("dapo").max_batches, recipe("dapo", filter_groups=False).max_batches) == (10, 1)


def test_dapo_fines_the_trajectory_that_nearly_ran_out_of_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    options = {"overlong_length": 4, "overlong_buffer": 2, "normalize_std": False, "filter_groups": False}
    found = recipe("dapo", **options).plan(rows([1.0, 1.0, 1.0], mask=mask)).advantages[:, 0].tolist()
    assert found == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    halved = recipe("dapo", overlong_factor=0.5, **options).plan(rows([1.0, 1.0, 1.0], mask=mask))
    assert halved.advantages[:, 0].tolist() == pytest.approx([-1 / 3, 1 / 6, 1 / 6])


def test_gspo_on_single_tokens_is_ppo_without_a_dual_clip(ragged):
    batch, logprobs, entropy = ragged(14)
    first = batch.mask & (batch.mask.cumsum(1) == 1)
    batch = batch.replace(mask=first)
    gspo = recipe("gspo", clip_low=0.2, clip_high=0.2)
    grpo = recipe("grpo", dual_clip=None, aggregation="seq-mean-token-mean")
    results = []
    for made in (gspo, grpo):
        current = logprobs.clone().requires_grad_()
        loss, metrics = made.loss(batch, made.plan(batch), current, entropy)
        (gradient,) = torch.autograd.grad(loss, current)
        results.append((loss.item(), gradient, metrics["clip_fraction"].item()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-13) and results[0][2] == results[1][2] > 0
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-13, atol=1e-16)


def test_gspo_averages_rows_of_different_length_alike():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    shares = recipe("gspo").plan(rows([1.0, 0.0], mask=mask)).coefficients
    assert shares[mask].tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


@pytest.mark.parametrize(
    ("slot", "name", "options", "message"),
    [
        ("weight", "rollout_correction", {"level": "tokens"}, "has no level 'tokens'; did you mean 'token'"),
        ("weight", "rollout_correction", {"mode": "truncated"}, "has no mode 'truncated'; did you mean 'truncate'"),
        ("weight", "rollout_correction", {"cap": 0}, "cap of rollout_correction must be a number above 0, not 0"),
        ("weight", "rollout_correction", {"cap": "2"}, "must be a number above 0, not '2'"),
        ("weight", "rollout_correction", {"band": [2.0]}, "must be two numbers with 0 <= low < high"),
        ("weight", "rollout_correction", {"band": "0.5_2"}, "must be two numbers with 0 <= low < high"),
        ("weight", "rollout_correction", {"band": (2.0, 0.5)}, "not \\(2.0, 0.5\\)"),
        ("weight", "rollout_correction", {"caps": 1}, "did you mean 'cap'"),
        ("reward", "overlong", {"length": 10, "buffer": 11}, "must be from 1 to the length of 10 tokens, not 11"),
        ("reward", "overlong", {"length": 10, "buffer": 0}, "not 0"),
        ("reward", "overlong", {"length": 10}, "needs the option 'buffer'"),
        ("sampler", "group_filter", {"max_batches": 0}, "max_batches must be at least 1"),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(slot, name, options, message):
    with pytest.raises(UsageError, match=message):
        use(slot, name, **options)


def test_a_recipe_refuses_what_its_slots_refuse():
    with pytest.raises(UsageError, match="length of 512 tokens, not 4096"):
        recipe("dapo", overlong_length=512)
    with pytest.raises(UsageError, match="kl_reward_coef=0 to train without a reference"):
        recipe("rloo", kl_reward_coef=0.1).plan(rows([1.0, 0.0]))
    with pytest.raises(UsageError, match="grpo and dapo each make a whole method"):
        recipe("grpo+dapo")

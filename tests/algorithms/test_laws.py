"""How methods relate: what each becomes at strength zero, what commutes, what is refused, and what is remembered."""

import json

import pytest
import torch

from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.recipe import METHODS, Plan
from agentropy.errors import UsageError


def result(made, ragged, seed=4, dtype=torch.float64, window=False):
    """Loss and gradients of a recipe on a random batch, with one step behind it."""
    batch, logprobs, entropy = ragged(seed, window=window)
    batch = batch.replace(old_logprobs=batch.old_logprobs.to(dtype))
    made.plan(batch)
    made.on_step_end({})
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (logprobs, entropy, batch.values + 0.1)]
    plan = made.plan(batch)
    loss, _ = made.loss(batch, plan, *inputs)
    return plan, loss, torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


LADDER = {
    "EPO without its term": (("epo", {"entropy_coef": 0.0}), ("grpo", {})),
    "ARPO's update": (("arpo", {}), ("grpo", {})),
    "AEPO without its factor inside the bounds": (
        ("aepo", {"entropy_advantage": 0.0, "clip_high": 50.0}),
        ("arpo", {"clip_high": 50.0}),
    ),
    "GiGPO without its steps": (("gigpo", {"step_weight": 0.0}), ("grpo", {})),
    "DAPO with even bounds": (("dapo", {"clip_high": 0.2, "filter_groups": False}), ("grpo", {})),
    "Dr. GRPO with its divisions back": (
        ("dr_grpo", {"normalize_std": True, "aggregation": "token-mean", "dual_clip": 3.0}),
        ("grpo", {}),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", LADDER)
def test_a_method_at_strength_zero_is_its_base_bit_for_bit(ragged, step, dtype):
    (name, options), (base, others) = LADDER[step]
    _, one, mine = result(recipe(name, total_steps=10, **options), ragged, dtype=dtype)
    _, two, theirs = result(recipe(base, total_steps=10, **others), ragged, dtype=dtype)
    assert torch.equal(one, two)
    assert all(torch.equal(left, right) for left, right in zip(mine, theirs, strict=True))


def test_empg_without_its_factors_is_the_base_centred_over_steps(ragged):
    shaped, *_ = result(recipe("empg", k=0.0, zeta=0.0), ragged)
    plain, *_ = result(recipe("grpo"), ragged)
    batch, *_ = ragged(4)
    steps = {}
    for row, column in batch.mask.nonzero().tolist():
        steps[int(batch.trajectory[row]), int(batch.turn[row, column])] = plain.advantages[row, column].item()
    mean = sum(steps.values()) / len(steps)
    expected = torch.where(batch.mask, plain.advantages - mean, 0)
    torch.testing.assert_close(shaped.advantages, expected, rtol=1e-12, atol=1e-12)


def test_gspo_of_single_tokens_is_ppo_without_its_second_clip():
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(8, 1, generator=generator, dtype=torch.float64)
    logprobs = (old + torch.randn(8, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    batch = Minibatch(mask=torch.ones(8, 1).bool(), old_logprobs=old, returns=torch.arange(8.0) % 3)
    options = {"clip_low": 0.2, "clip_high": 0.3}
    for name, more in (("gspo", {}), ("grpo", {"dual_clip": None, "aggregation": "seq-mean-token-mean"})):
        made = recipe(name, **options, **more)
        loss, _ = made.loss(batch, made.plan(batch), logprobs, torch.zeros_like(old))
        (gradient,) = torch.autograd.grad(loss, logprobs)
        if name == "gspo":
            first = (loss, gradient)
    torch.testing.assert_close(loss, first[0], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(gradient, first[1], rtol=1e-14, atol=1e-15)


CLIPS = [
    {"type": "none"},
    {"type": "ppo"},
    {"type": "gradient_preserving"},
    {"type": "gradient_preserving", "both_sides": True},
    {"type": "sequence"},
]


def test_on_policy_every_clip_has_the_same_gradient(ragged):
    batch, *_ = ragged(7)
    gradients = []
    for clip in CLIPS:
        made = recipe("grpo", slots={"clip": clip})
        logprobs = batch.old_logprobs.clone().requires_grad_()
        loss, _ = made.loss(batch, made.plan(batch), logprobs, batch.old_entropy)
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-14, atol=1e-16)


def planned(batch, **slots) -> Plan:
    return recipe("grpo", slots=slots).plan(batch)


def test_weights_commute_and_shapes_do_not(ragged):
    batch, *_ = ragged(6)
    weights = [{"type": "shared"}, {"type": "rollout_correction", "cap": 1.1}]
    one, two = planned(batch, weights=weights), planned(batch, weights=weights[::-1])
    assert torch.equal(one.weights, two.weights) and torch.equal(one.coefficients, two.coefficients)
    assert (one.weights[batch.mask] < 1).any()
    shapes = [{"type": "entropy_factor", "weight": 1.0}, {"type": "entropy_modulation", "zeta": 0.5}]
    one, two = planned(batch, shapes=shapes), planned(batch, shapes=shapes[::-1])
    assert not torch.allclose(one.advantages, two.advantages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empg+aepo", "empg damps uncertain steps"),
        ("aepo+empg", "empg damps uncertain steps"),
        ("arpo+aepo", "forks rollouts in 2 ways"),
        ("ppo+gigpo", "gigpo"),
        ("reinforce_pp+gigpo", "gigpo"),
        ("gspo+aepo", "gspo clips the ratio of whole sequences"),
        ("ppo+rloo", "ppo and rloo each make a whole method"),
        ("grpo+dapo+epo", "grpo and dapo each make a whole method"),
    ],
)
def test_contradictions_are_refused_with_their_reason(name, message):
    with pytest.raises(UsageError, match=message):
        recipe(name)


@pytest.mark.parametrize(
    ("name", "slots", "message"),
    [
        (
            "grpo",
            {"regularisers": [{"type": "entropy", "coefficient": c} for c in (0.1, 0.2)]},
            "two regularisers 'entropy'",
        ),
        ("grpo", {"credit": {"type": "gae"}}, "'gae' needs the regulariser 'value'"),
        (
            "grpo",
            {"regularisers": [{"type": "corridor", "coefficient": 0.1, "low": 0.5, "high": 1.5}]},
            "'corridor' needs the controller 'entropy_history'",
        ),
    ],
)
def test_slots_that_need_each_other_are_missed_before_anything_is_played(name, slots, message):
    with pytest.raises(UsageError, match=message):
        recipe(name, slots=slots)


def test_none_can_be_said_where_a_value_cannot_be_none():
    """TOML has no null, and ``none`` is a word of its own in some options."""
    assert recipe("grpo", dual_clip="none").methods["grpo"].dual_clip is None
    assert recipe("epo", gate_turn="none").methods["epo"].gate_turn == "none"
    assert recipe("rloo", clip="none").methods["rloo"].clip == "none"
    with pytest.raises(UsageError, match="option 'clip_low' of recipe 'grpo'"):
        recipe("grpo", clip_low="none")
    with pytest.raises(UsageError, match="lower and an upper bound"):
        recipe("aepo", factor_clamp=(2, 0))


def test_a_contradiction_can_be_asked_for():
    made = recipe("aepo+empg", allow_conflicts=True)
    assert [shape.name for shape in made.slots.shapes] == ["entropy_factor", "entropy_modulation"]
    quiet = recipe("aepo+empg", entropy_advantage=0.0)  # nothing to contradict
    assert [shape.name for shape in quiet.slots.shapes] == ["entropy_modulation"]


def test_the_method_that_stands_alone_comes_first_wherever_it_is_named():
    assert list(recipe("empg+dapo").methods) == list(recipe("dapo+empg").methods) == ["dapo", "empg"]
    assert list(recipe("epo+arpo").methods) == ["grpo", "epo", "arpo"]
    hard = recipe("empg+arpo", credit="hard").slots.shapes
    assert [shape.name for shape in hard] == ["shared_prefix_mean", "entropy_modulation"]


def test_a_schedulers_memory_is_part_of_the_recipes_state():
    made = recipe("arpo", preset="official")
    group = made.branching.group(3, 8, 1, 100)
    group.decide(2, 0, torch.tensor([1.0, 2.0]).numpy(), 4)
    state = json.loads(json.dumps(made.state_dict()))
    again = recipe("arpo", preset="official")
    assert again.branching.slot_roots == {}
    again.load_state_dict(state)
    assert again.branching.slot_roots == made.branching.slot_roots != {}
    assert again.state_dict() == made.state_dict()


def test_adding_a_method_is_adding_one_class():
    """What README says: slots are filled by name, and a new name works everywhere."""
    from agentropy.algorithms.recipe import Method, register
    from agentropy.algorithms.slots import use

    @register("timid")
    class Timid(Method):
        """A narrow clip."""

        summary = "a narrow clip"
        equations = ("clip at 1.01",)
        sources = ("this test",)
        base = "grpo"
        high: float = 0.01

        def compose(self, slots, total_steps):
            return slots.extend(clip=use("clip", "ppo", low=self.high, high=self.high))

    try:
        assert recipe("timid+epo", high=0.05).slots.clip.options["high"] == 0.05
        with pytest.raises(UsageError, match="timid and aepo both fill the slot 'clip'"):
            recipe("timid+aepo")
    finally:
        del METHODS["timid"]

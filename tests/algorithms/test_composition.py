"""Laws that hold for every recipe: splits, masks, padding, permutations, degeneracies and errors."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.algorithms import Minibatch, recipe, recipes
from agentropy.algorithms.recipe import merge_metrics
from agentropy.algorithms.recipes import available_presets, describe
from agentropy.errors import UsageError

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
    "turn-mean",
)
VARIANTS = (
    *((name, preset, {}) for name in recipes() for preset in (None, *available_presets(name))),
    *(("grpo", None, {"aggregation": mode, "kl_coef": 0.1, "kl_estimator": "k3+"}) for mode in MODES),
    ("grpo", None, {"turn_credit": 2.0, "turn_gamma": 0.9}),
    ("arpo", None, {"credit": "hard", "deduplicate": True}),
    ("gigpo+empg", None, {"zeta": 0.3}),
    ("dapo+empg", None, {"last_bonus": "mean", "bonus_gate": "success"}),
    ("arpo+epo", None, {"entropy_coef": 1.0, "credit": "hard"}),
    ("ppo+empg+epo", None, {"kl_reward_coef": 0.1}),
    ("ppo", None, {"gamma": 0.9, "lam": 0.8, "value_clip": None, "kl_reward_coef": 0.1, "aggregation": "turn-mean"}),
    ("ppo", None, {"gae_unit": "rows", "whiten": False, "value_clip": 0.1}),
    ("reinforce_pp", None, {"gamma": 0.9, "kl_reward_coef": 0.1}),
    ("reinforce_pp", None, {"baseline": "group"}),
    ("gspo+gigpo", None, {"similarity": 0.9}),
    ("dapo+aepo+epo", None, {"overlong_length": 8, "overlong_buffer": 4}),
    ("gigpo+aepo", None, {"credit": "hard", "turn_credit": 0.0}),
    ("epo", "corridor", {"entropy_coef": 1.0, "reference": "per_turn", "group_stats": "turns"}),
    ("epo", "official", {"entropy_coef": 1.0, "max_turns": 6}),
)
EVERY = pytest.mark.parametrize(("name", "preset", "options"), VARIANTS)
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=12, deadline=None)
"""There are many recipes; each of them is looked at in few batches."""


def experienced(name, preset, options, batch):
    """A recipe that has one step behind it, so that what it remembers matters."""
    made = recipe(name, preset=preset, total_steps=10, **options)
    made.plan(batch)
    made.on_step_end({})
    return made


def gradients(made, batch, plan, logprobs, entropy, rows=None):
    """Loss, metrics and gradients of the rows ``rows`` with respect to the whole of log-probabilities, entropies and
    values; the critic's values have moved away from those that the plan was made with."""
    values = batch.values + 0.2 * torch.sin(batch.values * 40)
    inputs = [tensor.clone().requires_grad_() for tensor in (logprobs, entropy, values)]
    if rows is None:
        loss, metrics = made.loss(batch, plan, *inputs)
    else:
        loss, metrics = made.loss(batch.select(rows), plan.select(rows), *(tensor[rows] for tensor in inputs))
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), metrics, *grads


@EVERY
@FEW
@given(seed=SEEDS, window=st.booleans(), data=st.data())
def test_a_split_adds_up_to_the_whole(ragged, name, preset, options, seed, window, data):
    batch, logprobs, entropy = ragged(seed, window=window)
    made = experienced(name, preset, options, batch)
    plan = made.plan(batch)
    pieces = data.draw(st.lists(st.integers(0, 3), min_size=len(batch), max_size=len(batch)))
    parts = [[row for row in range(len(batch)) if pieces[row] == piece] for piece in set(pieces)]
    whole = gradients(made, batch, plan, logprobs, entropy)
    split = [gradients(made, batch, plan, logprobs, entropy, rows) for rows in parts]
    assert sum(part[0] for part in split).item() == pytest.approx(whole[0].item(), rel=1e-12, abs=1e-12)
    for index in (2, 3, 4):
        torch.testing.assert_close(sum(part[index] for part in split), whole[index], rtol=1e-12, atol=1e-14)
    merged = merge_metrics(part[1] for part in split)
    assert {key: value.item() for key, value in merged.items()} == pytest.approx(
        {key: value.item() for key, value in whole[1].items()}, rel=1e-9, abs=1e-9
    )


@EVERY
@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e9, 1e9])
def test_what_is_masked_changes_nothing(ragged, name, preset, options, junk):
    batch, logprobs, entropy = ragged(5)

    def spoiled(tensor):
        return torch.where(batch.mask, tensor, junk)

    names = ("old_logprobs", "old_entropy", "ref_logprobs", "rollout_logprobs", "token_rewards", "values")
    bad = batch.replace(**{key: spoiled(getattr(batch, key)) for key in names})
    results = []
    for data, lp, h in ((batch, logprobs, entropy), (bad, spoiled(logprobs), spoiled(entropy))):
        made = experienced(name, preset, options, data)
        loss, metrics, *grads = gradients(made, data, made.plan(data), lp, h)
        results.append((loss, *grads, *metrics.values()))
        assert all(not grad[~batch.mask].any() for grad in grads)
        json.dumps(made.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@EVERY
@FEW
@given(seed=SEEDS, window=st.booleans(), data=st.data())
def test_rows_can_be_permuted(ragged, name, preset, options, seed, window, data):
    batch, logprobs, entropy = ragged(seed, window=window)
    made = experienced(name, preset, options, batch)
    order = data.draw(st.permutations(range(len(batch))))
    plan, moved = made.plan(batch).select(order), made.plan(batch.select(order))
    torch.testing.assert_close(moved.advantages, plan.advantages, rtol=1e-12, atol=1e-12)
    one = gradients(made, batch.select(order), plan, logprobs[order], entropy[order])
    two = gradients(made, batch.select(order), moved, logprobs[order], entropy[order])
    for index in (0, 2, 3, 4):
        torch.testing.assert_close(two[index], one[index], rtol=1e-12, atol=1e-12)


# Without a length, seq-mean-token-sum-norm divides by the padded width, by definition.
@pytest.mark.parametrize(
    ("name", "preset", "options"),
    [v for v in VARIANTS if recipe(v[0], v[1], **v[2]).slots.aggregation.name != "seq-mean-token-sum-norm"],
)
def test_padding_columns_change_nothing(ragged, name, preset, options):
    batch, logprobs, entropy = ragged(9)

    def wider(tensor, fill=0):
        return torch.nn.functional.pad(tensor, (0, 7), value=fill)

    names = ("mask", "old_logprobs", "old_entropy", "ref_logprobs", "rollout_logprobs", "token_rewards", "values")
    filled = {key: wider(getattr(batch, key), -1) for key in ("turn", "node")}
    padded = batch.replace(**{key: wider(getattr(batch, key)) for key in names}, **filled)
    made, other = experienced(name, preset, options, batch), experienced(name, preset, options, padded)
    one = gradients(made, batch, made.plan(batch), logprobs, entropy)
    two = gradients(other, padded, other.plan(padded), wider(logprobs), wider(entropy))
    assert two[0].item() == pytest.approx(one[0].item(), rel=1e-13)
    for index in (2, 3, 4):
        torch.testing.assert_close(two[index], wider(one[index]), rtol=1e-13, atol=1e-15)


@EVERY
def test_on_policy_the_gradient_is_that_of_the_plain_policy_gradient(ragged, name, preset, options):
    batch, _, entropy = ragged(3)
    made = experienced(name, preset, options | {"kl_coef": 0.0}, batch)
    plan = made.plan(batch)
    _, metrics, grad, *_ = gradients(made, batch, plan, batch.old_logprobs, entropy)
    torch.testing.assert_close(grad, -plan.advantages * plan.coefficients, rtol=1e-14, atol=1e-16)
    assert metrics["clip_fraction"] == 0 and metrics["ratio/max"] == 1 and metrics["kl/old"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", ["paper", "corridor", "official"])
def test_epo_degenerates_bit_for_bit(ragged, dtype, preset):
    """λ = 0 is the base; α = 0 is the base with an entropy bonus, and so is the official penalty's gradient."""
    batch, logprobs, entropy = ragged(11)
    batch = batch.replace(old_logprobs=batch.old_logprobs.to(dtype))
    logprobs, entropy = logprobs.to(dtype), entropy.to(dtype)

    def result(name, **options):
        made = experienced(name, options.pop("preset", None), options, batch)
        return gradients(made, batch, made.plan(batch), logprobs, entropy)

    def equal(one, two, indices):
        assert all(torch.equal(one[index], two[index]) for index in indices)

    equal(result("epo", preset=preset, entropy_coef=0.0), result("grpo"), (0, 2, 3))
    agg = recipe("epo", preset=preset).methods["epo"].agg
    bonus = {"regularisers": [{"type": "entropy", "coefficient": 0.1, "agg": agg}]}
    plain = result("grpo", slots=bonus)
    equal(result("epo", preset=preset, entropy_coef=0.1, alpha=0.0), plain, (0, 2, 3))
    penalised = result("epo", preset=preset, entropy_coef=0.1, gate_turn="none")
    if preset == "official":
        equal(penalised, plain, (2, 3))
    assert not torch.equal(penalised[0], plain[0])


def test_equal_returns_give_no_policy_gradient(ragged):
    batch, logprobs, entropy = ragged(2)
    batch = batch.replace(returns=torch.full_like(batch.returns, 0.1))
    made = recipe("grpo")
    loss, _, grad, *_ = gradients(made, batch, made.plan(batch), logprobs, entropy)
    assert loss == 0 and not grad.any() and made.plan(batch).metrics["groups/informative"] == 0


def test_mistakes_name_the_nearest_choice():
    for make, message in [
        (lambda: recipe("epoo"), "unknown recipe 'epoo'; did you mean 'epo'"),
        (lambda: recipe("epo", preset="papr"), "no preset 'papr'; did you mean 'paper'"),
        (lambda: recipe("epo", aplha=1), "no option 'aplha'; did you mean 'alpha'"),
        (lambda: recipe("epo", clip_hihg=1), "did you mean 'clip_high'"),
        (lambda: recipe("epo", **{"grpo.alpha": 1}), "no option 'grpo.alpha'"),
        (
            lambda: recipe("epo", alpha=-1),
            "option 'alpha' of recipe 'epo': .*greater than or equal to 0, not -1",
        ),
        (lambda: recipe("grpo", aggregation="token_mean"), "option 'aggregation' of recipe 'grpo'"),
        (lambda: recipe("grpo", total_steps=0), "total_steps must be at least 1"),
        (lambda: recipe("grpo").load_state_dict(recipe("epo").state_dict()), "the saved state belongs to"),
    ]:
        with pytest.raises(UsageError, match=message):
            make()


def test_options_reach_the_method_that_has_them():
    made = recipe("grpo+epo", preset="corridor", clip_high=0.3, **{"epo.alpha": 3.0})
    assert made.methods["grpo"].clip_high == 0.3
    assert (made.methods["epo"].alpha, made.methods["epo"].kappa_low) == (3.0, 0.5)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_describes_itself(name):
    described = recipe(name).describe()
    assert described["equations"] and described["sources"] and described["summary"]
    assert {"samplers", "credit", "clip", "regularisers", "controllers"} <= set(described["slots"])
    json.dumps(described)


@pytest.mark.parametrize("name", [*recipes(), "grpo+epo"])
def test_a_description_for_people_holds_every_option_slot_equation_and_source(name):
    text, made = describe(name), recipe(name)
    assert text.splitlines()[0].startswith(f"{name}: ")
    flat = " ".join(text.split())
    for method in made.methods.values():
        assert all(f"{option}=" in flat for option in type(method).model_fields)
        assert all(part in flat for part in (*method.equations, *method.sources))
    assert all(preset in flat for preset in available_presets(name))
    assert all(f"\n  {slot} " in text for slot in vars(made.slots))
    with pytest.raises(UsageError, match="did you mean 'epo'"):
        describe("epoo")


def test_single_precision_batches_give_single_precision_plans():
    batch = Minibatch(mask=torch.ones(2, 3).bool(), returns=torch.tensor([1.0, 0.0]))
    plan = recipe("epo").plan(batch)
    assert {plan.advantages.dtype, plan.coefficients.dtype, plan.terms["entropy"].coefficient.dtype} == {torch.float32}

"""Learner: exact statistics, gradients that ignore how the batch is cut, exact resume, and learning."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from agentropy.agents.models import build_small_model
from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.critic import Critic
from agentropy.algorithms.forward import token_statistics
from agentropy.algorithms.learner import Learner, LearnerConfig
from agentropy.errors import UsageError

VOCABULARY = 40


def tiny_model(seed=0, **sizes):
    return build_small_model(
        VOCABULARY, **{"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32} | sizes, seed=seed
    )


def token_batch(seed=0, rows=12, width=30):
    """Rows of random tokens, about a third of them trained, with right padding."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, width + 1, rows)
    inside = np.arange(width) < length[:, None]
    mask = (rng.random((rows, width)) < 0.35) & inside
    mask[:, 0] = False
    return Minibatch(
        tokens=torch.from_numpy(np.where(inside, rng.integers(6, VOCABULARY, (rows, width)), 0)),
        mask=torch.from_numpy(mask),
        length=torch.from_numpy(length),
        old_logprobs=torch.from_numpy(rng.normal(-3.6, 0.3, (rows, width))).float(),
        old_entropy=torch.from_numpy(rng.uniform(0, 3, (rows, width))).float(),
        group=torch.arange(rows) // 4,
        returns=torch.from_numpy(rng.integers(0, 2, rows)).double(),
    )


def opinionated_critic(model):
    """A critic that tells states apart before it has learned anything, so that its body has a gradient at once."""
    critic = Critic(model)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(3))
    return critic


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def drop_times(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name}


def test_a_frozen_model_is_named():
    with pytest.raises(UsageError, match="all parameters of LlamaForCausalLM are frozen"):
        Learner(tiny_model().requires_grad_(False))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_equal_those_of_each_row_alone(temperature):
    model, batch = tiny_model(), token_batch()
    logprobs, entropy = token_statistics(model, batch.tokens, batch.mask, temperature=temperature)
    assert not logprobs[~batch.mask].any() and not entropy[~batch.mask].any()
    for row in range(len(batch)):
        tokens = batch.tokens[row, : int(batch.length[row])]
        table = log_softmax(model(input_ids=tokens[None]).logits[0, :-1] / temperature, -1)
        mask = batch.mask[row, 1 : len(tokens)]
        torch.testing.assert_close(
            logprobs[row, 1 : len(tokens)][mask],
            table.gather(1, tokens[1:, None])[:, 0][mask],
            rtol=0,
            atol=2e-6,
        )
        torch.testing.assert_close(
            entropy[row, 1 : len(tokens)][mask], -(table.exp() * table).sum(-1)[mask], rtol=0, atol=2e-6
        )


def test_padding_needs_no_attention_mask():
    """Right padding is invisible to a causal model: the masked forward pass gives the same logits."""
    model, batch = tiny_model(), token_batch()
    visible = (torch.arange(batch.tokens.shape[1]) < batch.length[:, None]).long()
    masked = log_softmax(model(input_ids=batch.tokens, attention_mask=visible).logits[:, :-1], -1)
    logprobs, _ = token_statistics(model, batch.tokens, batch.mask)
    expected = masked.gather(2, batch.tokens[:, 1:, None])[..., 0][batch.mask[:, 1:]]
    torch.testing.assert_close(logprobs[batch.mask], expected, rtol=0, atol=2e-6)


def test_the_first_token_cannot_be_trained():
    with pytest.raises(UsageError, match="nothing comes before the first token"):
        token_statistics(tiny_model(), torch.ones(1, 2).long(), torch.ones(1, 2).bool())


@pytest.mark.parametrize("name", ["grpo", "epo"])
def test_an_update_does_not_depend_on_the_size_of_micro_batches(name):
    results = []
    for tokens in (30, 64, 100_000):
        model = tiny_model()
        config = LearnerConfig(lr=1e-2, micro_batch_tokens=tokens, clip_norm=math.inf)
        learner = Learner(model, recipe(name, preset=None), config)
        metrics = learner.update(token_batch())
        results.append((weights(model), {key: metrics[key] for key in ("loss", "grad_norm", "ratio/max", "kl/old")}))
    for values, metrics in results[1:]:
        # Adam divides by the gradient's size, so a rounding error in a tiny gradient shows in the weights.
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=1e-4)
        assert metrics == pytest.approx(results[0][1], rel=1e-5)


def test_minibatches_keep_the_weight_of_every_token():
    """Without movement, the mean over the minibatches of an epoch is the loss of the whole batch."""
    batch, losses = token_batch(), []
    for pieces in (1, 2, 4):
        learner = Learner(tiny_model(), recipe("epo"), LearnerConfig(lr=0.0, minibatches=pieces))
        metrics = learner.update(batch, torch.Generator().manual_seed(pieces))
        losses.append([metrics[name] for name in ("loss", "entropy/action_mean", "ratio/mean", "ratio/max")])
        assert learner.step == pieces
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_an_on_policy_update_has_ratio_one_and_follows_the_advantages():
    model = tiny_model()
    learner = Learner(model, recipe("grpo"), LearnerConfig(lr=1e-3))
    batch = token_batch()
    before, entropy = learner.score(batch)
    batch = batch.replace(old_logprobs=before, old_entropy=entropy)
    metrics = learner.update(batch)
    assert metrics["ratio/max"] == pytest.approx(1, abs=1e-5) and metrics["kl/old"] == pytest.approx(0, abs=1e-6)
    assert metrics["entropy/action_mean"] == pytest.approx(metrics["entropy/old_mean"], abs=1e-5)
    assert metrics["tokens"] == batch.mask.sum() and metrics["clip_fraction"] == 0
    advantages = recipe("grpo").plan(batch).advantages
    assert ((learner.score(batch)[0] - before) * advantages).sum() > 0


@pytest.mark.parametrize(("name", "preset"), [("epo", "corridor"), ("ppo", None)])
@pytest.mark.parametrize("generator", [np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)])
def test_a_resumed_run_is_bit_identical(generator, name, preset):
    config = LearnerConfig(lr=1e-2, epochs=2, minibatches=3, schedule="cosine", total_steps=24, weight_decay=0.1)

    def steps(learner, which):
        for step in which:
            metrics = learner.update(token_batch(step), generator(step))
            learner.recipe.on_step_end(metrics)
        return drop_times(metrics)

    kept = Learner(tiny_model(), recipe(name, preset=preset), config)
    steps(kept, [0, 1])
    saved = copy.deepcopy((kept.model.state_dict(), kept.state_dict(), kept.recipe.state_dict()))
    expected = steps(kept, [2, 3])
    resumed = Learner(tiny_model(seed=9), recipe(name, preset=preset), config)
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.recipe.load_state_dict(saved[2])
    assert steps(resumed, [2, 3]) == expected
    assert torch.equal(weights(resumed.model), weights(kept.model)) and resumed.step == kept.step == 24
    if kept.critic is not None:
        assert torch.equal(weights(resumed.critic), weights(kept.critic))


def test_a_gradient_that_is_not_finite_skips_its_step():
    model, batch = tiny_model(), token_batch()
    learner = Learner(model, recipe("grpo"), LearnerConfig(lr=1e-2, minibatches=2))
    before = weights(model)
    spoiled = batch.old_logprobs.masked_fill(batch.mask, math.nan)
    metrics = learner.update(batch.replace(old_logprobs=spoiled), np.random.default_rng(0))
    assert metrics["skipped"] == learner.skipped == 2 and torch.equal(weights(model), before)
    assert learner.update(batch, np.random.default_rng(0))["skipped"] == 0
    assert not torch.equal(weights(model), before) and weights(model).isfinite().all()


def test_a_critic_learns_a_fixed_batch():
    """Value loss falls to a hundredth, and the critic comes to explain the returns."""
    learner = Learner(tiny_model(), recipe("ppo"), LearnerConfig(lr=0.0, critic_lr=1e-2))
    before, batch = weights(learner.model), token_batch()
    history = [learner.update(batch) for _ in range(40)]
    losses, explained = ([metrics[name] for metrics in history] for name in ("value_loss", "critic/explained_variance"))
    assert history[0]["values/mean"] == 0 and explained[0] == pytest.approx(0, abs=1e-12)
    assert losses[0] == pytest.approx((batch.returns[:, None].expand_as(batch.mask)[batch.mask] ** 2).mean() / 2)
    assert losses[-1] < losses[0] / 100 and explained[-1] > 0.95
    assert losses[::10] == sorted(losses[::10], reverse=True)
    assert history[-1]["values/mean"] == pytest.approx(learner.values(batch)[batch.mask].mean().item(), abs=1e-2)
    assert torch.equal(weights(learner.model), before)


def test_the_critics_update_does_not_depend_on_the_size_of_micro_batches():
    results = []
    for tokens in (30, 64, 100_000):
        model = tiny_model()
        config = LearnerConfig(lr=1e-2, micro_batch_tokens=tokens, clip_norm=math.inf)
        learner = Learner(model, recipe("ppo", lam=0.9), config, critic=opinionated_critic(model))
        metrics = learner.update(token_batch())
        names = ("loss", "value_loss", "grad_norm", "critic/grad_norm", "critic/explained_variance", "values/mean")
        results.append((weights(model), weights(learner.critic), {name: metrics[name] for name in names}))
    for policy, critic, metrics in results[1:]:
        torch.testing.assert_close(policy, results[0][0], rtol=0, atol=1e-4)
        torch.testing.assert_close(critic, results[0][1], rtol=0, atol=1e-4)
        assert metrics == pytest.approx(results[0][2], rel=1e-5)


def test_policy_and_critic_have_a_gradient_norm_and_a_learning_rate_each():
    """However large the value loss, it takes nothing from the policy's step; and either can stand still alone."""
    policies, batch = [], token_batch()
    for coefficient in (1.0, 1e6):
        model = tiny_model()
        learner = Learner(model, recipe("ppo", value_coef=coefficient), LearnerConfig(lr=1e-2, clip_norm=0.01))
        metrics = learner.update(batch)
        policies.append((weights(model), metrics["grad_norm"]))
        assert (metrics["critic/grad_norm"] > 1e4) == (coefficient > 1)
    assert torch.equal(policies[0][0], policies[1][0]) and policies[0][1] == policies[1][1]

    config = LearnerConfig(lr=1e-2, critic_lr=0.0, warmup_steps=2)
    model = tiny_model()
    learner = Learner(model, recipe("ppo"), config, critic=opinionated_critic(model))
    before = weights(learner.critic)
    assert learner.update(batch)["lr"] == pytest.approx(5e-3)
    assert torch.equal(weights(learner.critic), before) and not torch.equal(weights(model), weights(tiny_model()))
    assert config.lr_at(0, 4.0) == 2.0 and config.lr_at(9, 4.0) == 4.0


@pytest.mark.parametrize("field", ["old_logprobs", "token_rewards", "values"])
def test_policy_and_critic_skip_a_step_together(field):
    """What is not finite in the loss of one is a reason for both; after it both go on."""
    model, batch = tiny_model(), token_batch()
    learner = Learner(model, recipe("ppo", whiten=False), LearnerConfig(lr=1e-2, minibatches=2))
    before = weights(model), weights(learner.critic)
    spoiled = torch.zeros(batch.mask.shape).masked_fill(batch.mask, math.nan)
    metrics = learner.update(batch.replace(**{field: spoiled}), np.random.default_rng(0))
    assert metrics["skipped"] == learner.skipped == 2
    assert torch.equal(weights(model), before[0]) and torch.equal(weights(learner.critic), before[1])
    assert learner.update(batch, np.random.default_rng(0))["skipped"] == 0
    for module, old in zip((model, learner.critic), before, strict=True):
        assert not torch.equal(weights(module), old) and weights(module).isfinite().all()


def test_a_critics_gradient_that_is_not_finite_skips_the_step_of_both():
    """The loss and the policy's gradient are finite here."""
    model = tiny_model()
    learner = Learner(model, recipe("ppo"), LearnerConfig(lr=1e-2))
    learner.critic.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(model), weights(learner.critic)
    metrics = learner.update(token_batch())
    assert metrics["skipped"] == 1 and math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    assert torch.equal(weights(model), before[0]) and torch.equal(weights(learner.critic), before[1])


def test_a_batch_is_planned_with_the_critics_values_unless_it_brings_its_own():
    model, batch = tiny_model(), token_batch()
    learner = Learner(model, recipe("ppo"), LearnerConfig(lr=0.0), critic=opinionated_critic(model))
    found = learner.values(batch)
    assert found[batch.mask].std() > 0.1 and not found[~batch.mask].any()
    own = learner.update(batch)
    assert own == pytest.approx(own | drop_times(learner.update(batch.replace(values=found))))
    assert own["values/mean"] == pytest.approx(found[batch.mask].mean().item(), abs=1e-6)
    assert learner.update(batch.replace(values=torch.full_like(found, 7.0)))["values/mean"] == 7


def test_returns_that_do_not_differ_leave_nothing_to_explain():
    model, batch = tiny_model(), token_batch()
    learner = Learner(model, recipe("ppo"), LearnerConfig(lr=0.0), critic=opinionated_critic(model))
    for value in (0.0, 0.1, 7.3):
        metrics = learner.update(batch.replace(returns=torch.full_like(batch.returns, value)))
        assert metrics["critic/explained_variance"] == 0 and metrics["values/mean"] != 0


def test_a_learner_without_values_has_no_trace_of_a_critic():
    learner = Learner(tiny_model(), recipe("reinforce_pp"))
    metrics = learner.update(token_batch())
    assert learner.critic is None and set(learner.state_dict()) == {"optimizer", "step", "skipped"}
    assert not any("value" in name or "critic" in name for name in metrics)


def test_imitation_is_the_mean_log_likelihood_whatever_the_micro_batch():
    batch, losses = token_batch(), []
    for tokens in (40, 10_000):
        learner = Learner(tiny_model(), None, LearnerConfig(lr=1e-2, micro_batch_tokens=tokens))
        logprobs, _ = learner.score(batch)
        first = learner.sft_update(batch)["loss"]
        assert first == pytest.approx(-logprobs[batch.mask].mean().item(), rel=1e-5)
        losses.append([first, *(learner.sft_update(batch)["loss"] for _ in range(5))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] == sorted(losses[0], reverse=True)


def test_learning_rates():
    constant = LearnerConfig(lr=1.0, warmup_steps=4)
    assert [constant.lr_at(step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    linear = LearnerConfig(lr=1.0, warmup_steps=2, total_steps=12, schedule="linear", min_lr_ratio=0.2)
    assert [linear.lr_at(step) for step in (1, 2, 7, 12, 50)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    cosine = LearnerConfig(lr=2.0, total_steps=10, schedule="cosine")
    assert [cosine.lr_at(step) for step in (0, 5, 10)] == pytest.approx([2, 1, 0])
    with pytest.raises(UsageError, match="needs total_steps"):
        Learner(tiny_model(), None, LearnerConfig(schedule="cosine"))


def test_norms_and_embeddings_do_not_decay():
    model = tiny_model()
    learner = Learner(model, None, LearnerConfig(weight_decay=0.1))
    decayed = {id(p) for group in learner.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names and all("proj" in name for name in names)


def test_bfloat16_autocast_stays_near_and_keeps_the_weights_type():
    batch = token_batch()
    low, full = (
        Learner(tiny_model(), recipe("epo"), LearnerConfig(precision=precision))
        for precision in ("bfloat16", "float32")
    )
    torch.testing.assert_close(low.score(batch)[0], full.score(batch)[0], rtol=0, atol=0.05)
    assert math.isfinite(low.update(batch)["loss"])
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float32}


def test_learner_says_what_is_missing():
    with pytest.raises(UsageError, match="no recipe"):
        Learner(tiny_model(), None).update(token_batch())
    with pytest.raises(UsageError, match="needs a generator"):
        Learner(tiny_model(), recipe("grpo"), LearnerConfig(minibatches=2)).update(token_batch())
    with pytest.raises(UsageError, match="needs the batch's tokens"):
        Learner(tiny_model(), recipe("grpo")).update(token_batch().replace(tokens=None))
    with pytest.raises(UsageError, match="recipe 'grpo' has no use for a critic"):
        Learner(tiny_model(), recipe("grpo"), critic=Critic(tiny_model()))
    with pytest.raises(UsageError, match="no critic"):
        Learner(tiny_model(), recipe("grpo")).values(token_batch())
    plain, critical = (Learner(tiny_model(), recipe(name)) for name in ("grpo", "ppo"))
    with pytest.raises(UsageError, match="the saved learner has no critic"):
        critical.load_state_dict(plain.state_dict())
    with pytest.raises(UsageError, match="the saved learner has a critic"):
        plain.load_state_dict(critical.state_dict())


OPTIONS, WINNING = (7, 8, 9, 10), {7: 9, 8: 7, 9: 10, 10: 8}


def play(model, generator, groups=8, size=8):
    """Two turns of a bandit: the reply to the first choice names it, and one second choice wins for each reply.

    The first turn pays nothing by itself and only choices 7 and 8 can win, so credit must cross the reply.
    """
    rows = groups * size
    tokens = torch.full((rows, 4), 2)
    logprobs, entropy = torch.zeros(rows, 4), torch.zeros(rows, 4)
    for position in (1, 3):
        if position == 3:
            tokens[:, 2] = tokens[:, 1] + 10
        logits = model(input_ids=tokens[:, :position]).logits[:, -1, OPTIONS[0] : OPTIONS[-1] + 1]
        table = log_softmax(logits, -1)
        choice = torch.multinomial(table.exp(), 1, generator=generator)
        tokens[:, position] = choice[:, 0] + OPTIONS[0]
        logprobs[:, position] = table.gather(1, choice)[:, 0]
        entropy[:, position] = -(table.exp() * table).sum(-1)
    won = [first in (7, 8) and WINNING[first] == second for first, second in tokens[:, (1, 3)].tolist()]
    return Minibatch(
        tokens=tokens,
        mask=torch.tensor([[0, 1, 0, 1]]).bool().expand(rows, 4),
        turn=torch.tensor([[-1, 0, -1, 1]]).expand(rows, 4),
        old_logprobs=logprobs,
        old_entropy=entropy,
        group=torch.arange(rows) // size,
        returns=torch.tensor(won).double(),
    )


class FourChoices(torch.nn.Module):
    """A table: logits of the four choices at the start and after each of the four replies."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 4, _weight=torch.zeros(5, 4))

    def forward(self, state):
        return log_softmax(self.table(state), -1)


@pytest.mark.parametrize(
    ("name", "preset"), [("grpo", None), ("epo", "paper"), ("epo", "corridor"), ("reinforce_pp", None)]
)
def test_a_table_learns_the_two_turn_bandit(name, preset):
    """From 1 success in 8 to 95 in 100 within 120 updates."""
    generator, policy = torch.Generator().manual_seed(0), FourChoices()
    made = recipe(name, preset=preset, total_steps=120)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    success = []
    for _ in range(120):
        first = torch.multinomial(policy(torch.zeros(64).long()).exp(), 1, generator=generator)[:, 0]
        states = torch.stack((torch.zeros(64).long(), 1 + first), 1)
        old = policy(states).detach()
        second = torch.multinomial(old[:, 1].exp(), 1, generator=generator)[:, 0]
        choices = torch.stack((first, second), 1)[..., None]
        won = (first < 2) & (second == (first + 2) % 4)
        batch = Minibatch(
            mask=torch.ones(64, 2).bool(),
            turn=torch.tensor([[0, 1]]).expand(64, 2),
            old_logprobs=old.gather(2, choices)[..., 0],
            old_entropy=-(old.exp() * old).sum(-1),
            group=torch.arange(64) // 8,
            returns=won.double(),
        )
        plan = made.plan(batch)
        for _ in range(2):
            table = policy(states)
            loss, metrics = made.loss(batch, plan, table.gather(2, choices)[..., 0], -(table.exp() * table).sum(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made.on_step_end(metrics)
        success.append(won.double().mean().item())
    assert success[0] < 0.35 and np.mean(success[-10:]) >= 0.95


@pytest.mark.parametrize("name", ["grpo", "epo", "ppo", "reinforce_pp"])
def test_a_transformer_learns_the_two_turn_bandit_through_the_learner(name):
    generator = torch.Generator().manual_seed(1)
    model = tiny_model(layers=1)
    learner = Learner(model, recipe(name, total_steps=40), LearnerConfig(lr=1e-2, epochs=2))
    success = []
    for _ in range(40):
        with torch.no_grad():
            batch = play(model, generator)
        success.append(batch.returns.mean().item())
        learner.recipe.on_step_end(learner.update(batch, generator))
    assert success[0] < 0.35 and np.mean(success[-5:]) >= 0.95

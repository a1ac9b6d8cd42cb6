"""The change of entropy by an update: exact on tables, and foretold in a real run of a small network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentropy.agents.engines.base import SamplingParams
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.agents.formats import PlainFormat
from agentropy.agents.models import build_small_model
from agentropy.agents.policies import EnginePolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.instruments import oracle
from agentropy.algorithms.instruments.oracle import (
    FEWEST_STEPS,
    correlation_metrics,
    first_order,
    logit_signals,
    observed_update,
    tabular_change,
)
from agentropy.algorithms.learner import Learner, LearnerConfig
from agentropy.errors import UsageError

from ..agents.inline import InlinePool
from .test_bandit import TOKENIZER, WORDS, Safe

TASKS = [f"{one} {two}" for one in WORDS for two in WORDS]


def entropy_of(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def correlation(predicted, measured):
    return float(np.corrcoef(np.asarray(predicted), np.asarray(measured))[0, 1])


def test_golden_signals_of_two_choices():
    """By hand for p = (3/4, 1/4): H = log 4 - 3/4 log 3, S_k = p_k (H + log p_k), N = 3/4 S_0 + 1/4 S_1."""
    found = logit_signals(torch.tensor([[3.0, 1.0]]).log().repeat(2, 1), torch.tensor([0, 1]))
    entropy = np.log(4) - 0.75 * np.log(3)
    spread = [0.75 * (entropy + np.log(0.75)), 0.25 * (entropy + np.log(0.25))]
    assert found.entropy.tolist() == pytest.approx([entropy] * 2)
    assert found.discriminator.tolist() == pytest.approx(spread) and sum(spread) == pytest.approx(0)
    assert found.expected.tolist() == pytest.approx([0.75 * spread[0] + 0.25 * spread[1]] * 2)


@given(st.integers(0, 1000), st.floats(-2, 2), st.floats(0.5, 2))
@settings(max_examples=30)
def test_the_tabular_change_is_the_derivative_along_a_policy_gradient_step(seed, advantage, ratio):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, generator=rng, dtype=torch.float64) * 2
    token = torch.randint(0, 7, (5,), generator=rng)
    step = advantage * ratio * (torch.nn.functional.one_hot(token, 7) - logits.softmax(1))
    size = 1e-5
    slope = (entropy_of(logits + size * step) - entropy_of(logits - size * step)) / (2 * size)
    found = tabular_change(logit_signals(logits, token), torch.full((5,), advantage), ratio)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8)


def test_the_mean_tabular_change_over_samples_is_the_covariance_law():
    """For the expected step Δz = p A the change is -Cov(log p, p A) under p (2505.22617, Theorem 1)."""
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantage = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chances = logits.softmax(0)
    advantage = advantage - chances @ advantage
    each = tabular_change(logit_signals(logits.repeat(9, 1), torch.arange(9)), advantage)
    step, logs = chances * advantage, chances.log()
    covariance = chances @ (logs * step) - (chances @ logs) * (chances @ step)
    assert float(chances @ each) == pytest.approx(-float(covariance))


def test_certain_contexts_are_not_nan():
    found = logit_signals(torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -800.0, -900.0]]), torch.tensor([0, 0]))
    for value in vars(found).values():
        assert value.isfinite().all()
    assert found.entropy.tolist() == pytest.approx([0, 0])


class Run:
    """A small Llama that learns the code of a safe by GRPO, on policy, from the engine's own samples."""

    def __init__(self, **options):
        self.model = build_small_model(len(TOKENIZER), hidden=32, layers=2, heads=2, intermediate=64, seed=0)
        self.learner = Learner(self.model, recipe("grpo"), LearnerConfig(**options))
        self.format = PlainFormat(TOKENIZER)
        self.engine = TorchEngine(self.model)

    def play(self, step):
        self.engine.load_weights(None, version=step)
        policy = EnginePolicy(self.engine, self.format, SamplingParams(), max_action_tokens=2)
        plan = [RolloutTask(task, 8, 1000 * step + n) for n, task in enumerate(TASKS)]
        trees = rollout(policy, InlinePool(72, make=Safe), self.format, plan, split="train", max_context_tokens=64)
        return Minibatch.from_trees(paid(trees))


def paid(trees):
    """Words of the safe are paid a little, so that there is something to compare from the start."""
    for tree in trees:
        for trajectory in tree.trajectories:
            words = [node.text for node in tree.path(trajectory.leaves[0]) if node.role == "action"]
            trajectory.reward += 0.2 * sum(word in tree.task for word in words if word)
    return trees


@pytest.fixture(scope="module")
def watched():
    """Predicted, measured and tabular change of each of 40 updates."""
    run = Run(lr=1e-3)
    rows = [
        observed_update(run.learner, batch, lambda batch=batch: run.learner.update(batch))
        for batch in map(run.play, range(40))
    ]
    return [{name: value for name, value in row.items() if name.startswith("oracle/")} for row in rows]


def test_the_prediction_comes_true_step_by_step_in_a_small_on_policy_run(watched):
    predicted, measured, tabular = (
        [row[f"oracle/{name}"] for row in watched] for name in ("predicted", "measured", "tabular")
    )
    assert np.std(measured) > 1e-3
    assert correlation(predicted, measured) > 0.9
    assert correlation_metrics(watched)["oracle/correlation"] == pytest.approx(correlation(predicted, measured))
    assert correlation_metrics(watched)["oracle/tabular_correlation"] == pytest.approx(correlation(tabular, measured))
    assert correlation_metrics(watched[: FEWEST_STEPS - 1]) == {}


def test_the_prediction_comes_true_token_by_token_and_is_of_first_order():
    run = Run(lr=2e-4)
    predicted, measured = [], []
    for step in range(3):
        batch = run.play(step)
        moved = displacement(run, batch)
        foretold, found = first_order(run.learner, batch, moved)
        assert len(foretold) == batch.mask.sum()
        predicted += foretold.tolist()
        measured += found.tolist()
        half = [move / 2 for move in moved]
        both = first_order(run.learner, batch, half), (foretold, found)
        errors = [float((ahead - real).abs().mean()) for ahead, real in both]
        # What is left of second order falls to a quarter when the step is halved.
        assert errors[0] == pytest.approx(errors[1] / 4, rel=0.35)
        for parameter, move in zip(run.model.parameters(), moved, strict=True):
            parameter.data += move
    assert correlation(predicted, measured) > 0.9


def displacement(run, batch):
    """What an update of ``run`` does to its weights, which are put back."""
    start = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.learner.update(batch)
    moved = [parameter.detach() - old for parameter, old in zip(run.model.parameters(), start, strict=True)]
    for parameter, old in zip(run.model.parameters(), start, strict=True):
        parameter.data.copy_(old)
    return moved


def test_the_mean_of_the_tokens_predictions_is_the_prediction_of_the_step():
    run = Run(lr=2e-4)
    batch = run.play(0)
    run.learner.update(batch)  # optimiser state, so that the next two agree
    state = copy.deepcopy(run.learner.state_dict())
    batch = run.play(1)
    moved = displacement(run, batch)
    foretold, found = first_order(run.learner, batch, moved)
    run.learner.load_state_dict(state)
    metrics = observed_update(run.learner, batch, lambda: run.learner.update(batch))
    assert metrics["oracle/predicted"] == pytest.approx(float(foretold.mean()), rel=2e-2)
    assert metrics["oracle/measured"] == pytest.approx(float(found.mean()), rel=1e-3)


def test_watching_an_update_changes_nothing_of_it_and_does_not_depend_on_micro_batches():
    batch = Run().play(0)
    weights, rows = [], []
    for tokens in (60, 100_000):
        run = Run(lr=1e-3, micro_batch_tokens=tokens)
        rows.append(observed_update(run.learner, batch, lambda run=run: run.learner.update(batch)))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    plain = Run(lr=1e-3)
    plain.learner.update(batch)
    torch.testing.assert_close(
        weights[1], torch.cat([parameter.detach().flatten() for parameter in plain.model.parameters()]), rtol=0, atol=0
    )
    for name in ("oracle/predicted", "oracle/measured", "oracle/tabular"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-2, abs=1e-6)


def test_the_tabular_oracle_comes_true_in_an_on_policy_run_of_a_table():
    """Thirty contexts with logits of their own and plain gradient steps: each context, in each of 20 steps."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 6, generator=rng, dtype=torch.float64)
    worth = torch.randn(30, 6, generator=rng, dtype=torch.float64)
    predicted, measured = [], []
    for _ in range(20):
        chances = logits.softmax(1)
        token = torch.multinomial(chances, 1, generator=rng)[:, 0]
        advantage = worth.gather(1, token[:, None])[:, 0] - (chances * worth).sum(1)
        predicted += (0.2 * tabular_change(logit_signals(logits, token), advantage)).tolist()
        table = logits.clone().requires_grad_()
        (advantage * table.log_softmax(1).gather(1, token[:, None])[:, 0]).sum().backward()
        after = logits + 0.2 * table.grad
        measured += (entropy_of(after) - entropy_of(logits)).tolist()
        logits = after
    assert correlation(predicted, measured) > 0.95


def test_a_displacement_of_another_model_is_refused():
    run = Run()
    with pytest.raises(UsageError, match="one tensor for each"):
        first_order(run.learner, run.play(0), [torch.zeros(3)])


def test_signals_are_those_of_the_models_logits_however_many_are_looked_at_together(monkeypatch):
    torch.manual_seed(0)
    model = build_small_model(30, hidden=16, layers=1, heads=2, intermediate=16, max_positions=32, seed=0)
    tokens = torch.randint(0, 30, (3, 9))
    mask = torch.rand(3, 9) < 0.5
    mask[:, 0] = False
    batch = Minibatch(mask=mask, tokens=tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1][mask[:, 1:]]
    expected = logit_signals(logits, tokens[mask], 0.7)
    for numbers in (1, 60, 1 << 24):
        monkeypatch.setattr(oracle, "_NUMBERS", numbers)
        found = oracle._signals(Learner(model, recipe("grpo")), batch, 0.7)
        for name, values in vars(expected).items():
            torch.testing.assert_close(getattr(found, name), values, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_does_not_end_the_correlation():
    rng = np.random.default_rng(0)
    known = [{f"oracle/{name}": float(rng.normal()) for name in ("predicted", "measured")} for _ in range(FEWEST_STEPS)]
    broken = [{"oracle/predicted": None, "oracle/measured": 1.0}, {"oracle/predicted": 1.0, "oracle/measured": np.nan}]
    assert correlation_metrics(known[:4] + broken + known[4:]) == correlation_metrics(known) != {}
    assert correlation_metrics(known[:-1] + broken) == {}

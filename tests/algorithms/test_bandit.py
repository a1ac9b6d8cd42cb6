"""Every method learns a text bandit of two turns, played through the real rollout loop by a table of logits."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from agentropy.agents.engines.base import Completion, EngineStats, SamplingParams, StopReason
from agentropy.agents.engines.uniforms import counter_uniforms
from agentropy.agents.formats import PlainFormat
from agentropy.agents.policies import EnginePolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.algorithms import Minibatch, recipe, recipes
from agentropy.algorithms.recipes import available_presets
from agentropy.envs.pool import EnvResult

from ..agents.inline import InlinePool

WORDS = ["red", "green", "blue"]
TOKENIZER = build_word_tokenizer([*WORDS, "door", "box", "safe"])
TASKS = ["red blue", "green green"]
GROUP = 8


@dataclass
class Safe:
    """Say the two words of the code, one a turn; only both together are paid."""

    task: str
    said: tuple[str, ...] = ()

    def answer(self, slot, command=None):
        if command is not None:
            self.said = (*self.said, command)
        over = len(self.said) == 2
        won = " ".join(self.said) == self.task
        text = f"safe {self.task} door" if not self.said else f"box {self.said[0]}"
        info = {"task": self.task, "won": won, "score": float(won), "goal": self.task}
        return EnvResult(slot, text, float(won), over, False, info)


class Table(torch.nn.Module):
    """One row of logits and one value for each context; an engine, too. It starts with a bias for the three words."""

    def __init__(self, bias=5.0):
        super().__init__()
        self.vocabulary = len(TOKENIZER)
        words = TOKENIZER.convert_tokens_to_ids(WORDS)
        start = torch.zeros(64, self.vocabulary, dtype=torch.float64)
        start[:, words] = bias
        self.logits = torch.nn.Parameter(start)
        self.values = torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))
        self.rows = {}
        self.stats = EngineStats()

    def row(self, context):
        return self.rows.setdefault(tuple(int(token) for token in context), len(self.rows))

    def generate(self, requests, params):
        out = []
        for request in requests:
            with torch.no_grad():
                logprobs = self.logits[self.row(request.tokens)].log_softmax(0)
            uniform = counter_uniforms(np.array([request.seed], np.uint64), np.array(0, np.uint64))[0]
            token = int(torch.searchsorted(logprobs.exp().cumsum(0), uniform).clamp(max=self.vocabulary - 1))
            entropy = float(-(logprobs.exp() * logprobs).sum())
            numbers = [np.array([value], np.float32) for value in (float(logprobs[token]), entropy)]
            out.append(
                Completion(
                    np.array([token], np.int32),
                    numbers[0],
                    numbers[0],
                    numbers[1],
                    numbers[1],
                    StopReason.LENGTH,
                    version=0,
                    cached_tokens=0,
                )
            )
        return out

    def release(self, prefixes=None):
        pass

    def evaluate(self, batch):
        """Log-probabilities, entropies and values [B, L] of the trained tokens, with gradient."""
        spots = batch.mask.nonzero().tolist()
        rows = torch.tensor([self.row(batch.tokens[row, :place].tolist()) for row, place in spots])
        logprobs = self.logits[rows].log_softmax(1)
        blank = torch.zeros(batch.mask.shape, dtype=torch.float64)
        chosen = logprobs.gather(1, batch.tokens[batch.mask][:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(1)
        return tuple(blank.masked_scatter(batch.mask, part) for part in (chosen, entropy, self.values[rows]))


def play(table, made, step, tasks=TASKS, context="full"):
    format = PlainFormat(TOKENIZER)
    policy = EnginePolicy(table, format, SamplingParams(), max_action_tokens=1)
    plan = [RolloutTask(task, GROUP, 1000 * step + n) for n, task in enumerate(tasks)]
    return rollout(
        policy,
        InlinePool(GROUP * len(tasks), make=Safe),
        format,
        plan,
        split="train",
        max_context_tokens=64,
        context=context,
        branching=made.branching,
    )


def batch_of(table, trees):
    batch = Minibatch.from_trees(trees)
    with torch.no_grad():
        logprobs, entropy, values = table.evaluate(batch)
    return batch.replace(old_logprobs=logprobs, old_entropy=entropy, values=values, ref_logprobs=logprobs)


def learn(made, updates, *, lr=0.5, context="full"):
    """Success in the last ten of ``updates`` RL steps of two optimiser steps each."""
    table, won = Table(), []
    optimizer = torch.optim.Adam(table.parameters(), lr=lr)
    for step in range(updates):
        trees = play(table, made, step, context=context)
        won.append(np.mean([trajectory.won for tree in trees for trajectory in tree.trajectories]))
        batch = batch_of(table, trees)
        plan = made.plan(batch)
        for _ in range(2):
            loss, _ = made.loss(batch, plan, *table.evaluate(batch))
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made.on_step_end({})
    return float(np.mean(won[-10:]))


EVERY = [(name, preset) for name in recipes() for preset in (None, *available_presets(name))]
COMPOSED = ["gigpo+empg", "dapo+empg", "arpo+epo", "ppo+epo", "dapo+aepo", "gspo+gigpo"]


@pytest.mark.parametrize(("name", "preset"), [*EVERY, *((name, None) for name in COMPOSED)])
def test_every_recipe_solves_it(name, preset):
    context = "window" if preset == "verl-agent" else "full"
    assert learn(recipe(name, preset=preset, total_steps=30), 30, context=context) >= 0.95


def test_it_is_not_solved_by_chance():
    assert learn(recipe("grpo"), 20, lr=0.0) < 0.3


def ratios(name, **options):
    """Each trained token's ratio after two steps of gradient descent on one batch, and its advantage."""
    table = Table()
    made = recipe(name, **options)
    batch = batch_of(table, play(table, made, 0))
    plan = made.plan(batch)
    for _ in range(2):
        logprobs, *others = table.evaluate(batch)
        loss, _ = made.loss(batch, plan, logprobs, *others)
        table.logits.grad = None
        loss.backward()
        with torch.no_grad():
            table.logits -= 20 * table.logits.grad
    logprobs, *_ = table.evaluate(batch)
    return (logprobs - batch.old_logprobs).exp()[batch.mask], plan.advantages[batch.mask]


def test_aepo_raises_what_ppo_has_clipped_in_the_second_minibatch():
    """Same episodes (no forks), same advantages: only the gradient beyond the bound differs."""
    options = {"initial": GROUP, "dynamic": False, "entropy_advantage": 0.0}
    plain, advantages = ratios("arpo", initial=GROUP)
    carried, same = ratios("aepo", **options)
    assert torch.equal(advantages, same)
    rising = (advantages > 0) & (plain > 1.2)
    assert rising.any() and (carried[rising] > plain[rising] + 1e-3).all()


def test_empg_learns_more_from_steps_that_it_was_sure_of():
    """One certain and one uncertain turn in every episode: EMPG moves weight from the second to the first."""
    table = Table()
    batch = batch_of(table, play(table, recipe("grpo"), 0))
    sure = batch.turn == 0
    batch = batch.replace(old_entropy=torch.where(sure, 0.1, 1.5).double())
    plain = recipe("grpo").plan(batch).advantages
    shaped = recipe("empg", zeta=0.0).plan(batch).advantages
    better = (plain > 0) & batch.mask
    assert (better & sure).any() and (better & ~sure).any()
    change = shaped / torch.where(better, plain, 1)
    assert change[better & sure].min() > 1 > change[better & ~sure].max()
    drift = (recipe("grpo").plan(batch).advantages - recipe("empg", k=0.0, zeta=0.0).plan(batch).advantages)[batch.mask]
    assert torch.allclose(drift, drift[0].expand_as(drift))  # without its factors it only centres


@pytest.mark.parametrize(("alpha", "bounded"), [(2.0, True), (0.0, False)])
def test_a_strong_corridor_holds_entropy_and_a_bonus_alone_does_not(alpha, bounded):
    """Every episode earns nothing, so only EPO's term moves the policy, from an entropy of about 0.3 nats."""
    made = recipe("epo", alpha=alpha, kappa_low=0.5, kappa_high=1.5, entropy_coef=1.0, beta="constant")
    table, measured = Table(bias=7.0), []
    with torch.no_grad():
        table.logits[:, TOKENIZER.convert_tokens_to_ids("red")] += 3.0
    optimizer = torch.optim.SGD(table.parameters(), lr=4.0)
    outside = []
    for step in range(60):
        trees = play(table, made, step, tasks=["nothing wins", "not this"])
        batch = batch_of(table, trees)
        measured.append(float(batch.old_entropy[batch.mask].mean()))
        if step:
            outside.append(measured[-1] > 1.5 * np.mean(measured[:-1]) * 1.1)
        loss, _ = made.loss(batch, made.plan(batch), *table.evaluate(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.on_step_end({})
    assert any(outside) != bounded
    assert measured[-1] > measured[0]

"""Training on packed trees is training on every branch alone: statistics, gradients, updates, for every recipe."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from agentropy.agents.models import build_small_model
from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms import Minibatch, recipe, recipes
from agentropy.algorithms import forward as forward_module
from agentropy.algorithms.critic import Critic
from agentropy.algorithms.forward import token_statistics
from agentropy.algorithms.learner import Learner, LearnerConfig
from agentropy.algorithms.packing import parts

VOCABULARY = 40


def tiny_model(seed=0, **sizes):
    return build_small_model(
        VOCABULARY, **{"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32} | sizes, seed=seed
    )


def norm_in_its_own_type(module, hidden):
    return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def forest(seed, trees=3, members=4, depth=4):
    """Groups whose members fork from one another at random turns, up to ``depth`` turns long; every text is random."""
    random = np.random.default_rng(seed)
    grown = []
    for number in range(trees):
        tree = Tree(f"task {number}", "train")
        root = tree.add(-1, "prompt", random.integers(6, VOCABULARY, random.integers(2, 6)))
        walks: list[list[int]] = []
        for _ in range(members):
            walk = []
            if walks and random.random() < 0.7:
                other = walks[random.integers(len(walks))]
                walk = other[: 2 * int(random.integers(0, len(other) // 2 + 1))]
            for turn in range(len(walk) // 2, int(random.integers(max(1, len(walk) // 2), depth + 1))):
                size = int(random.integers(1, 5))
                action = tree.add(
                    walk[-1] if walk else root,
                    "action",
                    random.integers(6, VOCABULARY, size),
                    sampled=True,
                    logprobs=random.normal(-3.6, 0.3, size),
                    entropies=random.uniform(0, 3, size),
                    turn=turn,
                    reward=float(random.integers(0, 2)),
                )
                seen = random.integers(6, VOCABULARY, random.integers(1, 4))
                walk = [*walk, action, tree.add(action, "observation", seen, turn=turn)]
            reward = sum(tree.nodes[index].reward for index in walk[::2])
            leaves = (walk[-2],) if walk else ()
            tree.trajectories.append(Trajectory(leaves=leaves, reward=reward, turns=len(walk) // 2))
            walks.append(walk)
        grown.append(tree)
    return grown


def batch_of(seed, **sizes):
    return Minibatch.from_trees(forest(seed, **sizes))


@given(st.integers(0, 2**32 - 1), st.integers(1, 120), st.integers(1, 3))
def test_every_row_is_in_one_part_and_every_prefix_stands_once(seed, budget, workers):
    batch = batch_of(seed)
    found = Counter()
    for part in parts(batch, budget, packed=True, workers=workers):
        found.update(part.rows.tolist())
        assert part.pack is not None
        assert part.computed <= budget or len(part.rows) == 1
        prefixes = set()
        for row, number in enumerate(part.rows.tolist()):
            length = int(batch.extent[number]) - 1
            tokens = batch.tokens[number, :length]
            place = part.pack.place[row, :length]
            assert torch.equal(part.pack.tokens[place], tokens)
            assert part.pack.positions[place].tolist() == list(range(length))
            prefixes |= {tuple(tokens[: t + 1].tolist()) for t in range(length)}
        assert part.computed == len(prefixes)
    trained = batch.mask.any(1).nonzero()[:, 0].tolist()
    assert found == Counter(trained)


@pytest.mark.parametrize("budget", [17, 1 << 20])
@pytest.mark.parametrize("materialised", [1 << 24, 0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_statistics_and_gradients_equal_those_of_every_branch_alone(
    dtype, tolerance, budget, materialised, monkeypatch
):
    """With the head's logits kept and recomputed (``materialised``), at a temperature that is not 1."""
    monkeypatch.setattr(forward_module, "_MATERIALISED", materialised)
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_its_own_type)  # transformers computes it in fp32
    batch = batch_of(3, trees=4, members=6)
    found = []
    for packed in (False, True):
        model = tiny_model().to(dtype)
        weight = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *batch.mask.shape))).to(dtype)
        results = torch.zeros(2, *batch.mask.shape, dtype=dtype)
        for part in parts(batch, budget, packed=packed):
            pair = token_statistics(model, part.batch.tokens, part.batch.mask, temperature=0.7, pack=part.pack)
            chosen = weight[:, part.rows, : part.width]
            sum((share * values).sum() for share, values in zip(chosen, pair, strict=True)).backward()
            results[:, part.rows, : part.width] = torch.stack(pair).detach().to(dtype)
        found.append((results, [parameter.grad for parameter in model.parameters()]))
    (plain, gradients), (packed_results, packed_gradients) = found
    torch.testing.assert_close(packed_results, plain, rtol=0, atol=tolerance)
    for one, other in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


def test_a_token_outside_the_vocabulary_is_no_other_token():
    tokens = torch.tensor([[7, 8, VOCABULARY, 0], [7, 8, 9, 10]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    batch = Minibatch(mask=mask, tokens=tokens)
    for packed in (False, True):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            for part in parts(batch, 100, packed=packed):
                token_statistics(tiny_model(), part.batch.tokens, part.batch.mask, pack=part.pack)


def test_a_soft_cap_is_seen_before_the_logits_are_large(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = Gemma2Config(vocab_size=VOCABULARY, final_logit_softcapping=30.0, **sizes, **heads)
    model = Gemma2ForCausalLM(config).eval()
    tokens = torch.randint(1, VOCABULARY, (2, 9))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 3:] = True
    found = []
    for grow in (1, 200):
        with torch.no_grad():
            model.lm_head.weight.mul_(grow)
        for materialised in (0, 1 << 24):
            monkeypatch.setattr(forward_module, "_MATERIALISED", materialised)
            found.append(token_statistics(model, tokens, mask)[0])
    assert float(model(tokens).logits.detach().abs().max()) > 20
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])


@pytest.mark.parametrize("name", recipes())
def test_an_update_on_trees_is_the_update_on_rows(name):
    """Same loss, same gradient norm, same weights after steps of every recipe."""
    results = []
    for unique in (False, True):
        model = tiny_model()
        batch = batch_of(5, trees=4, members=4)
        if recipe(name).needs_reference:
            batch = batch.replace(ref_logprobs=batch.old_logprobs - 0.1)
        config = LearnerConfig(lr=1e-3, clip_norm=math.inf, micro_batch_tokens=40, minibatches=2, unique_tokens=unique)
        learner = Learner(model, recipe(name), config)
        metrics = learner.update(batch, np.random.default_rng(0))
        results.append((metrics, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    (rows, weights), (trees, tree_weights) = results
    for key in ("loss", "grad_norm", "kl/old"):
        assert trees[key] == pytest.approx(rows[key], rel=2e-5, abs=1e-7)
    # Adam divides by the gradient's size, so a rounding error in a tiny gradient shows in the weights.
    torch.testing.assert_close(tree_weights, weights, rtol=0, atol=2e-4)
    assert trees["tokens/unique_ratio"] < 0.95
    assert rows["tokens/unique_ratio"] >= 1.0


def test_a_critic_values_trees_as_it_values_rows():
    model, batch = tiny_model(), batch_of(7)
    critic = Critic(model)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(3))
    values = [
        Learner(model, recipe("ppo"), LearnerConfig(unique_tokens=unique), critic=copy.deepcopy(critic)).values(batch)
        for unique in (False, True)
    ]
    assert values[0][batch.mask].abs().min() > 0
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=5e-6)


def test_scores_of_trees_are_those_of_rows_and_leave_the_model_as_it_was():
    model, batch = tiny_model(), batch_of(9)
    before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    scores = [Learner(model, None, LearnerConfig(unique_tokens=unique)).score(batch) for unique in (False, True)]
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_groups_stay_together_where_they_are_dealt_out():
    batch = batch_of(11, trees=8, members=4)
    model = tiny_model()
    ratios = {}
    for shuffle in ("rows", "groups"):
        config = LearnerConfig(lr=0.0, minibatches=8, shuffle=shuffle)
        learner = Learner(model, recipe("grpo"), config)
        for rows in learner._minibatches(batch, np.random.default_rng(0)):
            if shuffle == "groups":
                assert len(set(batch.group[rows].tolist())) == 1
        ratios[shuffle] = learner.update(batch, np.random.default_rng(0))["tokens/unique_ratio"]
    assert ratios["groups"] < ratios["rows"]

"""The critic: a state's value sees what came before it and nothing else, whatever the model; and it survives a
checkpoint."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from agentropy.agents.models import build_small_model
from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.algorithms import Minibatch, recipe
from agentropy.algorithms.checkpoint import load_state, save_checkpoint
from agentropy.algorithms.critic import Critic
from agentropy.algorithms.learner import Learner, LearnerConfig
from agentropy.errors import UsageError

VOCABULARY = 20
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OTHERS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "qwen3": Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, **SIZES),
    "gemma2": Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, pad_token_id=0, **SIZES),
    "gpt_neox": GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **SIZES),
    # The embeddings, and so the head's input, are narrower than the layers.
    "opt": OPTConfig(vocab_size=VOCABULARY, ffn_dim=32, word_embed_proj_dim=8, **SIZES),
}


def language_model(name: str = "llama") -> PreTrainedModel:
    if name == "llama":
        return build_small_model(VOCABULARY, hidden=16, layers=2, heads=2, intermediate=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(OTHERS[name]).eval()


def opinionated(model: PreTrainedModel) -> Critic:
    """A critic whose values differ from state to state."""
    critic = Critic(model).eval()
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(critic.head.bias, 0.3)
    return critic


def rows(count: int = 4, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(6, VOCABULARY, (count, width), generator=generator)
    mask = torch.rand(count, width, generator=generator) < 0.5
    mask[:, 0] = False
    return tokens, mask


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_a_value_is_that_of_the_tokens_before_it(name: str) -> None:
    """Each one equals the head on the last hidden state of exactly those tokens, computed alone."""
    model = language_model(name)
    critic, (tokens, mask) = opinionated(model), rows()
    values = critic.values(tokens, mask)
    assert values.dtype == torch.float32 and not values[~mask].any() and values[mask].std() > 1e-3
    for row, column in mask.nonzero().tolist():
        before = model.base_model(input_ids=tokens[row : row + 1, :column]).last_hidden_state[0, -1]
        expected = before @ critic.head.weight[0] + critic.head.bias[0]
        assert values[row, column].item() == pytest.approx(expected.item(), abs=1e-5)


def test_no_value_sees_its_own_token_or_a_later_one() -> None:
    critic, (tokens, mask) = opinionated(language_model()), rows(1)
    mask[0, 1:] = True
    values = critic.values(tokens, mask)
    for column in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[0, column] = 6 + (tokens[0, column] - 5) % (VOCABULARY - 6)
        moved = (critic.values(changed, mask) - values).abs() > 1e-6
        assert moved[0].tolist() == [at > column for at in range(tokens.shape[1])]


def test_it_begins_at_zero_as_a_copy_that_shares_nothing() -> None:
    model, (tokens, mask) = language_model(), rows()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    critic = Critic(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not critic.values(tokens, mask).any()
    assert all(torch.equal(p, before[f"model.{name}"]) for name, p in critic.body.named_parameters())
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any("lm_head" in name for name, _ in critic.named_modules())


def test_the_head_sees_the_states_of_trained_tokens_only() -> None:
    critic, (tokens, mask) = opinionated(language_model()), rows()
    seen: list[torch.Size] = []
    critic.head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    critic.values(tokens, mask)
    assert seen == [(int(mask.sum()), 16)]


def test_values_are_single_precision_whatever_the_body_computes_in() -> None:
    tokens, mask = rows()
    exact = opinionated(language_model()).values(tokens, mask)
    coarse = opinionated(language_model().to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        cast = opinionated(language_model()).values(tokens, mask)
    assert coarse.head.weight.dtype == torch.float32
    for values in (cast, coarse.values(tokens, mask)):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, exact, rtol=0, atol=0.1)
        # Numbers that bfloat16 does not have.
        assert not torch.equal(values, values.bfloat16().float())


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="nothing comes before the first token"):
        Critic(language_model()).values(torch.ones(1, 2).long(), torch.ones(1, 2).bool())
    for model in (torch.nn.Linear(2, 2), language_model().base_model):
        with pytest.raises(UsageError, match=f"causal language model of transformers, not from {type(model).__name__}"):
            Critic(model)


def test_a_checkpoint_holds_the_critic_bit_for_bit(tmp_path) -> None:
    tokenizer = build_word_tokenizer(["go to fridge 1"])
    tokens, mask = rows(8)
    tokens = 6 + tokens % (len(tokenizer) - 6)
    batch = Minibatch(tokens=tokens, mask=mask, group=torch.arange(8) // 4, returns=torch.arange(8) % 3.0)

    def learner(seed: int) -> Learner:
        model = build_small_model(len(tokenizer), hidden=16, layers=1, heads=2, intermediate=16, seed=seed)
        return Learner(model, recipe("ppo", lam=0.9), LearnerConfig(lr=1e-2, critic_lr=3e-2, weight_decay=0.1))

    kept, resumed = learner(0), learner(1)
    for _ in range(3):
        kept.update(batch)
    folder = save_checkpoint(tmp_path, "step-000003", kept.model, tokenizer, kept.state_dict(), keep=1)
    resumed.model.load_state_dict(kept.model.state_dict())
    resumed.load_state_dict(load_state(folder))
    for _ in range(2):
        one, two = kept.update(batch), resumed.update(batch)
        assert all(two[name] == value for name, value in one.items() if "second" not in name)
    assert kept.critic is not None and resumed.critic is not None
    assert math.isfinite(one["value_loss"]) and kept.values(batch).any()
    for (name, left), right in zip(kept.critic.named_parameters(), resumed.critic.parameters(), strict=True):
        assert torch.equal(left, right), name

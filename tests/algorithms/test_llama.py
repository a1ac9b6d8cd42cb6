"""The update's own forward pass of Llama-type models is that of transformers, on every branch and in its gradients."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentropy.algorithms import llama
from agentropy.kernels.trees import pack_tree

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=SCALING, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}


def build(make):
    """Random norms and biases too, so that none of them is left untested."""
    generator = torch.Generator().manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model


def test_the_embedding_of_padding_is_not_trained_just_as_in_transformers():
    model = build(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=7)))
    pack = pack_tree([[3, 7, 5, 7], [3, 7, 9]])
    llama.hidden_states(model, pack).square().sum().backward()
    found, model.model.embed_tokens.weight.grad = model.model.embed_tokens.weight.grad, None
    for row in ([3, 7, 5, 7], [9]):
        rows = torch.tensor([[3, 7, 9]]) if row == [9] else torch.tensor([row])
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[0]
        hidden[-len(row) :].square().sum().backward()
    expected = model.model.embed_tokens.weight.grad
    assert not expected[7].any() and expected[3].any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_transformers(name):
    model = build(MODELS[name])
    assert llama.supports(model)
    random = np.random.default_rng(0)
    prompt = random.integers(0, 50, 9)
    rows = [np.concatenate((prompt, random.integers(0, 50, size))) for size in (1, 4, 12, 7)]
    pack = pack_tree(rows)
    weights = [torch.from_numpy(random.normal(size=(len(row), 24))).float() for row in rows]

    hidden = llama.hidden_states(model, pack)
    places = [place[place >= 0] for place in pack.place]
    sum((hidden[place] * weight).sum() for place, weight in zip(places, weights, strict=True)).backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    for row, place, weight in zip(rows, places, weights, strict=True):
        alone = model.model(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[place], alone, rtol=1e-4, atol=2e-5)
        (alone * weight).sum().backward()
    expected = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert gradients.keys() == expected.keys()
    for key, value in gradients.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5 * max(1.0, scale), msg=key)


def test_other_models_and_types_are_left_to_transformers():
    assert not llama.supports(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)))
    assert not llama.supports(MistralForCausalLM(MistralConfig(**SIZES)))
    model = build(MODELS["llama"])
    assert not llama.supports(model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not llama.supports(model.float())

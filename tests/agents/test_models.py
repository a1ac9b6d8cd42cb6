"""Small models are reproducible, and a model that cannot be loaded says why."""

import pytest
import torch

from agentropy.agents.models import build_small_model, compose_names, load_model
from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.errors import UsageError


def test_the_default_model_has_one_to_five_million_parameters_and_uses_sdpa():
    model = build_small_model(1000)
    assert 1e6 < model.num_parameters() < 5e6
    assert model.config._attn_implementation == "sdpa"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_untouched():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build_small_model(50, hidden=16, intermediate=32, layers=1, seed=3)
    assert torch.equal(torch.rand(3), expected)
    second = build_small_model(50, hidden=16, intermediate=32, layers=1, seed=3)
    other = build_small_model(50, hidden=16, intermediate=32, layers=1, seed=4)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


@pytest.mark.parametrize("hidden", [64, 256])
def test_weights_start_as_wide_as_the_square_root_of_the_width_allows(hidden):
    """A projection of ``hidden`` inputs then keeps their variance; attention starts otherwise, see below."""
    model = build_small_model(500, hidden=hidden, layers=1)
    for name, weight in model.named_parameters():
        if "norm" not in name and "self_attn" not in name:
            assert weight.std().item() == pytest.approx(hidden**-0.5, rel=0.05), name


def test_grouped_heads_are_built():
    model = build_small_model(50, hidden=16, heads=4, kv_heads=2, intermediate=32, layers=1)
    assert model.config.num_key_value_heads == 2


@pytest.mark.parametrize("sizes", [{"hidden": 100, "heads": 3}, {"heads": 4, "kv_heads": 3}])
def test_sizes_that_do_not_divide_are_refused(sizes):
    with pytest.raises(UsageError):
        build_small_model(50, **sizes)


def test_a_saved_model_loads_with_its_tokenizer(tmp_path):
    tokenizer = build_word_tokenizer(["go to fridge 1"])
    model = build_small_model(len(tokenizer), hidden=16, intermediate=32, layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = load_model(tmp_path, dtype="bfloat16")
    assert words.get_vocab() == tokenizer.get_vocab()
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    ids = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(loaded(ids).logits.float(), model(ids).logits, atol=0.02, rtol=0.02)


def test_a_missing_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="hf download nobody/no-such-model") as raised:
        load_model("nobody/no-such-model")
    assert "\n" not in str(raised.value)
    (tmp_path / "step-100").mkdir()
    with pytest.raises(UsageError, match="did you mean 'step-100'"):
        load_model(tmp_path / "step-10")
    with pytest.raises(UsageError, match=r"config\.json"):
        load_model(tmp_path / "step-100")


def test_broken_weights_are_named(tmp_path):
    tokenizer = build_word_tokenizer(["go"])
    build_small_model(len(tokenizer), hidden=16, intermediate=32, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(tmp_path)


def test_an_unknown_dtype_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        load_model("org/model", dtype="bfloat15")


def test_numbered_names_begin_near_their_noun_and_each_other():
    tokenizer = build_word_tokenizer(["mug", "mug 1", "mug 2", "desk", "desk 1"])
    model = build_small_model(len(tokenizer), seed=0)
    compose_names(model, tokenizer)
    weight, ids = model.get_input_embeddings().weight.detach(), tokenizer.get_vocab()

    def alike(a: str, b: str) -> float:
        return torch.cosine_similarity(weight[ids[a]], weight[ids[b]], dim=0).item()

    assert min(alike("mug 1", "mug"), alike("mug 1", "mug 2"), alike("mug 1", "desk 1")) > 0.3
    assert abs(alike("mug 1", "desk")) < 0.3 and abs(alike("mug", "desk")) < 0.3


def test_attention_starts_by_writing_out_what_it_attends_to():
    for layer in build_small_model(50, hidden=64, heads=4, seed=1).model.layers:
        attention = layer.self_attn
        copied = attention.o_proj.weight @ attention.v_proj.weight
        torch.testing.assert_close(copied, 9 * torch.eye(64), rtol=0, atol=1e-4)

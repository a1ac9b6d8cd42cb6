"""The torch engine gives what a plain forward pass over the whole sequence gives, however it is cached."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentropy.agents.engines import Completion, Engine, Request, SamplingParams, StopReason
from agentropy.agents.engines.llama import LlamaRunner
from agentropy.agents.engines.radix import RadixTree
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.agents.messages import ParsedAction
from agentropy.agents.policies import Context
from agentropy.algorithms.assembly import Agent, engine_policy
from agentropy.config import load_config
from agentropy.errors import AgentropyError, UsageError

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True))


def _llama3() -> PreTrainedModel:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=scaling))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=256)
    return GPT2LMHeadModel(config)


def _neox() -> PreTrainedModel:
    heads = {"num_attention_heads": 6, "max_position_embeddings": 256}
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, **heads)
    )


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {name: size for name, size in SIZES.items() if name != "initializer_range"}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=16, sliding_window=24, layer_types=kinds))


FUSED = {"llama": _llama, "llama3": _llama3, "qwen2": _qwen2, "qwen3": _qwen3}
GENERIC = {"mistral": _mistral, "gpt2": _gpt2, "neox": _neox, "gemma3": _gemma3}


def build(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A model with random weights, norms and biases included, so that none of them is left untested."""
    generator = torch.Generator().manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build(_llama)


def contexts(count: int, seed: int = 0, low: int = 3, high: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCABULARY, size=rng.integers(low, high)).astype(np.int32) for _ in range(count)]


def requests(tokens: Sequence[np.ndarray], max_tokens: int = 6, seed: int = 0) -> list[Request]:
    return [Request(context, seed=seed + i, max_tokens=max_tokens) for i, context in enumerate(tokens)]


def assert_exact(model: PreTrainedModel, request: Request, completion: Completion, temperature: float = 1.0) -> None:
    """Compare a completion's statistics with one forward pass over context and completion."""
    sequence = torch.from_numpy(np.concatenate((request.tokens, completion.tokens))).long()[None]
    with torch.no_grad():
        logits = model(sequence).logits[0, len(request.tokens) - 1 : -1].double()
    for scale, logprobs, entropies in (
        (temperature, completion.logprobs, completion.entropies),
        (1.0, completion.raw_logprobs, completion.raw_entropies),
    ):
        logp = torch.log_softmax(logits / scale, dim=-1)
        picked = logp[torch.arange(len(logp)), torch.from_numpy(completion.tokens).long()]
        np.testing.assert_allclose(logprobs, picked.numpy(), atol=1e-4)
        np.testing.assert_allclose(entropies, -(logp.exp() * logp).sum(-1).numpy(), atol=1e-4)


def play(engine: Engine, model: PreTrainedModel, turns: int, params: SamplingParams) -> list[Completion]:
    """Multi-turn episodes of ragged observations and actions; every completion is checked."""
    rng = np.random.default_rng(1)
    histories = contexts(6, seed=2)
    played: list[Completion] = []
    for turn in range(turns):
        asked = [
            Request(history, seed=1000 * turn + i, max_tokens=int(rng.integers(1, 8)))
            for i, history in enumerate(histories)
        ]
        done = engine.generate(asked, params)
        played.extend(done)
        for request, completion in zip(asked, done, strict=True):
            assert_exact(model, request, completion, params.temperature)
        histories = [
            np.concatenate((h, c.tokens, rng.integers(VOCABULARY, size=rng.integers(1, 20)))).astype(np.int32)
            for h, c in zip(histories, done, strict=True)
        ]
    return played


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_multi_turn_statistics_equal_a_full_forward(make: Callable[[], PreTrainedModel], fused: bool) -> None:
    model = build(make)
    engine = TorchEngine(model, fused=fused, max_batch=8, cache_tokens=4096)
    play(engine, model, 5, SamplingParams(temperature=0.7, stop_token_ids=(3, 4, 5, 6)))
    assert engine.stats.cached_tokens > engine.stats.prefill_tokens


@pytest.mark.parametrize("make", GENERIC.values(), ids=GENERIC)
def test_other_architectures_run_through_their_own_forward(make: Callable[[], PreTrainedModel]) -> None:
    model = build(make)
    assert not LlamaRunner.supports(model)
    engine = TorchEngine(model, max_batch=8, cache_tokens=4096)
    play(engine, model, 4, SamplingParams(temperature=1.2))
    assert engine.stats.cached_tokens > engine.stats.prefill_tokens


def test_both_paths_give_the_same_tokens(llama: PreTrainedModel) -> None:
    params = SamplingParams(temperature=0.9, top_k=40, top_p=0.95)
    played = [play(TorchEngine(llama, fused=fused), llama, 4, params) for fused in (True, False)]
    for fast, slow in zip(played[0], played[1], strict=True):
        np.testing.assert_array_equal(fast.tokens, slow.tokens)
        assert fast.stop == slow.stop and fast.cached_tokens == slow.cached_tokens


def test_next_turn_computes_only_its_new_tokens(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama)
    first = requests(contexts(5))
    done = engine.generate(first, SamplingParams())
    assert [c.cached_tokens for c in done] == [0] * 5
    longer = [
        np.concatenate((r.tokens, c.tokens, [1, 2, 3])).astype(np.int32) for r, c in zip(first, done, strict=True)
    ]
    before = engine.stats.prefill_tokens
    again = engine.generate(requests(longer), SamplingParams())
    # The last sampled token has not been read yet: it is computed with the observation.
    assert [c.cached_tokens for c in again] == [
        len(r.tokens) + len(c.tokens) - 1 for r, c in zip(first, done, strict=True)
    ]
    assert engine.stats.prefill_tokens - before == 5 * 4


def test_a_group_of_equal_prompts_is_computed_once(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama)
    prompt = contexts(1, low=30, high=31)[0]
    group = requests([prompt] * 8)
    done = engine.generate(group, SamplingParams())
    assert engine.stats.prefill_tokens == 30 and engine.stats.cached_tokens == 7 * 30
    assert len({c.tokens.tobytes() for c in done}) > 1
    for request, completion in zip(group, done, strict=True):
        assert_exact(llama, request, completion)
        alone = TorchEngine(llama).generate([request], SamplingParams())[0]
        np.testing.assert_array_equal(alone.tokens, completion.tokens)


def test_siblings_share_a_prefix_within_a_batch_and_across_calls(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama)
    stem = contexts(1, low=50, high=51)[0]
    branches = [np.concatenate((stem, tail)) for tail in contexts(4, seed=9, low=5, high=6)]
    twigs = [np.concatenate((branches[0], tail)) for tail in contexts(3, seed=10, low=30, high=31)]
    asked = requests([*branches, *twigs])
    done = engine.generate(asked, SamplingParams())
    # One twig carries the stem and its branch; the others compute what is theirs alone.
    assert engine.stats.prefill_tokens <= 50 + 4 * 5 + 3 * 30
    later = requests([np.concatenate((stem, [i])).astype(np.int32) for i in range(3)])
    again = engine.generate(later, SamplingParams())
    assert [c.cached_tokens for c in again] == [50] * 3
    for request, completion in zip([*asked, *later], [*done, *again], strict=True):
        assert_exact(llama, request, completion)


def test_repeating_a_request_recomputes_only_its_last_token(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama)
    asked = requests(contexts(3))
    first = engine.generate(asked, SamplingParams())
    second = engine.generate(asked, SamplingParams())
    assert [c.cached_tokens for c in second] == [len(r.tokens) - 1 for r in asked]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("fused", [True, False])
def test_a_tiny_cache_evicts_and_stays_exact(llama: PreTrainedModel, fused: bool) -> None:
    engine = TorchEngine(llama, fused=fused, max_batch=4, cache_tokens=400)
    played = play(engine, llama, 5, SamplingParams())
    roomy = play(TorchEngine(llama, fused=fused), llama, 5, SamplingParams())
    for small, large in zip(played, roomy, strict=True):
        np.testing.assert_array_equal(small.tokens, large.tokens)


def test_a_sequence_beyond_the_cache_is_a_clear_error(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, cache_tokens=64)
    with pytest.raises(UsageError, match="cache_tokens=64"):
        engine.generate(requests([np.zeros(60, dtype=np.int32)], max_tokens=10), SamplingParams())
    assert len(engine.generate(requests(contexts(2)), SamplingParams())) == 2


def test_rows_alone_in_any_order_and_in_waves_give_the_same_tokens(llama: PreTrainedModel) -> None:
    asked = requests(contexts(9, seed=5), max_tokens=12)
    together = TorchEngine(llama).generate(asked, SamplingParams())
    waves = TorchEngine(llama, max_batch=2).generate(asked, SamplingParams())
    reverse = TorchEngine(llama).generate(asked[::-1], SamplingParams())[::-1]
    for i, request in enumerate(asked):
        alone = TorchEngine(llama).generate([request], SamplingParams())[0]
        for other in (together[i], waves[i], reverse[i]):
            np.testing.assert_array_equal(other.tokens, alone.tokens)
            np.testing.assert_allclose(other.logprobs, alone.logprobs, atol=1e-4)


def test_seeds_choose_the_tokens(llama: PreTrainedModel) -> None:
    context = contexts(1)[0]
    engine = TorchEngine(llama)
    seeds = [7, 7, 8, 2**64 - 1]
    done = engine.generate([Request(context, seed=s, max_tokens=20) for s in seeds], SamplingParams())
    np.testing.assert_array_equal(done[0].tokens, done[1].tokens)
    assert len({c.tokens.tobytes() for c in done}) == 3
    short = engine.generate([Request(context, seed=7, max_tokens=5)], SamplingParams())[0]
    np.testing.assert_array_equal(short.tokens, done[0].tokens[:5])


def test_greedy_equals_transformers_generate(llama: PreTrainedModel) -> None:
    asked = requests(contexts(4), max_tokens=15)
    done = TorchEngine(llama).generate(asked, SamplingParams(temperature=0))
    for request, completion in zip(asked, done, strict=True):
        ids = torch.from_numpy(request.tokens).long()[None]
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=15,
            eos_token_id=None,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(completion.tokens, out[0, len(request.tokens) :].numpy())
        assert_exact(llama, request, completion)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.3), (10, 0.5)])
def test_truncated_sampling_keeps_full_softmax_statistics(llama: PreTrainedModel, top_k: int, top_p: float) -> None:
    asked = requests(contexts(6), max_tokens=10)
    params = SamplingParams(temperature=1.5, top_k=top_k, top_p=top_p)
    for request, completion in zip(asked, TorchEngine(llama).generate(asked, params), strict=True):
        assert_exact(llama, request, completion, 1.5)
        sequence = torch.from_numpy(np.concatenate((request.tokens, completion.tokens))).long()[None]
        with torch.no_grad():
            logits = llama(sequence).logits[0, len(request.tokens) - 1 : -1]
        rank = (logits > logits.gather(1, sequence[0, len(request.tokens) :, None])).sum(dim=1)
        if top_k:
            assert int(rank.max()) < top_k


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.4])
def test_entropies_can_be_estimated_from_the_most_probable_tokens(llama: PreTrainedModel, temperature: float) -> None:
    asked = requests(contexts(6), max_tokens=10)
    asked.append(Request(np.resize(asked[0].tokens, 256).astype(np.int32), seed=0, max_tokens=10))
    engine = TorchEngine(llama)
    exact = engine.generate(asked, SamplingParams(temperature=temperature))
    done = engine.generate(asked, SamplingParams(temperature=temperature, entropy_top_k=5))
    assert {c.entropy_top_k for c in exact} == {0} and {c.entropy_top_k for c in done} == {5}
    for request, completion, whole in zip(asked[:-1], done, exact, strict=False):
        np.testing.assert_array_equal(completion.tokens, whole.tokens)
        np.testing.assert_allclose(completion.logprobs, whole.logprobs, atol=1e-4)
        sequence = torch.from_numpy(np.concatenate((request.tokens, completion.tokens))).long()[None]
        with torch.no_grad():
            logits = llama(sequence).logits[0, len(request.tokens) - 1 : -1].double()
        for scale, entropies in ((temperature or 1.0, completion.entropies), (1.0, completion.raw_entropies)):
            for row, token, estimate in zip(logits, completion.tokens, entropies, strict=True):
                logp = torch.log_softmax(row / scale, dim=-1)
                known = list({*logp.topk(5).indices.tolist(), int(token)})
                assert float(estimate) == pytest.approx(float(-(logp[known].exp() * logp[known]).sum()), abs=1e-4)
    for request, completion in zip(
        asked, engine.generate(asked, SamplingParams(temperature=temperature, entropy_top_k=VOCABULARY)), strict=True
    ):
        assert_exact(llama, request, completion, temperature or 1.0)


class Silence:
    """A format for which every action is an empty command."""

    stop_token_ids = ()
    stop_strings = ()

    def parse(self, tokens: list[int], info: dict[str, object]) -> ParsedAction:
        return ParsedAction("", valid=True, closed=True, text="")


@pytest.mark.parametrize("entropy_top_k", [0, 5])
def test_an_action_says_what_its_entropies_are(llama: PreTrainedModel, entropy_top_k: int) -> None:
    config = load_config(overrides=[f"agent.entropy_top_k={entropy_top_k}", "agent.max_action_tokens=10"])
    policy = engine_policy(Agent(llama, None, Silence()), TorchEngine(llama), config, 0.8)
    assert policy.vocabulary == VOCABULARY
    (request,) = requests(contexts(1), max_tokens=10)
    (act,) = policy.act([Context(request.tokens, request.seed, 0, "", {})])
    params = SamplingParams(temperature=0.8, entropy_top_k=entropy_top_k)
    (expected,) = TorchEngine(llama).generate([request], params)
    assert act.entropy_top_k == entropy_top_k
    np.testing.assert_array_equal(act.entropies, expected.entropies)


def test_stop_tokens_end_a_row_and_belong_to_it(llama: PreTrainedModel) -> None:
    stops = tuple(range(0, 30))
    done = TorchEngine(llama).generate(requests(contexts(12), max_tokens=40), SamplingParams(stop_token_ids=stops))
    stopped = [c for c in done if c.stop is StopReason.STOP]
    assert len(stopped) > 6 and len({len(c.tokens) for c in stopped}) > 1
    for completion in done:
        inside = np.isin(completion.tokens, stops)
        assert not inside[:-1].any() and inside[-1] == (completion.stop is StopReason.STOP)
        assert len(completion.tokens) == 40 or completion.stop is StopReason.STOP


class Letters:
    """Token t is written as two characters, so that a stop string can end in the middle of a token."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(f"{chr(97 + t // 26)}{chr(97 + t % 26)}" for t in token_ids)


def test_stop_strings_across_token_boundaries(llama: PreTrainedModel) -> None:
    request = requests(contexts(1), max_tokens=12)[0]
    free = TorchEngine(llama).generate([request], SamplingParams())[0]
    text = Letters().decode(free.tokens.tolist())
    stop = text[7:10]
    assert text.find(stop) == 7
    engine = TorchEngine(llama, Letters())
    done = engine.generate([request], SamplingParams(stop_strings=("~", stop)))[0]
    np.testing.assert_array_equal(done.tokens, free.tokens[:5])
    assert done.stop is StopReason.STOP
    with pytest.raises(UsageError, match="tokenizer"):
        TorchEngine(llama).generate([request], SamplingParams(stop_strings=("a",)))


@pytest.mark.parametrize("fused", [True, False])
def test_the_models_last_position_ends_a_row(llama: PreTrainedModel, fused: bool) -> None:
    engine = TorchEngine(llama, fused=fused)
    long = [
        np.resize(context, size).astype(np.int32)
        for context, size in zip(contexts(4), (250, 255, 256, 300), strict=True)
    ]
    done = engine.generate(requests(long, max_tokens=20), SamplingParams())
    assert [len(c.tokens) for c in done] == [6, 1, 0, 0]
    assert all(c.stop is StopReason.CONTEXT for c in done)
    assert_exact(llama, requests(long)[0], done[0])
    exact = engine.generate(requests(long[:1], max_tokens=6), SamplingParams())[0]
    assert exact.stop is StopReason.LENGTH


@pytest.mark.parametrize("fused", [True, False])
def test_new_weights_invalidate_everything(fused: bool) -> None:
    model, other = build(_llama), build(_llama, seed=1)
    engine = TorchEngine(model, fused=fused)
    asked = requests(contexts(4))
    old = engine.generate(asked, SamplingParams())
    engine.load_weights(other.state_dict(), version=3)
    new = engine.generate(asked, SamplingParams())
    assert [c.version for c in old] == [0] * 4 and [c.version for c in new] == [3] * 4
    assert all(c.cached_tokens == 0 for c in new)
    for request, completion in zip(asked, new, strict=True):
        assert_exact(other, request, completion)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    engine.load_weights(None, version=4)
    for request, completion in zip(asked, engine.generate(asked, SamplingParams()), strict=True):
        assert_exact(model, request, completion)
        assert completion.cached_tokens == 0 and completion.version == 4


def test_a_copy_in_another_type_follows_the_shared_module() -> None:
    model = build(_llama)
    engine = TorchEngine(model, dtype=torch.float64)
    asked = requests(contexts(2))
    before = model.get_input_embeddings().weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)
    engine.load_weights(None, version=1)
    for request, completion in zip(asked, engine.generate(asked, SamplingParams()), strict=True):
        assert_exact(model, request, completion)
    torch.testing.assert_close(model.get_input_embeddings().weight, before * 0.8)
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_weights_that_do_not_fit_are_named(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama)
    state = dict(llama.state_dict())
    with pytest.raises(UsageError, match="'zzz' is unknown"):
        engine.load_weights({**state, "zzz": torch.zeros(1)}, version=1)
    del state["model.norm.weight"]
    with pytest.raises(UsageError, match=r"'model.norm.weight' is missing"):
        engine.load_weights(state, version=1)
    tied = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}
    engine.load_weights(tied, version=1)


@pytest.mark.parametrize("wrong", ["unknown", "missing", "shape"])
def test_weights_that_do_not_fit_change_nothing(wrong: str) -> None:
    model, other = build(_llama), build(_llama, seed=1)
    engine = TorchEngine(model)
    asked = requests(contexts(2))
    before = engine.generate(asked, SamplingParams())
    state = dict(other.state_dict())
    if wrong == "unknown":
        state["zzz"] = torch.zeros(1)
    elif wrong == "missing":
        del state["model.norm.weight"]
    else:
        state["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(UsageError, match=r"do not fit the model: '(zzz|model\.norm\.weight)'"):
        engine.load_weights(state, version=1)
    for name, tensor in build(_llama).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    for old, new in zip(before, engine.generate(asked, SamplingParams()), strict=True):
        np.testing.assert_array_equal(old.tokens, new.tokens)
        assert new.version == 0


def test_closing_frees_the_memory_of_the_cache(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, cache_tokens=4096)
    engine.generate(requests(contexts(2)), SamplingParams())
    cache = weakref.ref(engine.cache.kv)
    engine.close()
    gc.collect()
    assert cache() is None


def test_bfloat16_is_close_to_float32(llama: PreTrainedModel) -> None:
    model = build(_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    asked = requests(contexts(4))
    for request, completion in zip(
        asked, TorchEngine(model, dtype=torch.bfloat16).generate(asked, SamplingParams()), strict=True
    ):
        sequence = torch.from_numpy(np.concatenate((request.tokens, completion.tokens))).long()[None]
        with torch.no_grad():
            logp = torch.log_softmax(model(sequence).logits[0, len(request.tokens) - 1 : -1], dim=-1)
        picked = logp[torch.arange(len(logp)), torch.from_numpy(completion.tokens).long()]
        np.testing.assert_allclose(completion.logprobs, picked.numpy(), atol=0.15)


def test_diverged_weights_are_an_error_and_leave_no_trace() -> None:
    model, good = build(_llama), build(_llama)
    engine = TorchEngine(model)
    asked = requests(contexts(3))
    broken = {name: tensor * torch.nan for name, tensor in good.state_dict().items()}
    engine.load_weights(broken, version=1)
    with pytest.raises(AgentropyError, match="not finite"):
        engine.generate(asked, SamplingParams())
    engine.load_weights(good.state_dict(), version=2)
    for request, completion in zip(asked, engine.generate(asked, SamplingParams()), strict=True):
        assert_exact(good, request, completion)


def test_release_forgets_a_prefix_and_close_everything(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama)
    asked = requests(contexts(3))
    engine.generate(asked, SamplingParams())
    engine.release([asked[0].tokens])
    cached = [c.cached_tokens for c in engine.generate(asked, SamplingParams())]
    assert cached[0] == 0 and cached[1] == len(asked[1].tokens) - 1
    engine.release()
    assert [c.cached_tokens for c in engine.generate(asked, SamplingParams())] == [0, 0, 0]
    assert isinstance(engine, Engine) and engine.vocabulary == VOCABULARY
    engine.close()
    engine.close()


def test_generation_leaves_the_module_and_the_global_generator_as_they_were() -> None:
    model = build(_gpt2).train()
    state = torch.get_rng_state()
    TorchEngine(model).generate(requests(contexts(2)), SamplingParams())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_random_workload_stays_exact(llama: PreTrainedModel) -> None:
    """Forks, continuations, evictions, repeats and waves in any order, checked against the plain forward."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    engine = TorchEngine(llama, max_batch=6, cache_tokens=int(rng.integers(300, 1500)))
    known = contexts(3, seed=seed)
    for step in range(12):
        asked = []
        for i in range(rng.integers(1, 12)):
            base = known[rng.integers(len(known))]
            kept = base[: rng.integers(1, len(base) + 1)]
            tail = rng.integers(VOCABULARY, size=rng.integers(0, 12))
            context = np.concatenate((kept, tail)).astype(np.int32)[:180]
            asked.append(Request(context, seed=100 * step + i, max_tokens=int(rng.integers(1, 10))))
        done = engine.generate(asked, SamplingParams(stop_token_ids=(1, 2, 3)))
        for request, completion in zip(asked, done, strict=True):
            assert_exact(llama, request, completion)
            known.append(np.concatenate((request.tokens, completion.tokens)))
        known = known[-12:]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Request(np.zeros(0, dtype=np.int32), seed=0, max_tokens=1),
        lambda: Request(np.zeros(2), seed=0, max_tokens=1),
        lambda: Request(np.zeros(2, dtype=np.int32), seed=-1, max_tokens=1),
        lambda: Request(np.zeros(2, dtype=np.int32), seed=0, max_tokens=0),
        lambda: SamplingParams(temperature=-1),
        lambda: SamplingParams(top_p=0),
        lambda: SamplingParams(top_k=-1),
        lambda: SamplingParams(entropy_top_k=-1),
        lambda: SamplingParams(stop_strings=("",)),
    ],
)
def test_bad_requests_are_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="expected"):
        bad()


def test_tokens_outside_the_vocabulary_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="expected ids from 0 to 96"):
        TorchEngine(llama).generate(requests([np.array([1, 97])]), SamplingParams())


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda t: np.array(t, dtype=np.int32))


@given(st.lists(tokens, min_size=1, max_size=6), tokens, st.data())
def test_the_index_finds_the_longest_prefix(held: list[np.ndarray], context: np.ndarray, data: st.DataObject) -> None:
    def shared(a: np.ndarray, b: np.ndarray) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    tree = RadixTree()
    for number, sequence in enumerate(held):
        # Half of them are entered short and extended, as a running request is.
        cut = data.draw(st.integers(1, len(sequence)))
        tree.insert(number, sequence[:cut])
        tree.extend(number, sequence)
    alive = dict(enumerate(held))
    for number in data.draw(st.sets(st.sampled_from(range(len(held))))):
        tree.remove(number)
        del alive[number]
    found, length = tree.match(context)
    assert length == max((shared(sequence, context) for sequence in alive.values()), default=0)
    assert bool(found) == bool(length)
    assert all(shared(alive[number], context) == length for number in found)
    exact = [n for n, sequence in alive.items() if len(sequence) == length and shared(sequence, context) == length]
    assert not exact or sorted(found) == exact
    assert sorted(tree.below(context)) == [
        n for n, sequence in alive.items() if shared(sequence, context) == len(context)
    ]
    assert sorted(tree) == sorted(alive) and len(tree) == len(alive)
    for number, sequence in alive.items():
        assert tree.tokens(number).tolist() == sequence.tolist() and tree.length(number) == len(sequence)


def test_the_cache_evicts_the_least_recently_used(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, max_batch=1, cache_tokens=64 * 16)
    first, second, third, fourth, fifth = requests(contexts(5), max_tokens=1)
    for request in (first, second, third, fourth):
        engine.generate([request], SamplingParams())
    assert engine.generate([first], SamplingParams())[0].cached_tokens
    engine.release([first.tokens])
    engine.generate([fifth], SamplingParams())
    engine.generate([first], SamplingParams())
    # There is room for four: of second to fifth, second was used longest ago.
    assert engine.generate([fifth], SamplingParams())[0].cached_tokens == len(fifth.tokens) - 1
    held = [engine.cache.tree.tokens(number)[: len(second.tokens)].tolist() for number in engine.cache.tree]
    assert second.tokens.tolist() not in held

"""vLLM in process keeps every engine's promises; runs where vLLM can be imported, which is its own environment."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from agentropy.agents.engines import Request, SamplingParams, StopReason
from agentropy.agents.engines.vllm_engine import VLLMEngine
from agentropy.agents.engines.vllm_statistics import statistics, truncated_entropy
from agentropy.errors import AgentropyError, MissingDependencyError, UsageError
from agentropy.kernels.sampling import sample

from .engine_conformance import (
    CLAIMS,
    Subject,
    Words,
    assert_agrees,
    contexts,
    requests,
    tiny_model,
)

HERE = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HERE, reason="vLLM is not installed in this environment")


@pytest.fixture(scope="class")
def subject() -> Iterator[Subject]:
    model = tiny_model()
    engine = VLLMEngine(model, Words(), max_batch=16, cache_bytes=64 << 20)
    yield Subject(engine, model, tolerance=1e-3, token_by_token=True)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.generate(requests(contexts(1)), SamplingParams())


@needs_vllm
class TestOneEngine:
    """Everything that one engine can show."""

    @pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__.removeprefix("check_"))
    def test_conformance(self, subject: Subject, claim: Callable[[Subject], None]) -> None:
        claim(subject)

    def test_it_is_not_exact_and_its_entropies_are_estimates(self, subject: Subject) -> None:
        assert not subject.engine.exact
        done = subject.engine.generate(requests(contexts(1)), SamplingParams())[0]
        assert done.entropy_top_k == 20
        assert subject.engine.generate(requests(contexts(1)), SamplingParams(entropy_top_k=3))[0].entropy_top_k == 3

    def test_streams_share_the_batch_and_hear_of_their_own_requests(self, subject: Subject) -> None:
        asked = requests(contexts(4, seed=20), max_tokens=6)
        cold, hot = SamplingParams(temperature=0.5), SamplingParams(temperature=1.5, top_p=0.9)
        alone = [*subject.engine.generate(asked[:2], cold), *subject.engine.generate(asked[2:], hot)]
        streams = [subject.engine.stream(cold), subject.engine.stream(hot)]
        for i, request in enumerate(asked):
            assert streams[i // 2].add(request) == i % 2
        done = [pair for _ in range(6) for pair in streams[0].step()]
        assert [ticket for ticket, _ in done] == [0, 1] and streams[0].running == 0
        # The other's requests went along, and wait for it.
        assert streams[1].running == 2
        done += streams[1].step()
        for completion, expected in zip((c for _, c in done), alone, strict=True):
            np.testing.assert_array_equal(completion.tokens, expected.tokens)
            np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=1e-4)
            np.testing.assert_allclose(completion.kept_logmass, expected.kept_logmass, atol=1e-4)

    def test_weights_are_not_changed_under_running_requests(self, subject: Subject) -> None:
        stream = subject.engine.stream(SamplingParams())
        stream.add(requests(contexts(1), max_tokens=50)[0])
        stream.step()
        with pytest.raises(UsageError, match="running"):
            subject.engine.load_weights(None, version=1)
        stream.close()
        subject.engine.load_weights(None, version=1)

    def test_diverged_weights_are_an_error_and_leave_no_trace(self, subject: Subject) -> None:
        asked = requests(contexts(3), max_tokens=4)
        good = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
        subject.engine.load_weights({name: tensor * torch.nan for name, tensor in good.items()}, version=5)
        with pytest.raises(AgentropyError, match="not finite"):
            subject.engine.generate(asked, SamplingParams())
        subject.engine.load_weights(good, version=6)
        for request, completion in zip(asked, subject.engine.generate(asked, SamplingParams()), strict=True):
            assert_agrees(subject, request, completion)

    def test_what_vllm_cannot_do_is_said(self, subject: Subject) -> None:
        engine = subject.engine
        assert isinstance(engine, VLLMEngine)
        with pytest.raises(UsageError, match=r"at least 0\.01"):
            engine.generate(requests(contexts(1)), SamplingParams(temperature=0.001))
        if engine._on_cpu:
            with pytest.raises(UsageError, match="CPU"):
                engine.sleep()
            with pytest.raises(UsageError, match="runs on cpu"):
                VLLMEngine(subject.model, device="cuda")
        with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
            VLLMEngine(subject.model, dtype="bfloat6")
        closed = engine.stream(SamplingParams())
        closed.close()
        with pytest.raises(UsageError, match="closed"):
            closed.add(requests(contexts(1))[0])


@needs_vllm
def test_a_folder_in_bfloat16_with_shorter_sequences_and_a_head_of_its_own(tmp_path: Path) -> None:
    """As far from the engine above as it gets, in the same process."""
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
    model.save_pretrained(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    engine = VLLMEngine(tmp_path, dtype="bfloat16", max_model_len=64, cache_bytes=32 << 20, prefix_caching=False)
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1 and torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(threads)
    with pytest.raises(UsageError, match="close"):
        VLLMEngine(model)
    asked = requests(contexts(3, high=40), max_tokens=6)
    for version in (0, 1):
        done = engine.generate(asked, SamplingParams())
        for request, completion in zip(asked, done, strict=True):
            assert completion.version == version and completion.cached_tokens == 0
            assert_agrees(Subject(engine, model, tolerance=0.2), request, completion)
        engine.load_weights(None, version=1)
    long = Request(np.ones(60, np.int32), seed=0, max_tokens=20)
    done = engine.generate([long, Request(np.ones(64, np.int32), 0, 1)], SamplingParams())
    assert [len(c.tokens) for c in done] == [4, 0] and {c.stop for c in done} == {StopReason.CONTEXT}
    with pytest.raises(UsageError, match="tokenizer"):
        engine.stream(SamplingParams(stop_strings=("a",)))
    engine.close()


@needs_vllm
def test_an_untied_model_takes_new_weights_and_nothing_outlives_its_engine() -> None:
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 0.5)
    engine = VLLMEngine(model, Words(), max_batch=4, cache_bytes=32 << 20)
    asked = requests(contexts(3, seed=21))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        model.lm_head.weight.mul_(2.0)
    engine.load_weights(None, version=1)
    for request, completion in zip(asked, engine.generate(asked, SamplingParams()), strict=True):
        assert_agrees(Subject(engine, model), request, completion)
    head = weakref.ref(engine._llm.apply_model(lambda model: model)[0].lm_head)
    assert head() is not None
    engine.close()
    gc.collect()
    assert head() is None


@needs_vllm
def test_what_vllm_cannot_run_is_said_and_the_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="vLLM cannot run"):
        VLLMEngine(tiny_model(), cache_bytes=1 << 10)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UsageError, match="expected it unset or 0"):
        VLLMEngine(tiny_model())
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match=r"torch\.distributed"):
            VLLMEngine(tiny_model())
    finally:
        torch.distributed.destroy_process_group()
    engine = VLLMEngine(tiny_model(), cache_bytes=32 << 20)
    assert len(engine.generate(requests(contexts(2)), SamplingParams())) == 2
    engine.close()


@pytest.mark.skipif(HERE, reason="vLLM is installed")
def test_without_vllm_the_way_to_it_is_named() -> None:
    with pytest.raises(MissingDependencyError, match="make vllm"):
        VLLMEngine(tiny_model())


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_model_len": 1}, {"gpu_memory_utilization": 0.0}])
def test_options_out_of_range_are_named_first(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(bad))}.*expected"):
        VLLMEngine(tiny_model(), **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7, 1.4])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (12, 1.0), (0, 0.7)])
def test_statistics_of_known_numbers_are_those_of_our_own_sampler(temperature: float, top_k: int, top_p: float) -> None:
    """A server's log-probabilities and the two normalisers give what ``sample`` has from the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    drawn = sample(logits, uniforms, temperature, top_k, top_p, entropy_top_k=6)
    raw = torch.log_softmax(logits, -1)
    normaliser = (raw / (temperature or 1.0)).logsumexp(-1)
    ours = statistics(
        drawn.logprob_raw.numpy(),
        raw.topk(6).values.numpy(),
        temperature,
        normaliser.numpy(),
        drawn.kept_logmass.numpy() if temperature else np.zeros(50),
    )
    expected = (
        drawn.logprob_tempered,
        drawn.logprob_raw,
        drawn.entropy_tempered,
        drawn.entropy_raw,
        drawn.logprob_processed,
        drawn.kept_logmass,
    )
    for column, theirs in zip(ours, expected, strict=True):
        assert column.dtype == np.float32
        np.testing.assert_allclose(column, theirs.numpy(), atol=1e-5)


def test_impossible_tokens_add_nothing_to_an_entropy() -> None:
    known = np.log(np.array([[0.5, 0.5, 1e-300]]))
    known[0, 2] = -np.inf
    np.testing.assert_allclose(truncated_entropy(np.log(np.array([0.5])), known), np.log(2))

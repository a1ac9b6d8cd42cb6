"""Continuous batching: requests come and go, blocks are shared, and every token is what a plain forward pass says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from agentropy.agents.engines import Completion, Request, SamplingParams, StopReason
from agentropy.agents.engines import lanes as lanes_module
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.errors import AgentropyError, UsageError
from tests.agents.test_torch_engine import VOCABULARY, _llama, _mistral, _qwen3, assert_exact, build, contexts, requests

Built = dict[int, tuple[Request, Completion]]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build(_llama)


@pytest.fixture(params=["ragged", "blocks"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All rows in one call, as on a CPU, and the gathered block tables of a machine without numba."""
    if request.param == "ragged":
        pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv("KERNELS_BACKEND", {"ragged": "auto", "blocks": "torch"}[request.param])
    return str(request.param)


def drain(stream: Any) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while stream.running:
        ended = stream.step()
        assert [ticket for ticket, _ in ended] == sorted(ticket for ticket, _ in ended)
        assert not done.keys() & dict(ended).keys()
        done.update(ended)
    return done


def assert_accounted(engine: TorchEngine) -> None:
    """Every reference to a block is one that a sequence in the tree or at work holds, and the bound is kept."""
    kv, tree = engine.cache.kv, engine.cache.tree
    counted = np.zeros_like(kv.references)
    alive = [sequence for sequence in range(len(kv.length)) if (kv.tables[sequence] >= 0).any()]
    for sequence in alive:
        table = kv.tables[sequence]
        np.add.at(counted, table[table >= 0], 1)
    np.testing.assert_array_equal(counted, kv.references)
    assert set(tree) <= set(alive)
    assert all(kv.length[sequence] == tree.length(sequence) for sequence in tree) or engine.cache.running


def assert_nothing_leaked(engine: TorchEngine) -> None:
    assert engine.cache.running == 0
    assert_accounted(engine)
    assert sum((engine.cache.kv.tables >= 0).any(axis=1)) == len(engine.cache.tree)
    engine.release()
    assert engine.cache.kv.used == 0 and len(engine.cache.tree) == 0
    assert not engine.cache.kv.length.any()


def test_requests_join_while_others_run_and_give_the_tokens_they_give_alone(
    llama: PreTrainedModel, layout: str
) -> None:
    asked = [Request(c, seed=i, max_tokens=3 + i) for i, c in enumerate(contexts(9, seed=3))]
    engine = TorchEngine(llama, max_batch=4, cache_tokens=4096)
    stream = engine.stream(SamplingParams())
    assert stream.step() == [] and stream.running == 0
    done: dict[int, Completion] = {}
    for number, request in enumerate(asked):
        assert stream.add(request) == number
        done.update(stream.step())
    assert 0 < len(done) < len(asked)
    done.update(drain(stream))
    for ticket, request in enumerate(asked):
        assert_exact(llama, request, done[ticket])
        alone = TorchEngine(llama, cache_tokens=4096).generate([request], SamplingParams())[0]
        np.testing.assert_array_equal(done[ticket].tokens, alone.tokens)
    stream.close()
    assert_nothing_leaked(engine)


def test_a_finished_row_is_replaced_at_once(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, max_batch=2, cache_tokens=4096)
    stream = engine.stream(SamplingParams())
    for i, length in enumerate((1, 4, 2, 1)):
        stream.add(Request(contexts(4)[i], seed=i, max_tokens=length))
    # Two at a time: the places of 0 and 2 are taken in the step after they ended.
    assert [[ticket for ticket, _ in stream.step()] for _ in range(4)] == [[0], [], [2], [1, 3]]
    assert stream.running == 0


def test_a_stream_is_a_function_of_the_calls(llama: PreTrainedModel) -> None:
    def play() -> list[list[tuple[int, bytes]]]:
        stream = TorchEngine(llama, max_batch=3, cache_tokens=4096).stream(SamplingParams())
        steps = []
        for request in requests(contexts(7, seed=1)):
            stream.add(request)
            steps.append([(ticket, c.logprobs.tobytes()) for ticket, c in stream.step()])
        return steps

    assert play() == play()


@pytest.mark.parametrize("make", [_llama, _qwen3, _mistral])
@pytest.mark.parametrize("fused", [True, False])
def test_siblings_of_a_stream_share_a_prefix_and_stay_exact(make: Any, fused: bool, layout: str) -> None:
    model = build(make)
    engine = TorchEngine(model, fused=fused, max_batch=8, cache_tokens=4096)
    stream = engine.stream(SamplingParams(temperature=0.8))
    stem = contexts(1, low=50, high=51)[0]
    twigs = [np.concatenate((stem, tail)).astype(np.int32) for tail in contexts(5, seed=9, low=1, high=30)]
    asked = requests([stem, stem, *twigs, twigs[0], stem[:20]], max_tokens=20)
    for request in asked:
        stream.add(request)
    stream.step()
    kv = engine.cache.kv
    # The stem's three full blocks are there once, and every sibling that runs counts on them.
    assert kv.references.max() >= 7
    assert kv.used < sum(-(-int(length) // kv.block) for length in kv.length)
    assert_accounted(engine)
    for ticket, completion in drain(stream).items():
        assert_exact(model, asked[ticket], completion, 0.8)
    # The stem is computed once, then each tail.
    assert engine.stats.prefill_tokens <= 50 + sum(len(twig) - 50 for twig in twigs) + 20 + 16
    assert_nothing_leaked(engine)


def test_writing_in_a_fork_never_changes_its_siblings(llama: PreTrainedModel, layout: str) -> None:
    engine = TorchEngine(llama, max_batch=4, cache_tokens=4096)
    stem = contexts(1, low=37, high=38)[0]
    (first,) = engine.generate([Request(stem, seed=0, max_tokens=8)], SamplingParams())
    grown = np.concatenate((stem, first.tokens)).astype(np.int32)
    for cut in (45, 37, 33, 32, 20):
        branch = np.concatenate((grown[:cut], [5, 6, 7])).astype(np.int32)
        (other,) = engine.generate([Request(branch, seed=cut, max_tokens=20)], SamplingParams())
        assert_exact(llama, Request(branch, seed=cut, max_tokens=20), other)
    again = Request(grown, seed=3, max_tokens=30)
    (last,) = engine.generate([again], SamplingParams())
    assert last.cached_tokens == 44
    assert_exact(llama, again, last)
    assert_nothing_leaked(engine)


def test_cancelling_frees_what_was_held(llama: PreTrainedModel, layout: str) -> None:
    engine = TorchEngine(llama, max_batch=2, cache_tokens=4096)
    stream = engine.stream(SamplingParams())
    asked = requests(contexts(4), max_tokens=9)
    for request in asked:
        stream.add(request)
    stream.step()
    stream.step()
    stopped, unborn = stream.cancel(1), stream.cancel(3)
    assert stopped.stop is unborn.stop is StopReason.CANCELLED
    assert len(stopped.tokens) == 2 and len(unborn.tokens) == 0
    assert_exact(llama, asked[1], stopped)
    for ticket in (1, 3, 17):
        with pytest.raises(UsageError, match="expected a ticket that has not ended"):
            stream.cancel(ticket)
    done = drain(stream)
    assert sorted(done) == [0, 2]
    for ticket, completion in done.items():
        assert_exact(llama, asked[ticket], completion)
    again = engine.generate([asked[1]], SamplingParams())[0]
    np.testing.assert_array_equal(again.tokens[:2], stopped.tokens)
    assert_nothing_leaked(engine)


def test_closing_a_stream_cancels_it_and_leaves_the_engine(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, max_batch=2, cache_tokens=4096)
    stream = engine.stream(SamplingParams())
    for request in requests(contexts(4)):
        stream.add(request)
    stream.step()
    stream.close()
    stream.close()
    assert stream.running == 0
    with pytest.raises(UsageError, match="closed"):
        stream.add(requests(contexts(1))[0])
    assert_nothing_leaked(engine)


def test_two_streams_and_generate_share_one_cache(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, max_batch=3, cache_tokens=4096)
    asked = requests(contexts(9, seed=4), max_tokens=7)
    streams = [engine.stream(SamplingParams()), engine.stream(SamplingParams(temperature=0.6))]
    for number, request in enumerate(asked[:6]):
        streams[number % 2].add(request)
    done = [dict(stream.step()) for stream in streams]
    for request, completion in zip(asked[6:], engine.generate(asked[6:], SamplingParams()), strict=True):
        assert_exact(llama, request, completion)
    for number, stream in enumerate(streams):
        for ticket, completion in (done[number] | drain(stream)).items():
            assert_exact(llama, asked[2 * ticket + number], completion, (1.0, 0.6)[number])
    assert_nothing_leaked(engine)


def test_a_stream_that_others_starve_says_so(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, max_batch=4, cache_tokens=256)
    stream = engine.stream(SamplingParams())
    (request,) = requests(contexts(1), max_tokens=100)
    stream.add(request)
    stream.step()
    with pytest.raises(AgentropyError, match="other streams"):
        engine.generate(requests(contexts(1, seed=5), max_tokens=200), SamplingParams())
    assert_exact(llama, request, drain(stream)[0])
    assert_nothing_leaked(engine)


def test_siblings_of_a_prefix_fit_in_a_cache_that_barely_holds_them(llama: PreTrainedModel, layout: str) -> None:
    engine = TorchEngine(llama, max_batch=2, cache_tokens=64)
    stem = contexts(1, low=16, high=17)[0]
    engine.generate(requests([stem, stem], max_tokens=1), SamplingParams())
    for tail in ([1, 2], [3, 4], [5, 6]):
        asked = requests([np.array([*stem, *tail], dtype=np.int32)], max_tokens=4)
        assert_exact(llama, asked[0], engine.generate(asked, SamplingParams())[0])
    assert_nothing_leaked(engine)


def test_new_weights_in_the_middle_recompute_the_past(layout: str) -> None:
    model, other = build(_llama), build(_llama, seed=1)
    engine = TorchEngine(model, cache_tokens=4096)
    asked = requests(contexts(4), max_tokens=8)
    stream = engine.stream(SamplingParams())
    for request in asked:
        stream.add(request)
    for _ in range(3):
        stream.step()
    engine.load_weights(other.state_dict(), version=5)
    for ticket, completion in drain(stream).items():
        assert completion.version == 0 and len(completion.tokens) == 8
        early, late = completion.tokens[:3], completion.tokens[3:]
        head = np.concatenate((asked[ticket].tokens, early)).astype(np.int32)
        tail = Completion(
            late,
            *(getattr(completion, name)[3:] for name in ("logprobs", "raw_logprobs", "entropies", "raw_entropies")),
            stop=completion.stop,
            version=5,
            cached_tokens=0,
        )
        assert_exact(other, Request(head, seed=0, max_tokens=5), tail)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("where", ["admission", "decoding"])
@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    llama: PreTrainedModel, layout: str, where: str, message: str
) -> None:
    engine = TorchEngine(llama, max_batch=8, cache_tokens=4096)
    asked = requests(contexts(8, seed=6), max_tokens=6)
    forward, sizes = engine.runner.forward, []

    def failing(kv: Any, sequences: Any, *more: Any) -> torch.Tensor:
        sizes.append(len(sequences))
        if len(sequences) > 2 and (where == "admission" or len(sizes) > 2):
            # Half of the work is done when memory runs out: what it wrote must not count.
            block, offset = np.divmod(kv.addresses(sequences, kv.length[sequences] - 1), kv.block)
            for tensor in (*kv.keys, *kv.values):
                tensor[block, :, offset] = 1e4
            raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)
        return forward(kv, sequences, *more)

    engine.runner.forward = failing  # type: ignore[method-assign]
    done = engine.generate(asked, SamplingParams())
    assert sizes[0] == 8 and 4 in sizes and max(sizes[-5:]) <= 2
    for request, completion in zip(asked, done, strict=True):
        assert_exact(llama, request, completion)
        assert len(completion.tokens) == 6
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("where", ["forward", "sample"])
def test_equal_contexts_survive_running_out_of_memory(
    llama: PreTrainedModel, layout: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(llama, max_batch=8, cache_tokens=4096)
    asked = requests([contexts(1)[0]] * 4 + contexts(1, seed=1), max_tokens=5)
    holder, calls = (engine.runner, 0) if where == "forward" else (lanes_module, 0)
    working = getattr(holder, where)

    def failing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("CUDA out of memory")
        return working(*given)

    monkeypatch.setattr(holder, where, failing)
    for request, completion in zip(asked, engine.generate(asked, SamplingParams()), strict=True):
        assert_exact(llama, request, completion)
        assert len(completion.tokens) == 5
    assert calls > 5
    assert_nothing_leaked(engine)


def test_a_failing_tokenizer_leaves_the_stream_as_it_was(llama: PreTrainedModel) -> None:
    class Stumbling:
        calls = 0

        def decode(self, token_ids: list[int], /) -> str:
            self.calls += 1
            if self.calls == 5:
                raise KeyError("no such token")
            return ""

    engine = TorchEngine(llama, Stumbling(), cache_tokens=4096)
    stream = engine.stream(SamplingParams(stop_strings=("never",)))
    asked = requests(contexts(3), max_tokens=5)
    for request in asked:
        stream.add(request)
    stream.step()
    with pytest.raises(KeyError, match="no such token"):
        stream.step()
    assert stream.running == 3
    for ticket, completion in drain(stream).items():
        assert_exact(llama, asked[ticket], completion)
        assert len(completion.tokens) == 5
    assert_nothing_leaked(engine)


def test_what_has_ended_survives_an_error(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, max_batch=4, cache_tokens=256)
    other, stream = engine.stream(SamplingParams()), engine.stream(SamplingParams())
    other.add(requests(contexts(1), max_tokens=200)[0])
    other.step()
    full = np.zeros(engine.max_positions, dtype=np.int32)
    stream.add(Request(full, seed=0, max_tokens=1))
    stream.add(requests(contexts(1, seed=5), max_tokens=200)[0])
    with pytest.raises(AgentropyError, match="other streams"):
        stream.step()
    assert stream.running == 2
    other.close()
    assert [(ticket, completion.stop) for ticket, completion in stream.step()] == [(0, StopReason.CONTEXT)]
    assert sorted(drain(stream)) == [1]


def test_memory_that_does_not_suffice_for_one_request_is_an_error(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, cache_tokens=4096)

    def failing(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward, engine.runner.forward = engine.runner.forward, failing  # type: ignore[method-assign]
    stream = engine.stream(SamplingParams())
    for request in requests(contexts(3)):
        stream.add(request)
    with pytest.raises(torch.OutOfMemoryError):
        stream.step()
    assert stream.running == 3
    engine.runner.forward = forward  # type: ignore[method-assign]
    assert sorted(drain(stream)) == [0, 1, 2]


def test_too_long_a_request_is_refused_before_any_work(llama: PreTrainedModel) -> None:
    engine = TorchEngine(llama, cache_tokens=64)
    stream = engine.stream(SamplingParams())
    with pytest.raises(UsageError, match="expected cache_tokens of at least"):
        stream.add(Request(np.zeros(60, dtype=np.int32), seed=0, max_tokens=10))
    with pytest.raises(UsageError, match="expected ids from 0 to 96"):
        stream.add(Request(np.array([97], dtype=np.int32), seed=0, max_tokens=10))
    assert stream.running == 0 and engine.stats.prefill_tokens == 0


def test_processed_log_probabilities_are_those_that_were_drawn_from(llama: PreTrainedModel) -> None:
    params = SamplingParams(temperature=1.3, top_k=12, top_p=0.8)
    for request, completion in zip(
        asked := requests(contexts(5), max_tokens=9),
        TorchEngine(llama, cache_tokens=4096).generate(asked, params),
        strict=True,
    ):
        sequence = torch.from_numpy(np.concatenate((request.tokens, completion.tokens))).long()[None]
        with torch.no_grad():
            logits = llama(sequence).logits[0, len(request.tokens) - 1 : -1].double()
        for row, token, processed, mass, logprob in zip(
            logits,
            completion.tokens,
            completion.processed_logprobs,
            completion.kept_logmass,
            completion.logprobs,
            strict=True,
        ):
            ordered, ids = torch.log_softmax(row / 1.3, dim=-1).sort(descending=True)
            ordered, ids = ordered[:12], ids[:12].tolist()
            share = ordered.softmax(dim=0)
            count = int((share.cumsum(0) - share < 0.8).sum())
            kept = torch.logsumexp(ordered[:count], dim=0)
            assert float(mass) == pytest.approx(float(kept), abs=1e-4)
            assert float(processed) == pytest.approx(float(ordered[ids.index(int(token))] - kept), abs=1e-4)
            assert float(logprob) == pytest.approx(float(processed + mass), abs=1e-5)


def _workload(engine: TorchEngine, model: PreTrainedModel, seed: int, steps: int, top: int) -> Built:
    """Random calls on one stream; returns what was asked and answered."""
    rng = np.random.default_rng(seed)
    stream = engine.stream(SamplingParams(stop_token_ids=(1, 2, 3)))
    known = contexts(3, seed=seed)
    asked: dict[int, Request] = {}
    done: Built = {}

    def take(ended: list[tuple[int, Completion]]) -> None:
        for ticket, completion in ended:
            done[ticket] = (asked.pop(ticket), completion)
            known.append(np.concatenate((done[ticket][0].tokens, completion.tokens)))

    for _ in range(steps):
        for _ in range(rng.integers(0, 4)):
            base = known[-1 - int(rng.integers(min(len(known), 12)))]
            kept = base[: rng.integers(1, len(base) + 1)] if rng.random() < 0.5 else base
            tail = rng.integers(VOCABULARY, size=rng.integers(0, 12))
            context = np.concatenate((kept, tail)).astype(np.int32)[:top]
            for _ in range(1 + 3 * int(rng.random() < 0.2)):
                request = Request(context, seed=int(rng.integers(2**63)), max_tokens=int(rng.integers(1, 10)))
                asked[stream.add(request)] = request
        event = rng.random()
        if event < 0.08 and asked:
            ticket = int(rng.choice(list(asked)))
            take([(ticket, stream.cancel(ticket))])
        elif event < 0.12:
            engine.release([known[-1][: rng.integers(1, 20)]])
        elif event < 0.14:
            engine.load_weights(model.state_dict(), version=engine.version + 1)
        elif event < 0.18:
            (request,) = requests([known[-1][:top]], seed=int(rng.integers(2**60)))
            assert_exact(model, request, engine.generate([request], SamplingParams())[0])
        take(stream.step())
        assert_accounted(engine)
    take(list(drain(stream).items()))
    assert not asked and stream.running == 0
    stream.close()
    return done


@pytest.mark.parametrize("fused", [True, False])
def test_a_random_stream_stays_exact_and_leaks_nothing(llama: PreTrainedModel, layout: str, fused: bool) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    # With at least 7 x 190 tokens generate() always finds room beside a stream of six.
    engine = TorchEngine(llama, max_batch=6, cache_tokens=int(rng.integers(2200, 5000)), fused=fused)
    for request, completion in _workload(engine, llama, seed, 40, 180).values():
        assert_exact(llama, request, completion)
    assert_nothing_leaked(engine)


def test_a_thousand_requests_of_random_lengths_leak_nothing(layout: str) -> None:
    model = build(_llama)
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    engine = TorchEngine(model, max_batch=32, cache_tokens=3000)
    blocks = len(engine.cache.kv.references)
    stream = engine.stream(SamplingParams(stop_token_ids=(1, 2, 3, 4, 5)))
    asked, done = [], {}
    for _ in range(1000):
        context = rng.integers(VOCABULARY, size=rng.integers(1, 12) if rng.random() < 0.95 else 150).astype(np.int32)
        asked.append(Request(context, seed=int(rng.integers(2**63)), max_tokens=int(rng.integers(1, 12))))
        stream.add(asked[-1])
        if len(asked) % 16 == 0:
            done.update(stream.step())
            assert len(engine.cache.kv.references) * engine.cache.kv.block <= 3000 + engine.cache.kv.block
    done.update(drain(stream))
    assert sorted(done) == list(range(1000)) and blocks
    for ticket in rng.choice(1000, size=60, replace=False).tolist():
        assert_exact(model, asked[ticket], done[ticket])
    assert_nothing_leaked(engine)

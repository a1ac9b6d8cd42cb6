"""What every engine promises, as functions of one engine and the model that it samples from.

- ``Subject``: an engine under test. ``tiny_model``, ``Words``: what it is made with.
- ``CLAIMS``: the promises; each takes a subject and leaves its weights as they were.

They compare with a plain forward pass of transformers in float32, and run wherever an engine can be made: beside the
built-in engine, in vLLM's own environment, against a server.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agentropy.agents.engines import Completion, Engine, Request, SamplingParams, StopReason
from agentropy.errors import UsageError

VOCABULARY = 512
POSITIONS = 256


@dataclass
class Subject:
    """An engine and what it has to agree with.

    Attributes:
        engine: made with ``model`` and a ``Words()`` tokenizer, for at least 4 requests at once.
        model: in float32 on the CPU; changed in place, it is what ``load_weights(None)`` reads.
        tolerance: of log-probabilities and entropies, in nats.
        knows_filters: whether it tells the mass that top-k and top-p keep.
        loads_state: whether ``load_weights`` takes a state dict.
        token_by_token: whether a step samples one token of every request, so that there is something to cancel.
    """

    engine: Engine
    model: PreTrainedModel
    tolerance: float = 1e-3
    knows_filters: bool = True
    loads_state: bool = True
    token_by_token: bool = False


class Words:
    """A tokenizer: token t is written as three letters, so that a stop string can end in the middle of a token."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(chr(97 + t // 26 // 26) + chr(97 + t // 26 % 26) + chr(97 + t % 26) for t in token_ids)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights, norms included; small, with a head size that vLLM has."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


def contexts(count: int, seed: int = 0, low: int = 3, high: int = 60) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCABULARY, size=rng.integers(low, high)).astype(np.int32) for _ in range(count)]


def requests(tokens: Sequence[NDArray[np.int32]], max_tokens: int = 8, seed: int = 0) -> list[Request]:
    return [Request(context, seed=seed + i, max_tokens=max_tokens) for i, context in enumerate(tokens)]


def reference(model: PreTrainedModel, context: NDArray[np.int32], tokens: NDArray[np.int32]) -> torch.Tensor:
    """Logits float64[n, V] that the tokens were drawn from."""
    sequence = torch.from_numpy(np.concatenate((context, tokens))).long()[None]
    with torch.no_grad():
        return model(sequence).logits[0, len(context) - 1 : -1].double()


def picked(logprobs: torch.Tensor, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    return logprobs.gather(1, torch.from_numpy(tokens).long()[:, None])[:, 0].numpy()


def entropy(logprobs: torch.Tensor, tokens: NDArray[np.int32], top_k: int) -> NDArray[np.float64]:
    """Exact, or −Σ p log p over the ``top_k`` most probable and the drawn one."""
    if not top_k:
        return -(logprobs.exp() * logprobs).sum(1).numpy()
    known = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, logprobs.topk(top_k).indices, True)
    known.scatter_(1, torch.from_numpy(tokens).long()[:, None], True)
    return -(logprobs.exp() * logprobs * known).sum(1).numpy()


def assert_agrees(subject: Subject, request: Request, completion: Completion, temperature: float = 1.0) -> None:
    """Tokens are the model's, and every statistic is that of a forward pass over context and completion."""
    assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
    assert 0 <= completion.cached_tokens <= len(request.tokens)
    assert len(completion.tokens) <= request.max_tokens
    if not len(completion.tokens):
        return
    assert completion.tokens.min() >= 0 and completion.tokens.max() < subject.engine.vocabulary
    logits = reference(subject.model, request.tokens, completion.tokens)
    for scale, logprobs, entropies in (
        (temperature or 1.0, completion.logprobs, completion.entropies),
        (1.0, completion.raw_logprobs, completion.raw_entropies),
    ):
        expected = torch.log_softmax(logits / scale, dim=-1)
        np.testing.assert_allclose(logprobs, picked(expected, completion.tokens), atol=subject.tolerance)
        estimate = entropy(expected, completion.tokens, completion.entropy_top_k)
        np.testing.assert_allclose(entropies, estimate, atol=2 * subject.tolerance)
    assert np.isfinite(completion.processed_logprobs).all() and (completion.kept_logmass <= 1e-6).all()
    total = completion.processed_logprobs + completion.kept_logmass
    np.testing.assert_allclose(total, completion.logprobs, atol=1e-5)


def check_protocol(subject: Subject) -> None:
    assert isinstance(subject.engine, Engine) and isinstance(subject.engine.exact, bool)
    assert subject.engine.vocabulary == VOCABULARY
    assert subject.engine.generate([], SamplingParams()) == []
    stream = subject.engine.stream(SamplingParams())
    assert stream.running == 0 and stream.step() == []
    stream.close()
    stream.close()


def check_statistics_are_those_of_a_forward_pass(subject: Subject) -> None:
    for temperature in (1.0, 0.6, 1.3, 0.0):
        asked = requests(contexts(6, seed=int(10 * temperature)))
        done = subject.engine.generate(asked, SamplingParams(temperature=temperature))
        for request, completion in zip(asked, done, strict=True):
            assert completion.stop is StopReason.LENGTH and len(completion.tokens) == 8
            assert_agrees(subject, request, completion, temperature)
            # Greedy decoding keeps one token of the distribution; drawing without filters keeps all.
            kept = completion.logprobs if temperature == 0 else 0
            np.testing.assert_allclose(completion.kept_logmass, kept, atol=1e-5)


def check_entropies_can_be_asked_for_as_estimates(subject: Subject) -> None:
    asked = requests(contexts(3, seed=3))
    for top_k in (1, 5):
        for completion, request in zip(
            subject.engine.generate(asked, SamplingParams(entropy_top_k=top_k)), asked, strict=True
        ):
            assert completion.entropy_top_k == top_k
            assert_agrees(subject, request, completion)


def check_filters_keep_statistics_of_the_whole_vocabulary(subject: Subject) -> None:
    for top_k, top_p, temperature in ((5, 1.0, 1.0), (0, 0.6, 1.3), (20, 0.8, 0.8)):
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        asked = requests(contexts(4, seed=top_k), max_tokens=10)
        for request, completion in zip(asked, subject.engine.generate(asked, params), strict=True):
            assert_agrees(subject, request, completion, temperature)
            logits = reference(subject.model, request.tokens, completion.tokens)
            probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
            if top_k:
                probabilities[:, top_k:] = 0
            before = probabilities.cumsum(-1) - probabilities
            kept = (before < top_p * probabilities.sum(-1, keepdim=True)) & (probabilities > 0)
            rank = (order == torch.from_numpy(completion.tokens).long()[:, None]).long().argmax(-1)
            assert bool(kept.gather(1, rank[:, None]).all())
            if subject.knows_filters:
                mass = (probabilities * kept).sum(-1).log()
                np.testing.assert_allclose(completion.kept_logmass, mass.numpy(), atol=10 * subject.tolerance)


def check_greedy_tokens_are_the_most_probable(subject: Subject) -> None:
    asked = requests(contexts(4, seed=4), max_tokens=12)
    for request, completion in zip(asked, subject.engine.generate(asked, SamplingParams(temperature=0)), strict=True):
        logits = reference(subject.model, request.tokens, completion.tokens)
        np.testing.assert_array_equal(completion.tokens, logits.argmax(-1).numpy())


def check_seeds_choose_the_tokens(subject: Subject) -> None:
    context, *company = contexts(4, seed=5)
    seeds = [7, 7, 8, 2**63 - 1]
    first = subject.engine.generate([Request(context, seed, 16) for seed in seeds], SamplingParams())
    np.testing.assert_array_equal(first[0].tokens, first[1].tokens)
    assert len({c.tokens.tobytes() for c in first}) == 3
    again = subject.engine.generate([*requests(company), Request(context, 7, 16)], SamplingParams())[-1]
    np.testing.assert_array_equal(again.tokens, first[0].tokens)
    np.testing.assert_allclose(again.logprobs, first[0].logprobs, atol=subject.tolerance)
    short = subject.engine.generate([Request(context, 7, 5)], SamplingParams())[0]
    np.testing.assert_array_equal(short.tokens, first[0].tokens[:5])


def check_a_stop_token_ends_a_completion_and_belongs_to_it(subject: Subject) -> None:
    asked = requests(contexts(3, seed=6), max_tokens=10)
    free = subject.engine.generate(asked, SamplingParams())
    stop = int(free[0].tokens[4])
    done = subject.engine.generate(asked, SamplingParams(stop_token_ids=(stop, VOCABULARY - 1)))
    for whole, completion in zip(free, done, strict=True):
        places = np.flatnonzero(np.isin(whole.tokens, (stop, VOCABULARY - 1)))
        length = int(places[0]) + 1 if len(places) else 10
        np.testing.assert_array_equal(completion.tokens, whole.tokens[:length])
        assert completion.stop is (StopReason.STOP if len(places) else StopReason.LENGTH)
        assert len(completion.logprobs) == len(completion.entropies) == length


def check_stop_strings_across_tokens(subject: Subject) -> None:
    asked = requests(contexts(2, seed=7), max_tokens=10)
    free = subject.engine.generate(asked, SamplingParams())
    text = Words().decode(free[0].tokens.tolist())
    stop = text[10:15]
    done = subject.engine.generate(asked, SamplingParams(stop_strings=("~", stop)))
    for whole, completion in zip(free, done, strict=True):
        texts = [Words().decode(whole.tokens[: n + 1].tolist()) for n in range(10)]
        length = next((n + 1 for n, text in enumerate(texts) if stop in text), 10)
        np.testing.assert_array_equal(completion.tokens, whole.tokens[:length])
        assert completion.stop is (StopReason.STOP if stop in texts[-1] else StopReason.LENGTH)
    assert done[0].stop is StopReason.STOP and len(done[0].tokens) < 10


def check_the_models_last_position_ends_a_completion(subject: Subject) -> None:
    sizes = (POSITIONS - 6, POSITIONS - 1, POSITIONS, POSITIONS + 40, 5)
    long = [np.resize(context, size) for context, size in zip(contexts(5, seed=8), sizes, strict=True)]
    done = subject.engine.generate(requests(long, max_tokens=20), SamplingParams())
    assert [len(c.tokens) for c in done] == [6, 1, 0, 0, 20]
    assert [c.stop for c in done] == [StopReason.CONTEXT] * 4 + [StopReason.LENGTH]
    assert_agrees(subject, requests(long, max_tokens=20)[0], done[0])
    exact = subject.engine.generate(requests(long[:1], max_tokens=6), SamplingParams())[0]
    assert exact.stop is StopReason.LENGTH


def check_later_turns_reuse_the_history_and_stay_right(subject: Subject) -> None:
    rng = np.random.default_rng(9)
    histories = contexts(4, seed=9, low=40)
    histories.append(histories[0])
    reused = 0
    for turn in range(4):
        asked = [Request(h, seed=100 * turn + i, max_tokens=int(rng.integers(1, 8))) for i, h in enumerate(histories)]
        done = subject.engine.generate(asked, SamplingParams(temperature=0.8))
        for request, completion in zip(asked, done, strict=True):
            assert_agrees(subject, request, completion, 0.8)
            reused += completion.cached_tokens
        histories = [
            np.concatenate((h, c.tokens, rng.integers(VOCABULARY, size=rng.integers(6, 25)))).astype(np.int32)
            for h, c in zip(histories, done, strict=True)
        ]
    assert reused > 0
    subject.engine.release([histories[0]])
    subject.engine.release()
    fresh = subject.engine.generate(requests(histories[1:3]), SamplingParams())
    assert [c.cached_tokens for c in fresh] == [0, 0]


def check_a_stream_answers_every_ticket_in_order(subject: Subject) -> None:
    asked = requests(contexts(7, seed=10), max_tokens=9)
    asked = [replace(request, max_tokens=2 + i) for i, request in enumerate(asked)]
    alone = subject.engine.generate(asked, SamplingParams())
    stream = subject.engine.stream(SamplingParams())
    done: dict[int, Completion] = {}
    for first in range(0, 7, 3):
        tickets = [stream.add(request) for request in asked[first : first + 3]]
        assert tickets == list(range(first, min(first + 3, 7)))
        before = stream.running
        ended = stream.step()
        assert [ticket for ticket, _ in ended] == sorted(ticket for ticket, _ in ended)
        assert stream.running == before - len(ended)
        done.update(ended)
    while stream.running:
        ended = stream.step()
        assert [ticket for ticket, _ in ended] == sorted(ticket for ticket, _ in ended)
        assert not done.keys() & dict(ended).keys()
        done.update(ended)
    assert stream.step() == [] and sorted(done) == list(range(7))
    for i, completion in enumerate(alone):
        np.testing.assert_array_equal(done[i].tokens, completion.tokens)
        assert done[i].stop is completion.stop
        assert_agrees(subject, asked[i], done[i])
    stream.close()


def check_cancelling_gives_what_there_is_and_disturbs_nobody(subject: Subject) -> None:
    asked = requests(contexts(4, seed=11), max_tokens=60)
    whole = subject.engine.generate(asked, SamplingParams())
    stream = subject.engine.stream(SamplingParams())
    tickets = [stream.add(request) for request in asked]
    early = stream.cancel(tickets[3])
    assert early.stop is StopReason.CANCELLED and not len(early.tokens)
    ended = [pair for _ in range(4) for pair in stream.step()]
    assert stream.running + len(ended) == 3
    if subject.token_by_token or not ended:
        partial = stream.cancel(tickets[1])
        assert partial.stop is StopReason.CANCELLED and len(partial.tokens) < 60
        assert_agrees(subject, asked[1], partial)
        np.testing.assert_array_equal(partial.tokens, whole[1].tokens[: len(partial.tokens)])
        assert stream.running == 2
        with pytest.raises(UsageError):
            stream.cancel(tickets[1])
    done = dict(ended)
    while stream.running:
        done.update(stream.step())
    for i in set(done) & {0, 2}:
        np.testing.assert_array_equal(done[i].tokens, whole[i].tokens)
    assert {0, 2} <= done.keys()
    stream.add(asked[0])
    stream.close()
    assert stream.running == 0
    again = subject.engine.generate(asked[:2], SamplingParams())
    np.testing.assert_array_equal(again[1].tokens, whole[1].tokens)


def check_new_weights_show_at_once(subject: Subject) -> None:
    asked = requests(contexts(4, seed=12, low=40))
    old = subject.engine.generate(asked, SamplingParams())
    with _changed(subject) as mine:
        subject.engine.load_weights(None, version=41)
        _assert_loaded(subject, asked, old, 41)
        if subject.loads_state:
            state = {name: tensor.clone() for name, tensor in tiny_model(seed=2).state_dict().items()}
            subject.engine.load_weights(state, version=42)
            with torch.no_grad():
                subject.model.load_state_dict(state)
            _assert_loaded(subject, asked, old, 42)
    subject.engine.load_weights(mine if subject.loads_state else None, version=43)
    new = subject.engine.generate(asked, SamplingParams())
    for before, after in zip(old, new, strict=True):
        np.testing.assert_array_equal(before.tokens, after.tokens)
        assert after.version == 43


@contextmanager
def _changed(subject: Subject) -> Iterator[dict[str, torch.Tensor]]:
    """Give the shared module other weights, in place, for a while; yields its own."""
    mine = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    try:
        subject.model.load_state_dict(tiny_model(seed=1).state_dict())
        yield mine
    finally:
        subject.model.load_state_dict(mine)


def _assert_loaded(subject: Subject, asked: Sequence[Request], old: Sequence[Completion], version: int) -> None:
    new = subject.engine.generate(asked, SamplingParams())
    for request, before, after in zip(asked, old, new, strict=True):
        assert after.version == version and after.cached_tokens == 0
        assert before.tokens.tobytes() != after.tokens.tobytes()
        assert_agrees(subject, request, after)


def check_weights_that_do_not_fit_are_refused(subject: Subject) -> None:
    if not subject.loads_state:
        return
    state = dict(subject.model.state_dict())
    asked = requests(contexts(2, seed=13))
    before = subject.engine.generate(asked, SamplingParams())
    with pytest.raises(UsageError, match="zzz"):
        subject.engine.load_weights({**state, "zzz": torch.zeros(1)}, version=99)
    norm = state.pop("model.norm.weight")
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        subject.engine.load_weights(state, version=99)
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        subject.engine.load_weights({**state, "model.norm.weight": norm[:-1]}, version=99)
    after = subject.engine.generate(asked, SamplingParams())
    assert after[0].version != 99
    np.testing.assert_array_equal(before[0].tokens, after[0].tokens)


def check_bad_requests_are_refused_and_leave_no_trace(subject: Subject) -> None:
    good = requests(contexts(2, seed=14))
    for token in (VOCABULARY, -1):
        bad = Request(np.array([1, token]), seed=0, max_tokens=3)
        with pytest.raises(UsageError, match=f"expected ids from 0 to {VOCABULARY - 1}"):
            subject.engine.generate([*good, bad], SamplingParams())
    with pytest.raises(UsageError):
        Request(np.zeros(0, np.int32), seed=0, max_tokens=1)
    stream = subject.engine.stream(SamplingParams())
    stream.close()
    assert len(subject.engine.generate(good, SamplingParams())) == 2


def check_a_thousand_requests_leak_nothing(subject: Subject) -> None:
    rng = np.random.default_rng(15)
    bases = contexts(40, seed=15, low=20, high=120)
    subject.engine.generate(requests(bases[:4]), SamplingParams())
    before = _resources()
    stream = subject.engine.stream(SamplingParams(temperature=0.9, stop_token_ids=(3, 4, 5)))
    asked: list[Request] = []
    done: dict[int, Completion] = {}
    while len(done) < 1000:
        while len(asked) < 1000 and stream.running < 64:
            base = bases[rng.integers(40)]
            tokens = np.concatenate((base[: rng.integers(1, len(base) + 1)], rng.integers(VOCABULARY, size=3)))
            asked.append(Request(tokens, seed=len(asked), max_tokens=int(rng.integers(1, 7))))
            assert stream.add(asked[-1]) == len(asked) - 1
        done.update(stream.step())
    assert sorted(done) == list(range(1000)) and stream.running == 0
    for i, request in enumerate(asked):
        stopped = int(done[i].tokens[-1]) in (3, 4, 5)
        assert stopped or len(done[i].tokens) == request.max_tokens
        assert done[i].stop is (StopReason.STOP if stopped else StopReason.LENGTH)
        assert not np.isin(done[i].tokens[:-1], (3, 4, 5)).any()
    for i in range(0, 1000, 50):
        assert_agrees(subject, asked[i], done[i], 0.9)
    stream.close()
    gc.collect()
    processes, files = _resources()
    assert processes == before[0] and files <= before[1] + 2


def _resources() -> tuple[int, int]:
    """Child processes and open files of this process."""
    children = sum(len(task.read_text().split()) for task in Path("/proc/self/task").glob("*/children"))
    return children, len(list(Path("/proc/self/fd").iterdir()))


CLAIMS: list[Callable[[Subject], None]] = [
    value for name, value in dict(globals()).items() if name.startswith("check_")
]

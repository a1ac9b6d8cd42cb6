"""The engine in several processes: one set of weights, requests beside their kin, and nothing left behind.

That it keeps every engine's promises is tested with the others (``test_engine_conformance``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentropy.agents.engines import Completion, Request, SamplingParams, StopReason
from agentropy.agents.engines.process_engine import ProcessEngine
from agentropy.agents.engines.shared_weights import adopt, share
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.errors import AgentropyError, UsageError

from .engine_conformance import VOCABULARY, tiny_model


def requests(count: int, seed: int = 0, length: int = 12) -> list[Request]:
    random = np.random.default_rng(seed)
    return [Request(random.integers(0, VOCABULARY, length), seed=i, max_tokens=int(5 + i % 4)) for i in range(count)]


def drain(stream: Any) -> dict[int, Completion]:
    """What a stream of at most a hundred tokens still tells; without a bound, a lost answer would be waited for."""
    done: dict[int, Completion] = {}
    for _ in range(100):
        done.update(stream.step())
    assert not stream.running
    return done


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessEngine]:
    engine = ProcessEngine(tiny_model(), workers=2)
    yield engine
    engine.close()


def test_tokens_are_those_of_one_process(engine: ProcessEngine) -> None:
    expected = TorchEngine(tiny_model()).generate(requests(9), SamplingParams())
    engine.release()
    first = engine.generate(requests(9), SamplingParams())
    engine.release()
    again = engine.generate(requests(9), SamplingParams())
    for one, two, other in zip(first, again, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_array_equal(one.logprobs, two.logprobs)
    assert engine.stats.decode_tokens == 2 * sum(len(completion.tokens) for completion in expected)


def test_kin_meet_in_one_process_and_strangers_are_spread(engine: ProcessEngine) -> None:
    engine.release()
    header = np.arange(30)  # that all of them begin with
    groups = [Request(np.concatenate((header, r.tokens)), r.seed, r.max_tokens) for r in requests(4, seed=5, length=10)]
    asked = [
        Request(request.tokens, seed=10 * i + j, max_tokens=4) for i, request in enumerate(groups) for j in range(4)
    ]
    first = engine.generate(asked, SamplingParams())
    owners = [engine.place(request.tokens, [0, 0]) for request in groups]
    assert sorted(owners) == [0, 0, 1, 1]
    longer = [
        Request(np.concatenate((request.tokens, done.tokens, [1, 2])), seed=1, max_tokens=3)
        for request, done in zip(asked, first, strict=True)
    ]
    for request, completion in zip(longer, engine.generate(longer, SamplingParams()), strict=True):
        assert completion.cached_tokens == len(request.tokens) - 3
    assert {owner for owner, _ in engine._owner.values()} == {0, 1}


def test_an_optimiser_changes_what_the_processes_see(engine: ProcessEngine) -> None:
    model = engine._model
    before = engine.generate(requests(2), SamplingParams(temperature=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    engine.load_weights(None, version=7)
    after = engine.generate(requests(2), SamplingParams(temperature=0))
    assert {completion.version for completion in after} == {7}
    expected = TorchEngine(model).generate(requests(2), SamplingParams(temperature=0))
    for one, other, old in zip(after, expected, before, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert abs(one.logprobs[0] - old.logprobs[0]) > 1e-3


def test_wrong_requests_are_refused_at_once(engine: ProcessEngine) -> None:
    stream = engine.stream(SamplingParams())
    with pytest.raises(UsageError, match="expected ids from 0 to"):
        stream.add(Request(np.array([VOCABULARY]), seed=0, max_tokens=1))
    stream.close()
    with pytest.raises(UsageError, match="closed"):
        stream.add(requests(1)[0])
    with pytest.raises(UsageError, match="tokenizer"):
        engine.generate(requests(1), SamplingParams(stop_strings=("a",)))


def test_a_process_that_dies_is_an_error_and_nothing_is_left() -> None:
    memory = set(Path("/dev/shm").glob("agentropy-*")) if Path("/dev/shm").is_dir() else set()
    engine = ProcessEngine(tiny_model(), workers=2)
    engine.generate(requests(2), SamplingParams())
    processes = [worker.process for worker in engine._workers]
    processes[1].kill()
    processes[1].wait()
    with pytest.raises(AgentropyError, match="process of the engine has ended"):
        engine.generate(requests(4, seed=3), SamplingParams())
    engine.close()
    engine.close()
    assert all(process.poll() is not None for process in processes)
    assert not set(Path("/dev/shm").glob("agentropy-*")) - memory
    with pytest.raises(UsageError, match="closed"):
        engine.generate(requests(1), SamplingParams())


def test_a_step_returns_what_ended_in_the_step_before(engine: ProcessEngine) -> None:
    engine.release()
    stream = engine.stream(SamplingParams())
    assert stream.step() == []
    (first,) = requests(1, seed=20)
    stream.add(Request(first.tokens, seed=0, max_tokens=1))
    assert stream.step() == [] and stream.running == 1
    assert [ticket for ticket, _ in stream.step()] == [0] and stream.running == 0
    assert stream.step() == []
    stream.close()


def test_a_step_that_nobody_waited_for_counts_when_a_request_is_cancelled(engine: ProcessEngine) -> None:
    asked = requests(4, seed=21)
    expected = engine.generate(asked, SamplingParams())
    stream = engine.stream(SamplingParams())
    stream.add(Request(asked[0].tokens, seed=0, max_tokens=1))
    for request in asked[1:]:
        stream.add(request)
    stream.step()
    # It has ended, which no step has told yet.
    ended = stream.cancel(0)
    assert ended.stop is StopReason.LENGTH and ended.tokens.tolist() == expected[0].tokens[:1].tolist()
    assert stream.running == 3
    stream.step()
    stopped = stream.cancel(2)
    assert stopped.stop is StopReason.CANCELLED
    assert stopped.tokens.tolist() == expected[2].tokens[: len(stopped.tokens)].tolist()
    with pytest.raises(UsageError, match="has not ended"):
        stream.cancel(2)
    done = drain(stream)
    assert sorted(done) == [1, 3]
    for ticket, completion in done.items():
        np.testing.assert_array_equal(completion.tokens, expected[ticket].tokens)
    stream.close()


def test_streams_that_take_turns_keep_their_own_answers(engine: ProcessEngine) -> None:
    asked = [replace(request, max_tokens=1 + i) for i, request in enumerate(requests(8, seed=22))]
    expected = engine.generate(asked, SamplingParams())
    streams = [engine.stream(SamplingParams()) for _ in range(2)]
    for number, request in enumerate(asked):
        streams[number // 4].add(request)  # so both have some in either process
    done: list[dict[int, Completion]] = [{}, {}]
    for number in (0, 1, 1, 0, 0, 0, 1):
        done[number].update(streams[number].step())
    for stream, mine in zip(streams, done, strict=True):
        mine.update(drain(stream))
        stream.close()
    for number, completion in enumerate(expected):
        np.testing.assert_array_equal(done[number // 4][number % 4].tokens, completion.tokens)


def test_generating_beside_a_stream_disturbs_neither(engine: ProcessEngine) -> None:
    asked = [replace(request, max_tokens=1 + i % 4) for i, request in enumerate(requests(8, seed=23))]
    expected = engine.generate(asked, SamplingParams())
    stream = engine.stream(SamplingParams())
    for request in asked[:4]:
        stream.add(request)
    stream.step()
    between = engine.generate(asked[4:], SamplingParams())
    done = drain(stream)
    stream.close()
    for number, completion in enumerate(between):
        np.testing.assert_array_equal(completion.tokens, expected[4 + number].tokens)
    assert sorted(done) == [0, 1, 2, 3]
    for ticket, completion in done.items():
        np.testing.assert_array_equal(completion.tokens, expected[ticket].tokens)


def test_closing_in_the_middle_leaves_no_answer_behind(engine: ProcessEngine) -> None:
    asked = requests(6, seed=24)
    expected = engine.generate(asked, SamplingParams())
    stream = engine.stream(SamplingParams())
    for request in asked:
        stream.add(request)
    stream.step()
    stream.close()
    assert stream.running == 0
    for one, other in zip(engine.generate(asked, SamplingParams()), expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


class Stumbling:
    """A tokenizer that cannot spell."""

    def decode(self, token_ids: list[int], /) -> str:
        raise KeyError("no such token")


def test_what_a_process_raises_leaves_no_answer_behind() -> None:
    engine = ProcessEngine(tiny_model(), Stumbling(), workers=2)
    try:
        asked = requests(6, seed=25)
        expected = engine.generate(asked, SamplingParams())
        with pytest.raises(KeyError, match="no such token"):
            engine.generate(asked, SamplingParams(stop_strings=("never",)))
        for one, other in zip(engine.generate(asked, SamplingParams()), expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
    finally:
        engine.close()


def test_releases_do_not_wait_and_do_not_block() -> None:
    engine = ProcessEngine(tiny_model(), workers=1)
    try:
        asked = requests(3, seed=26)
        expected = engine.generate(asked, SamplingParams())
        caller = threading.Thread(target=lambda: [engine.release([request.tokens]) for request in asked * 1000])
        caller.start()
        caller.join(20)
        stuck = caller.is_alive()
        if stuck:
            engine._workers[0].process.kill()  # which lets the caller go on
            caller.join()
        assert not stuck, "nobody read the answers, so the process could not write more of them"
        for one, other in zip(engine.generate(asked, SamplingParams()), expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            assert not one.cached_tokens
    finally:
        engine.close()


def test_what_the_engine_refuses_is_told_by_the_first_use() -> None:
    engine = ProcessEngine(tiny_model(), workers=1, max_batch=0)
    with pytest.raises(UsageError, match="max_batch=0"):
        engine.generate(requests(1), SamplingParams())
    with pytest.raises(UsageError, match="1 or more"):
        ProcessEngine(tiny_model(), workers=0)


def test_shared_weights_are_one_memory_and_keep_what_is_tied() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layout = share(model)
    adopt(other, layout)
    Path(layout.path).unlink()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(0.5)
    assert float(other.lm_head.weight[3, 3].detach()) == 0.5

"""The HTTP engine gives what the engine behind the server gives, each once, whatever happens to the server."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from agentropy.agents.engines import Completion, Engine, EngineStats, Request, SamplingParams, StopReason
from agentropy.agents.engines.http_client import BadAnswer, ServerRefused, ServerUnavailable
from agentropy.agents.engines.http_engine import HTTPEngine
from agentropy.agents.engines.http_statistics import Reported
from agentropy.agents.engines.torch_engine import TorchEngine
from agentropy.agents.model_server import ModelServer
from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.errors import UsageError

from . import engine_conformance as conformance
from .engine_conformance import CLAIMS, Subject, Words, tiny_model
from .scripted import Scripted, obedient, quick, said
from .serving import POSITIONS, VOCABULARY, Process, engine, free_port, model, reference, served

FIELDS = ("logprobs", "raw_logprobs", "entropies", "raw_entropies", "processed_logprobs", "kept_logmass")
GREEDY = SamplingParams(temperature=0.0)


def requests(count: int, max_tokens: int = 6, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, size=count)
    tokens = [rng.integers(VOCABULARY, size=n).astype(np.int32) for n in lengths]
    return [
        Request(context, seed=int(rng.integers(2**64, dtype=np.uint64)), max_tokens=max_tokens) for context in tokens
    ]


def same(one: list[Completion], other: list[Completion]) -> None:
    assert [c.tokens.tolist() for c in one] == [c.tokens.tolist() for c in other]
    assert [c.stop for c in one] == [c.stop for c in other]
    for a, b in zip(one, other, strict=True):
        for field in FIELDS:
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), atol=2e-5, err_msg=field)


def until(happened: Callable[[], Any], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(done)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with served() as server:
        yield server


@pytest.fixture
def http(server: ModelServer) -> Iterator[HTTPEngine]:
    made = HTTPEngine(server.url)
    yield made
    made.close()


def test_it_is_an_engine(http: HTTPEngine) -> None:
    assert isinstance(http, Engine)
    assert (http.mode, http.model, http.vocabulary, http.exact, http.trainable) == ("tokens", "tiny", 97, False, True)


def test_a_thousand_requests_get_what_the_engine_itself_gives(http: HTTPEngine) -> None:
    asked = requests(1000, max_tokens=3)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, stop_token_ids=(5, 9))
    same(http.generate(asked, params), reference().generate(asked, params))
    assert http.stats.prefill_tokens + http.stats.cached_tokens == sum(len(request.tokens) for request in asked)


@pytest.mark.parametrize("params", [SamplingParams(), GREEDY, SamplingParams(entropy_top_k=4), SamplingParams(2.0)])
def test_statistics_come_through_unchanged(http: HTTPEngine, params: SamplingParams) -> None:
    asked = requests(5)
    done, expected = http.generate(asked, params), reference().generate(asked, params)
    same(done, expected)
    assert {completion.entropy_top_k for completion in done} == {params.entropy_top_k}


def test_token_ids_go_and_come_without_a_tokenizer() -> None:
    class Deaf:
        """A tokenizer that cannot read; text of an answer is made, but nothing is made of text."""

        eos_token_id = chat_template = None

        def decode(self, ids: list[int], **_: Any) -> str:
            return ""

        def encode(self, *_: Any, **__: Any) -> list[int]:
            raise AssertionError("something was tokenised")

    heard: list[Request] = []
    behind = engine()
    open_stream = behind.stream

    def listening(params: SamplingParams) -> Any:
        stream = open_stream(params)
        add = stream.add
        stream.add = lambda request: heard.append(request) or add(request)  # type: ignore[method-assign, func-returns-value]
        return stream

    behind.stream = listening  # type: ignore[method-assign]
    asked = [Request(np.arange(VOCABULARY), 2**64 - 1, 4), Request(np.array([0, 0, 4, 4, 1]), 7, 4)]
    with ModelServer(behind, Deaf(), port=0) as server:
        http = HTTPEngine(server.url)
        heard.clear()
        done = http.generate(asked, SamplingParams())
        http.close()
    assert {(r.tokens.tobytes(), r.seed) for r in heard} == {(r.tokens.tobytes(), r.seed) for r in asked}
    same(done, reference().generate(asked, SamplingParams()))
    behind.close()


def test_the_models_last_position_ends_a_completion(http: HTTPEngine) -> None:
    full, nearly = np.ones(POSITIONS, np.int32), np.ones(POSITIONS - 3, np.int32)
    done = http.generate([Request(full, 0, 5), Request(nearly, 0, 5), Request(nearly, 0, 3)], SamplingParams())
    assert [len(completion.tokens) for completion in done] == [0, 3, 3]
    assert [completion.stop for completion in done] == [StopReason.CONTEXT, StopReason.CONTEXT, StopReason.LENGTH]


def test_requests_join_and_leave_while_others_run(http: HTTPEngine) -> None:
    asked = requests(6, max_tokens=4)
    expected = reference().generate(asked, SamplingParams())
    stream = http.stream(SamplingParams())
    assert stream.step() == [] and stream.running == 0
    assert [stream.add(request) for request in asked[:4]] == [0, 1, 2, 3]
    done = dict(stream.step())
    assert done and list(done) == sorted(done) and stream.running == 4 - len(done)
    assert [stream.add(request) for request in asked[4:]] == [4, 5]
    while stream.running:
        done |= dict(stream.step())
    same([done[ticket] for ticket in range(6)], expected)
    stream.close()
    with pytest.raises(UsageError, match="closed"):
        stream.add(asked[0])


class Endless:
    """An engine whose requests end when they are cancelled, and which counts them."""

    vocabulary, exact = VOCABULARY, True

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.cancelled = 0

    def stream(self, params: SamplingParams) -> Any:
        return _EndlessStream(self)

    def close(self) -> None:
        pass


class _EndlessStream:
    def __init__(self, owner: Endless) -> None:
        self.owner, self.tickets, self.open = owner, 0, set[int]()

    def add(self, request: Request) -> int:
        self.open.add(self.tickets)
        self.tickets += 1
        return self.tickets - 1

    def step(self) -> list[tuple[int, Completion]]:
        time.sleep(0.002)
        nothing = np.zeros(0, np.float32)
        first = Completion(nothing.astype(np.int32), *[nothing] * 4, StopReason.LENGTH, 0, 0)
        if 0 in self.open and self.owner.stats.decode_tokens == 0:  # the trial of a client that connects
            self.owner.stats.decode_tokens = 1
            self.open.discard(0)
            return [(0, first)]
        return []

    def cancel(self, ticket: int) -> None:
        self.open.remove(ticket)
        self.owner.cancelled += 1

    def close(self) -> None:
        pass


def test_cancelling_frees_the_servers_row() -> None:
    behind = Endless()
    with served(made=behind) as server:
        http = HTTPEngine(server.url)
        stream = http.stream(SamplingParams())
        tickets = [stream.add(request) for request in requests(3)]
        assert until(lambda: server.running == 3)
        ended = stream.cancel(tickets[1])
        assert (ended.stop, len(ended.tokens), stream.running) == (StopReason.CANCELLED, 0, 2)
        assert until(lambda: server.running == 2)
        with pytest.raises(UsageError, match="ticket 1"):
            stream.cancel(tickets[1])
        stream.close()
        assert until(lambda: server.running == 0) and behind.cancelled == 3
        http.close()


def test_a_server_that_is_killed_and_started_again_loses_nothing() -> None:
    asked, params = requests(40, max_tokens=60, seed=3), SamplingParams(stop_token_ids=(5,))
    expected = reference().generate(asked, params)
    told: list[str] = []
    with Process(max_batch=2) as process, ThreadPoolExecutor() as pool:
        http = quick(process.url, on_wait=told.append, concurrency=8, patience=300.0)
        told.clear()
        before = http._courier.sent
        running = pool.submit(http.generate, asked, params)
        assert until(lambda: http._courier.sent >= before + 16)
        assert not running.done()
        process.kill()
        assert until(lambda: told)
        process.start()
        done = running.result(300)
        same(done, expected)
        assert http.stats.decode_tokens == sum(len(completion.tokens) for completion in expected)
        assert len(told) == 2 and "waiting" in told[0] and "answers again" in told[1]
        http.close()


def test_an_overloaded_server_says_when_to_come_back() -> None:
    times = iter([429, 503])

    def reply(path: str, body: Any) -> Any:
        status = next(times, 200)
        return said(body) if status == 200 else (status, {"error": {"message": "busy"}}, {"Retry-After": "0"})

    with Scripted(reply) as server:
        http = HTTPEngine(server.url, vocabulary=VOCABULARY, backoff=1e6)  # its own pause would be for ever
        assert http.generate(requests(1), GREEDY)[0].stop is StopReason.LENGTH
        http.close()


def test_errors_of_the_server_are_tried_again_and_then_told() -> None:
    with Scripted(obedient) as server:
        http = quick(server.url, retries=2)
        server.reply = lambda path, body: (500, {"error": {"message": "out of memory"}})
        sent = len(server.bodies)
        with pytest.raises(ServerUnavailable, match="status 500: out of memory"):
            http.generate(requests(1), GREEDY)
        assert len(server.bodies) == sent + 3
        http.close()


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_told_at_once(status: int) -> None:
    with Scripted(obedient) as server:
        http = quick(server.url)
        server.reply = lambda path, body: (status, {"error": {"message": "prompt is too long"}})
        sent = len(server.bodies)
        with pytest.raises(ServerRefused, match="prompt is too long") as refused:
            http.generate(requests(1), GREEDY)
        assert refused.value.status == status and len(server.bodies) == sent + 1
        http.close()


def test_a_hung_server_is_waited_for() -> None:
    told: list[str] = []
    with Scripted(obedient) as server, ThreadPoolExecutor() as pool:
        http = quick(server.url, timeout=0.2, retries=2, on_wait=told.append)
        server.silent.set()
        running = pool.submit(http.generate, requests(5), GREEDY)
        assert until(lambda: told) and "ReadTimeout" in told[0]
        server.silent.clear()
        assert len(running.result(20)) == 5
        http.close()


def test_patience_ends_with_all_that_came_by_then() -> None:
    asked = requests(12)
    with Scripted(obedient) as server:
        http = quick(server.url, timeout=0.2, patience=0.3, concurrency=4)

        def reply(path: str, body: Any) -> Any:
            if len(server.bodies) > 9:
                server.silent.set()
                server._wait()
            return said(body)

        server.reply = reply
        with pytest.raises(ServerUnavailable, match="no answer for") as over:
            http.generate(asked, GREEDY)
        assert over.value.answered and set(over.value.answered) < set(range(12))
        for position, completion in over.value.answered.items():
            assert completion.tokens.tolist() == [asked[position].tokens[-1]] * 6
        http.close()


def test_no_server_at_all_is_told_after_patience() -> None:
    told: list[str] = []
    with pytest.raises(ServerUnavailable, match="ConnectError"):
        quick(f"http://127.0.0.1:{free_port()}", patience=0.1, on_wait=told.append)
    assert len(told) == 1 and "up to 0.1 s" in told[0]


@pytest.mark.parametrize("limit", [1, 4])
def test_no_more_requests_at_once_than_were_asked_for(limit: int) -> None:
    reached = threading.Event()

    def reply(path: str, body: Any) -> Any:
        if server.most >= limit:
            reached.set()
        assert path != "/v1/completions" or len(body["prompt"]) == 1 or reached.wait(20)
        return said(body)

    with Scripted(reply) as server:
        http = quick(server.url, concurrency=limit)
        asked = requests(60)
        done = http.generate(asked, GREEDY)
        assert [c.tokens[0] for c in done] == [request.tokens[-1] for request in asked]
        assert server.most == limit
        http.close()


def test_an_answer_that_is_none_is_told() -> None:
    with Scripted(obedient) as server:
        http = quick(server.url)
        for nonsense in (b"<html>", {"choices": []}, said({}, tokens=[1] * 99)[1]):
            server.reply = lambda path, body, nonsense=nonsense: (200, nonsense)
            with pytest.raises(BadAnswer):
                http.generate(requests(2), GREEDY)
        http.close()


def sockets() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link).startswith("socket:") for link in links)


def test_nothing_is_left_after_close(server: ModelServer) -> None:
    gc.collect()
    threads, open_sockets = set(threading.enumerate()), sockets()
    http = HTTPEngine(server.url)
    http.generate(requests(8), SamplingParams())
    stream = http.stream(SamplingParams())
    stream.add(requests(1, max_tokens=200)[0])
    http.close()
    http.close()
    assert set(threading.enumerate()) <= threads
    assert until(lambda: sockets() <= open_sockets)
    assert until(lambda: server.running == 0)
    assert stream.running == 0 and stream.step() == []
    for use in (lambda: http.generate(requests(1), GREEDY), lambda: http.load_weights({}, 1)):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_nothing_is_left_when_the_constructor_fails() -> None:
    threads = set(threading.enumerate())
    with Scripted(obedient) as server:
        with pytest.raises(UsageError, match="has no model 'tine'"):
            quick(server.url, model="tine")
        with pytest.raises(UsageError, match="give vocabulary"):
            quick(server.url, vocabulary=None)
        server.pages["/v1/models"] = (401, {"error": {"message": "no key"}})
        with pytest.raises(ServerRefused, match="no key"):
            quick(server.url)
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(
    "options",
    [{"concurrency": 0}, {"timeout": 0.0}, {"patience": -1.0}, {"mode": "token"}, {"entropy_top_k": 0}],
)
def test_bad_options_are_told_before_anything_is_sent(options: dict[str, Any]) -> None:
    with Scripted(obedient) as server:
        with pytest.raises(UsageError, match=next(iter(options))):
            HTTPEngine(server.url, **options)
        assert not server.bodies
    with pytest.raises(UsageError, match="no server"):
        HTTPEngine("localhost:8000")


def test_tokens_outside_the_vocabulary_are_not_sent(http: HTTPEngine) -> None:
    with pytest.raises(UsageError, match="ids from 0 to 96"):
        http.generate([*requests(2), Request(np.array([97]), 0, 1)], GREEDY)


def test_new_weights_change_the_version_and_the_log_probabilities(tmp_path: Path) -> None:
    asked = requests(4)
    other = model(seed=1)
    expected = reference(seed=1).generate(asked, GREEDY)
    with served() as server:
        http = HTTPEngine(server.url)
        old = http.generate(asked, GREEDY)
        http.load_weights(other.state_dict(), version=3)
        new = http.generate(asked, GREEDY)
        same(new, expected)
        assert [c.version for c in (old[0], new[0])] == [0, 3]
        assert np.abs(old[0].logprobs[0] - new[0].logprobs[0]) > 1e-3

        model(seed=0).save_pretrained(tmp_path)
        http.load_weights(tmp_path, version=4)
        same(http.generate(asked, GREEDY), old)
        with pytest.raises(UsageError, match="do not fit"):
            http.load_weights({"nothing": torch.zeros(1)}, version=5)
        with pytest.raises(UsageError, match="no module"):
            http.load_weights(None, version=5)
        with pytest.raises(UsageError, match=r"no model\*\.safetensors"):
            http.load_weights(tmp_path / "absent", version=5)
        assert http.generate(asked, GREEDY)[0].version == 4
        http.close()


def test_a_server_that_forgot_the_weights_is_given_the_folder_again(tmp_path: Path) -> None:
    model(seed=1).save_pretrained(tmp_path)
    asked, port = requests(3), free_port()
    with served(port=port) as server:
        http = quick(server.url)
        http.load_weights(tmp_path, version=2)
        expected = http.generate(asked, GREEDY)
    with served(port=port):
        same(http.generate(asked, GREEDY), expected)
        http.load_weights(model(seed=1).state_dict(), version=3)
    with served(port=port), pytest.raises(BadAnswer, match="version 0 of the weights, not 3"):
        http.generate(asked, GREEDY)
    http.close()


def test_other_servers_take_no_weights() -> None:
    with Scripted(obedient) as server:
        http = quick(server.url)
        assert not http.takes_weights
        with pytest.raises(UsageError, match="takes no weights"):
            http.load_weights({}, 1)
        http.close()


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(api_key="secret") as server:
        with pytest.raises(ServerRefused, match="API key"):
            HTTPEngine(server.url)
        HTTPEngine(server.url, api_key="secret").close()
        monkeypatch.setenv("MY_KEY", "secret")
        HTTPEngine(server.url, api_key_env="MY_KEY").close()


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    made = tiny_model()
    behind = TorchEngine(made, Words(), max_batch=16)
    with ModelServer(behind, Words(), port=0, max_positions=POSITIONS) as server:
        # Few connections, because they are among what must not grow.
        http = HTTPEngine(server.url, module=made, concurrency=4)
        yield Subject(http, made, tolerance=1e-4)
        http.close()
    behind.close()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__.removeprefix("check_"))
def test_it_keeps_the_promises_of_every_engine(subject: Subject, claim: Callable[[Subject], None]) -> None:
    claim(subject)


def vllm_python() -> str | None:
    given = os.environ.get("AGENTROPY_VLLM_PYTHON")
    default = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
    return given or (str(default) if default.exists() else None)


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason="AGENTROPY_VLLM_PYTHON names no Python with vLLM")
def test_a_real_vllm_server(tmp_path: Path) -> None:
    made = tiny_model()
    words = build_word_tokenizer([" ".join(f"word{i}" for i in range(505))])
    made.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    port = free_port()
    command = [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(POSITIONS)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "PYTHONPATH": ""}
    process = subprocess.Popen([*command, "--enforce-eager"], env=os.environ | settings)
    try:
        http = HTTPEngine(f"http://127.0.0.1:{port}", tokenizer=words, patience=300.0)
        assert (http.mode, http.reported, http.trainable) == ("tokens", Reported.RAW, True)
        subject = Subject(http, made)
        asked = conformance.requests(conformance.contexts(20))
        done = http.generate(asked, SamplingParams(entropy_top_k=5))
        for request, completion in zip(asked, done, strict=True):
            conformance.assert_agrees(subject, request, completion)
        stop = int(done[0].tokens[3])
        for params in (SamplingParams(stop_token_ids=(stop,)), SamplingParams(stop_strings=(words.decode([stop]),))):
            (ended,) = http.generate(asked[:1], params)
            assert (ended.tokens.tolist(), ended.stop) == (done[0].tokens[:4].tolist(), StopReason.STOP)
        names = (
            "entropies_can",
            "greedy",
            "seeds",
            "stop_token",
            "last_position",
            "stream",
            "cancelling",
            "bad_requests",
        )
        for claim in CLAIMS:
            if any(name in claim.__name__ for name in names):
                claim(subject)
        with pytest.warns(UserWarning, match="processed_logprobs"):
            assert np.isnan(http.generate(asked[:1], SamplingParams(temperature=0.7))[0].logprobs).all()
        http.close()
    finally:
        process.terminate()
        process.wait(30)


def test_no_warning_for_tokens(server: ModelServer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HTTPEngine(server.url).close()

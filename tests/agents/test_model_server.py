"""Any OpenAI client can use the server; requests share batches and do not disturb each other."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx
from safetensors.torch import save

from agentropy.agents import model_command
from agentropy.agents.engines import Completion, EngineStats, Request, SamplingParams, StopReason
from agentropy.agents.model_batching import Batcher
from agentropy.agents.model_server import ModelServer
from agentropy.errors import AgentropyError, UsageError

from .serving import POSITIONS, free_port, model, reference, served, tokenizer

WORDS = tokenizer()
PROMPT = "word1 word2 word3"
IDS: list[int] = WORDS.encode(PROMPT, add_special_tokens=False)


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


@pytest.fixture(scope="module")
def client(server: ModelServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
        yield client


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "seed": 1} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    return str(error["message"])


def until(happened: Callable[[], Any], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(done)


def alone(tokens: list[int], seed: int, max_tokens: int, params: SamplingParams) -> Completion:
    return reference().generate([Request(np.array(tokens), seed, max_tokens)], params)[0]


def test_the_model_is_listed(client: httpx.Client) -> None:
    (about,) = client.get("/v1/models").json()["data"]
    assert (about["id"], about["object"], about["owned_by"]) == ("tiny", "model", "agentropy")
    assert (about["vocab_size"], about["max_model_len"], about["weights_version"]) == (97, POSITIONS, 0)
    assert client.get("/health").json()["status"] == "ok"


def test_a_completion_has_openais_form(client: httpx.Client) -> None:
    answer = complete(client, max_tokens=5, logprobs=0)
    (choice,) = answer["choices"]
    expected = alone(IDS, 1, 5, SamplingParams(stop_token_ids=(WORDS.eos_token_id,)))
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == len(expected.tokens)
    assert choice["text"] == WORDS.decode(expected.tokens.tolist(), skip_special_tokens=True)
    assert choice["index"] == 0 and choice["finish_reason"] in ("stop", "length")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.raw_logprobs.tolist(), abs=1e-4)
    assert "token_ids" not in choice and "agentropy" not in answer


def test_prompts_are_text_or_ids_or_lists_of_either(client: httpx.Client) -> None:
    forms: list[Any] = [PROMPT, IDS, [PROMPT, PROMPT], [IDS, IDS]]
    answers = [complete(client, prompt=form, temperature=0.7, ignore_eos=True) for form in forms]
    texts = {choice["text"] for answer in answers for choice in answer["choices"]}
    assert [len(answer["choices"]) for answer in answers] == [1, 1, 2, 2] and len(texts) == 1
    assert [choice["index"] for choice in answers[2]["choices"]] == [0, 1]
    assert answers[0]["usage"]["completion_tokens"] == 16  # OpenAI's default


def test_token_ids_and_statistics_are_told_when_asked_for(client: httpx.Client) -> None:
    answer = complete(client, prompt=IDS, max_tokens=4, return_token_ids=True, ignore_eos=True, seed=-1)
    expected = alone(IDS, 2**64 - 1, 4, SamplingParams())
    assert answer["choices"][0]["token_ids"] == expected.tokens.tolist()
    assert (answer["agentropy"]["version"], answer["agentropy"]["stop"]) == (0, "length")


def test_completions_stop_at_the_models_end_unless_told_otherwise(client: httpx.Client) -> None:
    seed = next(seed for seed in range(50) if WORDS.eos_token_id in alone(IDS, seed, 60, SamplingParams()).tokens)
    free = complete(client, max_tokens=60, seed=seed, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert len(free["token_ids"]) == 60
    choice = complete(client, max_tokens=60, seed=seed, return_token_ids=True)["choices"][0]
    assert (
        choice["finish_reason"] == "stop"
        and choice["token_ids"].index(WORDS.eos_token_id) == len(choice["token_ids"]) - 1
    )
    assert "<end>" not in choice["text"]


def test_stop_strings_are_left_out_of_the_text_unless_asked_for(client: httpx.Client) -> None:
    free = complete(client, max_tokens=12, ignore_eos=True, seed=4)["choices"][0]["text"]
    word = next(word for word in free.split() if word.startswith("word"))
    options = {"max_tokens": 12, "ignore_eos": True, "seed": 4, "stop": word}
    without = complete(client, **options)["choices"][0]
    assert (without["text"], without["finish_reason"], without["stop_reason"]) == (
        free[: free.index(word)],
        "stop",
        word,
    )
    included = complete(client, **options, include_stop_str_in_output=True)["choices"][0]
    assert included["text"] == free[: free.index(word) + len(word)]


def test_a_stream_is_one_event_and_the_end(client: httpx.Client) -> None:
    whole = complete(client, max_tokens=4)
    response = client.post("/v1/completions", json={"prompt": PROMPT, "seed": 1, "max_tokens": 4, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, last, _ = response.text.split("\n\n")
    assert last == "data: [DONE]"
    assert json.loads(first.removeprefix("data: "))["choices"] == whole["choices"]


def test_a_chat_is_rendered_by_the_template(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "word1"}, {"role": "user", "content": "word2"}]
    rendered = WORDS.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    body = {"messages": messages, "max_completion_tokens": 6, "seed": 3, "logprobs": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    ids = WORDS.encode(rendered, add_special_tokens=False)
    expected = alone(ids, 3, 6, SamplingParams(stop_token_ids=(WORDS.eos_token_id,)))
    (choice,) = answer["choices"]
    text = WORDS.decode([t for t in expected.tokens.tolist() if t not in WORDS.all_special_ids])
    assert answer["object"] == "chat.completion" and choice["message"] == {"role": "assistant", "content": text}
    assert answer["usage"]["prompt_tokens"] == len(ids)
    said = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert said == pytest.approx(expected.raw_logprobs.tolist(), abs=1e-4)
    streamed = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    assert json.loads(streamed.split("\n\n")[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == text


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": []}, 400, "0 prompts"),
        ({"prompt": [1, 97]}, 400, "token 97; expected ids from 0 to 96"),
        ({"prompt": [-1]}, 400, "token -1"),
        ({"prompt": [1] * POSITIONS}, 400, f"maximum context length is {POSITIONS}"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "n": 2}, 400, "n is 2; this server supports 1 only"),
        ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias"),
        ({"prompt": "a", "echo": True}, 400, "echo"),
        ({"prompt": "a", "model": "huge"}, 404, "the model 'huge' does not exist; this server has 'tiny'"),
    ],
)
def test_what_is_wrong_is_told_in_openais_form(
    client: httpx.Client, body: dict[str, Any], status: int, reason: str
) -> None:
    assert reason in refusal(client.post("/v1/completions", json=body), status)


def test_nonsense_is_refused(client: httpx.Client) -> None:
    assert "JSON" in refusal(client.post("/v1/completions", content=b"{"), 400)
    refusal(client.get("/v1/nothing"), 404)
    assert "messages" in refusal(client.post("/v1/chat/completions", json={"messages": []}), 400)


def test_requests_of_all_kinds_share_the_engine_and_do_not_disturb_each_other(client: httpx.Client) -> None:
    rng = np.random.default_rng(0)
    bodies = [
        {
            "prompt": rng.integers(6, 97, size=rng.integers(1, 30)).tolist(),
            "seed": int(rng.integers(2**62)),
            "temperature": float(rng.choice([0.0, 0.5, 1.0])),
            "top_k": int(rng.choice([0, 5])),
            "max_tokens": int(rng.integers(1, 20)),
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for _ in range(60)
    ]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: complete(client, **body), bodies))
    for body, answer in zip(bodies, together, strict=True):
        params = SamplingParams(body["temperature"], body["top_k"])
        expected = alone(body["prompt"], body["seed"], body["max_tokens"], params)
        assert answer["choices"][0]["token_ids"] == expected.tokens.tolist()


class Clockwork:
    """An engine whose requests end when they are told to; a prompt of [0] breaks its stream."""

    vocabulary, exact = 97, True

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.going = threading.Event()
        self.heard: list[str] = []
        self.streams = self.most = 0

    def stream(self, params: SamplingParams) -> Any:
        return Ticking(self, params)


class Ticking:
    def __init__(self, owner: Clockwork, params: SamplingParams) -> None:
        if params.top_k == 13:
            raise UsageError("13 brings bad luck")
        self.owner, self.tickets, self.open = owner, 0, dict[int, Request]()
        owner.streams += 1
        owner.most = max(owner.most, owner.streams)

    def add(self, request: Request) -> int:
        self.open[self.tickets] = request
        self.owner.heard.append("add")
        self.tickets += 1
        return self.tickets - 1

    def step(self) -> list[tuple[int, Completion]]:
        time.sleep(0.001)
        if any(request.tokens[0] == 0 for request in self.open.values()):
            raise RuntimeError("the model is broken")
        if not self.owner.going.is_set():
            return []
        ended, self.open = list(self.open), {}
        nothing = np.zeros(1, np.float32)
        self.owner.heard += ["end"] * len(ended)
        return [(t, Completion(np.ones(1, np.int32), *[nothing] * 4, StopReason.LENGTH, 0, 0)) for t in ended]

    def cancel(self, ticket: int) -> None:
        del self.open[ticket]
        self.owner.heard.append("cancel")

    def close(self) -> None:
        self.owner.streams -= 1


def ask(token: int = 1, params: SamplingParams | None = None) -> tuple[Request, SamplingParams]:
    return Request(np.array([token]), 0, 1), params or SamplingParams()


@pytest.fixture
def clockwork() -> Iterator[tuple[Clockwork, Batcher]]:
    behind = Clockwork()
    batcher = Batcher(behind)  # type: ignore[arg-type]
    yield behind, batcher
    batcher.close()
    assert behind.streams == 0


def test_an_update_waits_for_what_runs_and_holds_what_comes(clockwork: tuple[Clockwork, Batcher]) -> None:
    behind, batcher = clockwork
    first = [batcher.submit(*ask()) for _ in range(3)]
    update: Future[None] = batcher.update(lambda _: behind.heard.append("update"))
    later = [batcher.submit(*ask()) for _ in range(2)]
    assert until(lambda: batcher.running == 3)
    behind.going.set()
    for future in (*first, update, *later):
        future.result(20)
    assert behind.heard == ["add"] * 3 + ["end"] * 3 + ["update"] + ["add"] * 2 + ["end"] * 2
    assert until(lambda: batcher.waiting == 0)


def test_an_update_that_fails_is_told_and_the_others_go_on(clockwork: tuple[Clockwork, Batcher]) -> None:
    behind, batcher = clockwork
    behind.going.set()

    def fail(_: Any) -> None:
        raise UsageError("no such folder")

    with pytest.raises(UsageError, match="no such folder"):
        batcher.update(fail).result(20)
    assert len(batcher.submit(*ask()).result(20).tokens) == 1


def test_a_broken_stream_ends_its_own_requests_only(clockwork: tuple[Clockwork, Batcher]) -> None:
    behind, batcher = clockwork
    other = batcher.submit(*ask(params=SamplingParams(top_k=2)))
    broken = [batcher.submit(*ask(0)), batcher.submit(*ask(1))]
    for future in broken:
        with pytest.raises(AgentropyError, match="RuntimeError: the model is broken"):
            future.result(20)
    with pytest.raises(UsageError, match="bad luck"):
        batcher.submit(*ask(params=SamplingParams(top_k=13))).result(20)
    behind.going.set()
    assert len(other.result(20).tokens) == 1 and len(batcher.submit(*ask()).result(20).tokens) == 1


def test_requests_with_equal_parameters_share_a_stream(clockwork: tuple[Clockwork, Batcher]) -> None:
    behind, batcher = clockwork
    futures = [batcher.submit(*ask(params=SamplingParams(top_k=k % 2))) for k in range(10)]
    assert until(lambda: batcher.running == 10) and behind.streams == 2
    behind.going.set()
    assert all(future.result(20) for future in futures)
    assert until(lambda: behind.streams == 0) and behind.most == 2


def test_closing_ends_what_runs_and_takes_nothing_more() -> None:
    batcher = Batcher(Clockwork())  # type: ignore[arg-type]
    running = batcher.submit(*ask())
    batcher.close()
    batcher.close()
    with pytest.raises((AgentropyError, CancelledError)):
        running.result(1)
    for use in (lambda: batcher.submit(*ask()), lambda: batcher.update(print)):
        with pytest.raises(AgentropyError, match="shutting down"):
            use()


def test_a_client_that_goes_away_is_not_generated_for() -> None:
    behind = Clockwork()
    with ModelServer(behind, tokenizer(), port=0) as server:  # type: ignore[arg-type]
        with httpx.Client(base_url=server.url, trust_env=False) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"prompt": [[1], [2]]}, timeout=0.5)
        assert until(lambda: behind.heard == ["add", "add", "cancel", "cancel"]) and server.running == 0


def test_a_fault_of_the_engine_is_an_answer_and_the_server_goes_on() -> None:
    behind = Clockwork()
    behind.going.set()
    server = ModelServer(behind, tokenizer(), port=0)  # type: ignore[arg-type]
    with server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert "the model is broken" in refusal(client.post("/v1/completions", json={"prompt": [0]}), 500)
        assert client.post("/v1/completions", json={"prompt": [1]}).status_code == 200


def test_weights_are_replaced_in_place(tmp_path: Path) -> None:
    body = {"prompt": IDS, "temperature": 0, "max_tokens": 3, "logprobs": 0, "return_token_ids": True}
    with served() as server, httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:

        def said() -> tuple[int, list[float]]:
            answer = client.post("/v1/completions", json=body).json()
            return answer["agentropy"]["version"], answer["choices"][0]["logprobs"]["token_logprobs"]

        old = said()
        state = {name: value.clone() for name, value in model(seed=1).state_dict().items()}
        response = client.post("/v1/weights?version=7", content=save(state))
        assert response.json() == {"weights_version": 7}
        new = said()
        assert (old[0], new[0]) == (0, 7) and old[1] != new[1]
        assert client.get("/v1/models").json()["data"][0]["weights_version"] == 7

        model(seed=0).save_pretrained(tmp_path)
        assert client.post("/v1/weights", json={"path": str(tmp_path), "version": 8}).status_code == 200
        assert said() == (8, pytest.approx(old[1], abs=1e-4))

        assert "?version=n" in refusal(client.post("/v1/weights", content=save(state)), 400)
        assert "safetensors" in refusal(client.post("/v1/weights?version=9", content=b"nonsense"), 400)
        assert "do not fit" in refusal(client.post("/v1/weights?version=9", content=save({"a": torch.ones(1)})), 400)
        assert "version" in refusal(client.post("/v1/weights", json={"path": str(tmp_path)}), 400)
        assert said() == (8, pytest.approx(old[1], abs=1e-4))


def test_the_key_is_needed_but_for_health() -> None:
    with served(api_key="secret") as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        for given in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            assert "API key" in refusal(client.post("/v1/completions", json={"prompt": [1]}, headers=given), 401)
            refusal(client.post("/v1/weights?version=1", content=b"", headers=given), 401)
        assert client.get("/health").status_code == 200
        let_in = client.post("/v1/completions", json={"prompt": [1]}, headers={"authorization": "Bearer secret"})
        assert let_in.status_code == 200


def test_strangers_cannot_change_the_weights() -> None:
    with served(host="0.0.0.0") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        response = httpx.post(f"{url}/v1/weights?version=1", content=b"", trust_env=False)
        assert "loopback" in refusal(response, 403)


def test_a_taken_port_is_told() -> None:
    port = free_port()
    with served(port=port), pytest.raises(UsageError, match=f"port {port}"):
        ModelServer(Clockwork(), port=port)  # type: ignore[arg-type]


def test_the_command_serves_a_folder_until_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model().save_pretrained(tmp_path / "step-3")
    WORDS.save_pretrained(tmp_path / "step-3")
    port = free_port()
    monkeypatch.setenv("AGENTROPY_TOKEN", "secret")
    parser = argparse.ArgumentParser()
    model_command.add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path / "step-3"), "--port", str(port), "--max-batch", "4"])

    def use() -> dict[str, Any]:
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"model": "step-3", "prompt": IDS, "seed": 1, "max_tokens": 4, "return_token_ids": True}
        try:
            while True:
                try:
                    answer = httpx.post(url, json=body, headers={"authorization": "Bearer secret"}, trust_env=False)
                    return dict(answer.json()["choices"][0])
                except httpx.ConnectError:
                    time.sleep(0.02)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        said = pool.submit(use)
        assert model_command.main(arguments) == 0
    expected = alone(IDS, 1, 4, SamplingParams(stop_token_ids=(WORDS.eos_token_id,)))
    assert said.result()["token_ids"] == expected.tokens.tolist()
    assert f"serving step-3 on http://127.0.0.1:{port}" in capsys.readouterr().out


def test_no_thread_is_left_after_close() -> None:
    before = set(threading.enumerate())
    with served() as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]}, trust_env=False)
    server.close()
    assert set(threading.enumerate()) <= before

"""Each kind of server is asked in its own way, and what it tells is right or not a number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from agentropy.agents.engines import Request, SamplingParams, StopReason
from agentropy.agents.engines.http_engine import HTTPEngine
from agentropy.agents.engines.http_statistics import Answer, Reported, complete
from agentropy.agents.engines.http_text import messages_of
from agentropy.errors import UsageError
from agentropy.kernels.sampling import sample

from .scripted import Scripted, obedient, quick
from .serving import VOCABULARY, tokenizer

GREEDY = SamplingParams(temperature=0.0)


def test_text_is_for_evaluation_only() -> None:
    words = tokenizer()

    def reply(path: str, body: Any) -> Any:
        if not isinstance(body["prompt"], str):
            return 400, {"error": {"message": "prompt must be a string"}}
        return 200, {"choices": [{"text": "word1 word2", "finish_reason": "stop", "logprobs": None}]}

    with Scripted(reply) as server:
        with pytest.raises(UsageError, match=r"prompt must be a string.*text: needs a tokenizer"):
            quick(server.url)
        with pytest.warns(UserWarning, match="evaluation only"):
            http = HTTPEngine(server.url, tokenizer=words)
        assert (http.mode, http.trainable, http.exact, http.vocabulary) == ("text", False, False, VOCABULARY)
        context = words.encode("word3 word4", add_special_tokens=False)
        (done,) = http.generate([Request(np.array(context), 1, 9)], SamplingParams(stop_token_ids=(5,)))
        assert server.bodies[-1]["prompt"] == "word3 word4" and server.bodies[-1]["stop"] == ["<end>"]
        assert done.tokens.tolist() == [*words.encode("word1 word2", add_special_tokens=False), 5]
        assert np.isnan(done.logprobs).all() and np.isnan(done.entropies).all()
        http.close()


def test_chat_sends_the_messages_that_the_context_was_made_of() -> None:
    words = tokenizer()
    turns = [("system", "word1"), ("user", "word2 word3"), ("assistant", "word4"), ("user", "word5")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert messages_of(words, rendered) == messages
    assert messages_of(words, "word1 word2") == [{"role": "user", "content": "word1 word2"}]

    def reply(path: str, body: Any) -> Any:
        if path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}
        return 200, {"choices": [{"message": {"content": "word7"}, "finish_reason": "length"}]}

    with Scripted(reply) as server, pytest.warns(UserWarning, match="evaluation only"):
        http = HTTPEngine(server.url, tokenizer=words)
        (done,) = http.generate([Request(np.array([6, 7]), 1, 9)], GREEDY)
        assert http.mode == "chat" and done.tokens.tolist() == words.encode("word7", add_special_tokens=False)
        http.close()


def logits_of(context: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(context))
    return torch.randn(1, 12, generator=generator, dtype=torch.float64) * 2


def drawn(context: list[int], seed: int, params: SamplingParams) -> tuple[Any, torch.Tensor]:
    """One draw of a known distribution, and its log-probabilities before and after temperature and filters."""
    uniform = torch.tensor([np.random.default_rng(seed).random()], dtype=torch.float64)
    logits = logits_of(context)
    return sample(logits, uniform, params.temperature, params.top_k, params.top_p, 3), logits


REPORTS = list(Reported)


def top_of(logits: torch.Tensor, params: SamplingParams, reported: Reported, k: int, token: int) -> dict[int, float]:
    """What a server says: the k most probable tokens and the drawn one."""
    scale = 1.0 if reported is Reported.RAW or params.temperature == 0 else params.temperature
    logprobs = torch.log_softmax(logits[0] / scale, -1)
    if reported is Reported.PROCESSED and params.temperature > 0:
        order = logprobs.argsort(descending=True)
        kept = order[: params.top_k or None]
        mass = logprobs[kept].exp().cumsum(0) / logprobs[kept].exp().sum()
        kept = kept[: int((mass < params.top_p).sum()) + 1]
        logprobs = torch.full_like(logprobs, -math.inf).index_copy_(0, kept, torch.log_softmax(logprobs[kept], -1))
    return {int(i): float(logprobs[i]) for i in [*logprobs.topk(k).indices.tolist(), token] if logprobs[i] > -math.inf}


@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 2, 5]),
    top_p=st.sampled_from([1.0, 1.0, 0.6]),
    reported=st.sampled_from(REPORTS),
)
def test_what_a_server_tells_is_right_or_not_a_number(
    seed: int, temperature: float, top_k: int, top_p: float, reported: Reported
) -> None:
    params = SamplingParams(temperature, top_k, top_p, entropy_top_k=3)
    reference, logits = drawn([seed], seed, params)
    token = int(reference.token[0])
    top = top_of(logits, params, reported, 3, token)
    done = complete(Answer([token], StopReason.LENGTH, [top[token]], [top]), params, reported, k=3)
    expected = {
        "logprobs": reference.logprob_tempered,
        "raw_logprobs": reference.logprob_raw,
        "entropies": reference.entropy_tempered,
        "raw_entropies": reference.entropy_raw,
        "processed_logprobs": reference.logprob_processed,
        "kept_logmass": reference.kept_logmass,
    }
    known = {name for name in expected if not np.isnan(getattr(done, name)[0])}
    for name in known:
        assert getattr(done, name)[0] == pytest.approx(float(expected[name][0]), abs=1e-5), name
    filtered = temperature > 0 and (top_k > 0 or top_p < 1)
    same_as_raw = temperature in (0.0, 1.0)
    if not filtered:
        if same_as_raw:
            assert known == set(expected)
        elif reported is Reported.RAW:
            assert known == {"raw_logprobs", "raw_entropies", "kept_logmass"}
        else:
            assert known == {"logprobs", "entropies", "processed_logprobs", "kept_logmass"}
    elif reported is Reported.PROCESSED:
        assert known == {"processed_logprobs"}
    elif reported is Reported.TEMPERED or same_as_raw:
        assert {"logprobs", "entropies"} <= known
        assert top_k != 2 or "kept_logmass" in known  # the cut lies within the three that were told


def speaking_vllm(reported: Reported) -> Callable[[str, Any], Any]:
    def reply(path: str, body: Any) -> Any:
        params = SamplingParams(body["temperature"], body["top_k"], body["top_p"])
        made, logits = drawn(body["prompt"], body["seed"], params)
        token = int(made.token[0])
        top = top_of(logits, params, reported, body["logprobs"], token)
        named = {f"token_id:{i}": value for i, value in top.items()}
        logprobs = {"tokens": [f"token_id:{token}"], "token_logprobs": [top[token]], "top_logprobs": [named]}
        return 200, {"choices": [{"token_ids": [token], "finish_reason": "length", "text": "", "logprobs": logprobs}]}

    return reply


def speaking_sglang(path: str, body: Any) -> Any:
    assert path == "/generate"
    options = body["sampling_params"]
    params = SamplingParams(options["temperature"], max(0, options["top_k"]), options["top_p"])
    made, logits = drawn(body["input_ids"], options["sampling_seed"], params)
    token = int(made.token[0])
    top = top_of(logits, params, Reported.TEMPERED, body["top_logprobs_num"], token)
    listed = [[value, i, None] for i, value in top.items()][: body["top_logprobs_num"]]
    about = {"output_token_logprobs": [[top[token], token, None]], "output_top_logprobs": [listed]}
    return 200, {
        "text": "?",
        "meta_info": about | {"finish_reason": {"type": "length", "length": 1}, "cached_tokens": 1},
    }


def speaking_llamacpp(path: str, body: Any) -> Any:
    assert path == "/completion"
    params = SamplingParams(body["temperature"], body["top_k"], body["top_p"])
    made, logits = drawn(body["prompt"], body["seed"], params)
    token = int(made.token[0])
    top = top_of(logits, params, Reported.RAW, body["n_probs"], token)
    listed = [{"id": i, "logprob": value} for i, value in top.items()][: body["n_probs"]]
    # After its stop token this server goes on to talk.
    said = [{"id": token, "logprob": top[token], "top_logprobs": listed}] * body["n_predict"]
    return 200, {"tokens": [token] * body["n_predict"], "stop_type": "limit", "completion_probabilities": said}


@pytest.mark.parametrize(
    ("owner", "reply", "reported"),
    [
        *(("vllm", speaking_vllm(reported), reported) for reported in Reported),
        ("sglang", speaking_sglang, Reported.TEMPERED),
        ("llamacpp", speaking_llamacpp, Reported.RAW),
    ],
)
def test_each_server_is_asked_in_its_own_way(owner: str, reply: Any, reported: Reported) -> None:
    params = SamplingParams(entropy_top_k=3)
    warm = SamplingParams(temperature=0.5, entropy_top_k=3)
    with Scripted(reply, owner=owner, max_model_len=50) as server:
        http = quick(server.url)
        assert (http.mode, http.reported, http.trainable) == ("tokens", reported, True)
        asked = [Request(np.array([i, 3]), i, 1) for i in range(5)]
        for request, done in zip(asked, http.generate(asked, params), strict=True):
            expected, _ = drawn(request.tokens.tolist(), request.seed, params)
            assert done.tokens.tolist() == expected.token.tolist()
            assert done.logprobs == pytest.approx(expected.logprob_tempered.numpy(), abs=1e-5)
            assert done.entropies == pytest.approx(expected.entropy_tempered.numpy(), abs=1e-5)
            assert done.entropy_top_k == 3
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (done,) = http.generate(asked[:1], warm)
        expected, _ = drawn(asked[0].tokens.tolist(), asked[0].seed, warm)
        if reported is Reported.RAW:
            assert np.isnan(done.logprobs).all() and "processed_logprobs" in str(told[0].message)
        else:
            assert done.logprobs == pytest.approx(expected.logprob_tempered.numpy(), abs=1e-5) and not told
        http.close()


def test_what_llamacpp_says_after_a_stop_token_is_cut_off() -> None:
    with Scripted(speaking_llamacpp, owner="llamacpp", meta={"n_vocab": 12}) as server:
        http = HTTPEngine(server.url)
        token = int(drawn([4], 0, GREEDY)[0].token[0])
        (cut,) = http.generate([Request(np.array([4]), 0, 5)], SamplingParams(0.0, stop_token_ids=(token,)))
        (whole,) = http.generate([Request(np.array([4]), 0, 5)], GREEDY)
        assert (cut.tokens.tolist(), cut.stop, len(cut.logprobs)) == ([token], StopReason.STOP, 1)
        assert (whole.tokens.tolist(), whole.stop) == ([token] * 5, StopReason.LENGTH)
        assert http.vocabulary == 12
        http.close()


def test_everything_that_changes_the_distribution_is_sent() -> None:
    with Scripted(obedient, owner="vllm") as server, pytest.warns(UserWarning, match="nan"):
        http = quick(server.url)
        params = SamplingParams(0.8, 7, 0.5, stop_token_ids=(3,), stop_strings=("x",))
        http.generate([Request(np.array([1, 2]), 2**64 - 2, 4)], params)
        body = server.bodies[-1]
        assert (body["temperature"], body["top_k"], body["top_p"], body["seed"]) == (0.8, 7, 0.5, -2)
        assert (body["stop"], body["stop_token_ids"], body["ignore_eos"]) == (["x"], [3], True)
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
        http.close()

"""How token ids are asked of each kind of server, and how its answers are read.

- ``Dialect``: the two halves of one server's protocol. ``dialect_of``: the one that a server speaks.
- ``Completions``: ``/v1/completions`` with token ids, as vLLM and this package's server take them.
- ``Generate``: SGLang's ``/generate``. ``LlamaCpp``: llama.cpp's ``/completion``.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .base import Request, SamplingParams, StopReason
from .http_statistics import Answer, Float32Array

OURS = "agentropy"
"""What this package's server calls itself in ``/v1/models``, and the field of its answers that others lack."""


class Dialect(Protocol):
    """One server's protocol."""

    path: str

    def body(self, request: Request, params: SamplingParams, max_tokens: int, k: int) -> dict[str, Any]:
        """The JSON that asks for at most ``max_tokens`` tokens and the ``k`` most probable ones at each."""
        ...

    def read(self, answer: Any, request: Request, params: SamplingParams) -> Answer:
        """Read the JSON that answers; KeyError, TypeError, ValueError or IndexError where it is something else."""
        ...


def dialect_of(owner: str, model: str) -> Dialect:
    """The dialect of a server that says in ``/v1/models`` that its model is ``owned_by`` ``owner``."""
    if owner == "sglang":
        return Generate()
    if owner == "llamacpp":
        return LlamaCpp()
    return Completions(model)


class Completions:
    """OpenAI's ``/v1/completions`` with vLLM's extensions: token ids in, token ids out.

    Everything that changes the distribution is sent, because vLLM takes what is left out from the model's
    ``generation_config.json``. ``ignore_eos``: generation stops at the request's stop tokens and at nothing else.
    """

    path = "/v1/completions"

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, request: Request, params: SamplingParams, max_tokens: int, k: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": request.tokens.tolist(),
            "max_tokens": max_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": _signed(request.seed),
            "stop": list(params.stop_strings),
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": k,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "entropy_top_k": params.entropy_top_k,
        }

    def read(self, answer: Any, request: Request, params: SamplingParams) -> Answer:
        (choice,) = answer["choices"]
        said = choice.get("logprobs") or {}
        tokens = choice.get("token_ids")
        if tokens is None:  # vLLM before 0.10.2
            tokens = [_token_id(token) for token in said["tokens"]]
        usage = answer.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        own = answer.get(OURS)
        return Answer(
            tokens=tokens,
            stop=StopReason(own["stop"]) if own else _finish(choice["finish_reason"]),
            logprobs=said.get("token_logprobs"),
            top=[{_token_id(token): value for token, value in (row or {}).items()} for row in said["top_logprobs"]]
            if said.get("top_logprobs")
            else (),
            exact=unpacked(own["statistics"], len(tokens)) if own else None,
            version=own["version"] if own else 0,
            cached_tokens=details.get("cached_tokens") or 0,
        )


class Generate:
    """SGLang's ``/generate``. Seeds count only where it was started with ``--enable-deterministic-inference``."""

    path = "/generate"

    def body(self, request: Request, params: SamplingParams, max_tokens: int, k: int) -> dict[str, Any]:
        return {
            "input_ids": request.tokens.tolist(),
            "sampling_params": {
                "max_new_tokens": max_tokens,
                "temperature": params.temperature,
                "top_k": params.top_k or -1,
                "top_p": params.top_p,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "sampling_seed": request.seed % 2**63,
                "stop": list(params.stop_strings),
                "stop_token_ids": list(params.stop_token_ids),
                "ignore_eos": True,
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
            "return_logprob": True,
            "top_logprobs_num": k,
        }

    def read(self, answer: Any, request: Request, params: SamplingParams) -> Answer:
        about = answer["meta_info"]
        drawn = about["output_token_logprobs"]
        top = about.get("output_top_logprobs") or ()
        rows = [
            {int(token): float(value) for value, token, *_ in [*(row or ()), one]}
            for row, one in zip(top, drawn, strict=False)
        ]
        return Answer(
            tokens=[int(token) for _, token, *_ in drawn],
            stop=_finish((about["finish_reason"] or {}).get("type")),
            logprobs=[value for value, *_ in drawn],
            top=rows,
            cached_tokens=int(about.get("cached_tokens") or 0),
        )


class LlamaCpp:
    """llama.cpp's ``/completion``.

    It has no stop tokens but the model's own ends, at which it always stops: what it says after a stop token is cut
    off. With a stop string it leaves out the log-probabilities of that string's tokens.
    """

    path = "/completion"

    def body(self, request: Request, params: SamplingParams, max_tokens: int, k: int) -> dict[str, Any]:
        return {
            "prompt": request.tokens.tolist(),
            "n_predict": max_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repeat_penalty": 1.0,
            # By default it filters before it divides by the temperature.
            "samplers": ["temperature", "top_k", "top_p"],
            "seed": request.seed % (2**32 - 1),
            "stop": list(params.stop_strings),
            "n_probs": max(1, k),
            "return_tokens": True,
            "cache_prompt": True,
        }

    def read(self, answer: Any, request: Request, params: SamplingParams) -> Answer:
        tokens: list[int] = answer["tokens"]
        said = answer.get("completion_probabilities") or ()
        stop = StopReason.LENGTH if answer["stop_type"] == "limit" else StopReason.STOP
        ends = set(params.stop_token_ids)
        for i, token in enumerate(tokens):
            if token in ends:
                tokens, stop = tokens[: i + 1], StopReason.STOP
                break
        rows = [
            {entry["id"]: entry["logprob"] for entry in [*position["top_logprobs"], position]}
            for position in said[: len(tokens)]
        ]
        return Answer(tokens, stop, [position["logprob"] for position in said[: len(tokens)]], rows)


def packed(statistics: Sequence[Float32Array]) -> str:
    """float32[6, n] as text; see ``Answer.exact``."""
    return base64.b64encode(np.asarray(statistics, "<f4").tobytes()).decode()


def unpacked(text: str, n: int) -> Float32Array:
    """The inverse of ``packed``."""
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(6, n).astype(np.float32)


def _finish(reason: str | Mapping[str, Any] | None) -> StopReason:
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason is {reason!r}")
    return StopReason(reason)


def _token_id(token: str) -> int:
    """The id that vLLM writes as ``token_id:123``."""
    return int(token.removeprefix("token_id:"))


def _signed(seed: int) -> int:
    """64 bits as the signed number that servers take."""
    return seed - 2**64 if seed >= 2**63 else seed

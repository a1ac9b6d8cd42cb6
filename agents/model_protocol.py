"""OpenAI's protocol for one model: what can be asked, and what is answered.

- ``Prompted``, ``Chat``, ``Weights``: bodies of requests. ``read``: one of them from JSON. ``answer``: what comes back.
- ``ServedModel``: makes requests and sampling parameters of what is asked, and answers of completions.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError
from .chat import ChatFormat
from .engines.base import Completion, Request, SamplingParams, StopReason
from .engines.http_dialects import OURS, packed
from .model_batching import Batcher

_MAX_PROMPTS = 1024


class Options(BaseModel):
    """What completions and chats have in common. Unknown options are passed over, as clients send many."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    entropy_top_k: int = 0
    stream: bool = False
    n: int | None = 1
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    min_p: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None


class Prompted(Options):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = 1


class Chat(Options):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False


class Weights(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str
    version: int = Field(ge=0)


class ServedModel:
    """The model, its tokenizer and its limits; makes requests of prompts and answers of completions."""

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: Any,
        *,
        name: str,
        vocabulary: int,
        max_positions: int | None,
        stop_token_ids: Sequence[int],
    ) -> None:
        self.batcher = batcher
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = vocabulary
        self.max_positions = max_positions
        self.version = 0
        self.created = int(time.time())
        ends = list(stop_token_ids)
        if (end := getattr(tokenizer, "eos_token_id", None)) is not None:
            ends.append(end)
        self._ends = tuple(dict.fromkeys(ends))
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._turn_ends: tuple[int, ...] = ()
        if getattr(tokenizer, "chat_template", None):
            with contextlib.suppress(UsageError):  # without a token that ends a turn, the others must do
                self._turn_ends = ChatFormat(tokenizer).stop_token_ids

    def about(self) -> dict[str, Any]:
        """The entry of ``/v1/models``."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": OURS}
        about |= {"vocab_size": self.vocabulary, "weights_version": self.version}
        return about | ({"max_model_len": self.max_positions} if self.max_positions else {})

    def prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
        """Token ids of one prompt or of several."""
        several: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not several or len(several) > _MAX_PROMPTS:
            raise UsageError(f"{len(several)} prompts; expected 1 to {_MAX_PROMPTS}")
        return [self._encode(one, special=True) if isinstance(one, str) else one for one in several]

    def conversation(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of messages, up to where the assistant speaks."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("this model's tokenizer has no chat template; ask /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it may raise anything
            raise UsageError(f"the chat template does not take these messages: {error}") from error
        return self._encode(text, special=False)

    def sampling(self, options: Options, *, chat: bool) -> SamplingParams:
        """The sampling parameters that were asked for."""
        _refuse(options)
        stops = [options.stop] if isinstance(options.stop, str) else options.stop or []
        if stops and self.tokenizer is None:
            raise UsageError("this server has no tokenizer: it takes stop_token_ids, no stop")
        ends = list(options.stop_token_ids or ())
        if not options.ignore_eos:
            ends += [*self._ends, *(self._turn_ends if chat else ())]
        return SamplingParams(
            temperature=options.temperature,
            top_k=max(0, options.top_k),
            top_p=options.top_p,
            stop_token_ids=tuple(dict.fromkeys(ends)),
            stop_strings=tuple(stops),
            entropy_top_k=options.entropy_top_k,
        )

    def request(self, tokens: list[int], seed: int | None, max_tokens: int | None) -> Request:
        """A request whose tokens are in the vocabulary and leave room, so that it cannot spoil the batch."""
        if not tokens:
            raise UsageError("the prompt is empty; expected at least one token")
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong:
            raise UsageError(f"the prompt holds token {wrong[0]}; expected ids from 0 to {self.vocabulary - 1}")
        room = 2**31 if self.max_positions is None else self.max_positions - len(tokens)
        if room < 1:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens; this model's maximum context length is {self.max_positions}"
            )
        seed = secrets.randbits(64) if seed is None else seed % 2**64
        return Request(np.array(tokens, np.int32), seed, min(room, 256 if max_tokens is None else max_tokens))

    def choice(self, completion: Completion, options: Options, params: SamplingParams) -> dict[str, Any]:
        """What ``choices`` says of a completion, but for its text or message."""
        text, cut = self._text(completion, options, params)
        stopped = completion.stop is StopReason.STOP
        last = int(completion.tokens[-1]) if len(completion.tokens) else None
        reason = None if not stopped else cut if cut is not None else last
        choice = {
            "text": text,
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": (stopped and reason) or None,
        }
        if options.return_token_ids:
            choice["token_ids"] = completion.tokens.tolist()
        return choice

    def logprobs(self, completion: Completion, as_ids: bool) -> dict[str, Any]:
        """OpenAI's ``logprobs`` of a completion, without alternatives."""
        tokens = completion.tokens.tolist()
        return {
            "tokens": [self._name(token, as_ids) for token in tokens],
            "token_logprobs": completion.raw_logprobs.tolist(),
            "top_logprobs": None,
            "text_offset": None,
        }

    def chat_logprobs(self, completion: Completion, as_ids: bool) -> dict[str, Any]:
        """The same in the form of chats."""
        said = self.logprobs(completion, as_ids)
        pairs = zip(said["tokens"], said["token_logprobs"], strict=True)
        content = [{"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []} for t, v in pairs]
        return {"content": content}

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise UsageError("this server has no tokenizer: it takes prompts of token ids only")
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def _name(self, token: int, as_id: bool) -> str:
        return f"token_id:{token}" if as_id or self.tokenizer is None else str(self.tokenizer.decode([token]))

    def _text(self, completion: Completion, options: Options, params: SamplingParams) -> tuple[str, str | None]:
        """The text, and the stop string that it ended with."""
        if self.tokenizer is None:
            return "", None
        tokens = completion.tokens.tolist()
        if tokens and tokens[-1] in params.stop_token_ids and not options.include_stop_str_in_output:
            tokens.pop()
        if options.skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special]
        text = str(self.tokenizer.decode(tokens))
        found = [(text.find(stop), stop) for stop in params.stop_strings if stop in text]
        if not found or completion.stop is not StopReason.STOP:
            return text, None
        start, stop = min(found)
        return text[: start + (len(stop) if options.include_stop_str_in_output else 0)], stop


def read(kind: type[Any], body: bytes) -> Any:
    """Read options, with one sentence of what is wrong with them."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise UsageError(f"{where}: {first['msg']}") from error


def _refuse(options: Options) -> None:
    """Refuse what would change the distribution and is not supported, lest it be passed over in silence."""
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0}
    for name, value in neutral.items():
        if (given := getattr(options, name)) is not None and given != value:
            raise UsageError(f"{name} is {given}; this server supports {value} only")
    for name in ("logit_bias", "tools"):
        if getattr(options, name):
            raise UsageError(f"{name} is not supported here; leave it out")


def answer(
    model: ServedModel,
    prefix: str,
    kind: str,
    choices: list[dict[str, Any]],
    asked: Sequence[Request],
    done: Sequence[Completion],
    options: Options,
) -> tuple[str, str]:
    """The body of an answer, and its content type."""
    read = sum(len(request.tokens) for request in asked)
    written = sum(len(completion.tokens) for completion in done)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    details = {"cached_tokens": sum(completion.cached_tokens for completion in done)}
    body: dict[str, Any] = {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "choices": choices,
        "usage": usage | {"prompt_tokens_details": details},
    }
    if options.return_token_ids and len(done) == 1:
        body[OURS] = _statistics(done[0])
    text = json.dumps(body)
    if options.stream:
        return f"data: {text}\n\ndata: [DONE]\n\n", "text/event-stream"
    return text, "application/json"


def _statistics(completion: Completion) -> dict[str, Any]:
    columns = (
        completion.logprobs,
        completion.raw_logprobs,
        completion.entropies,
        completion.raw_entropies,
        completion.processed_logprobs,
        completion.kept_logmass,
    )
    return {"version": completion.version, "stop": completion.stop, "statistics": packed(columns)}

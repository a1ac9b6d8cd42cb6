"""Servers that take text only: what they say is tokenised once, here, and is for evaluation.

- ``Text``: ``/v1/completions`` with the context's text.
- ``Chat``: ``/v1/chat/completions`` with the context's messages.
- ``messages_of``: the messages that a context was made of.
"""

from __future__ import annotations

import re
from typing import Any

from ...errors import UsageError
from .base import Request, SamplingParams, StopReason
from .http_statistics import Answer

_MARKS = ("«first»", "«second»", "«third»", "«fourth»")


class Text:
    """OpenAI's ``/v1/completions`` with nothing but OpenAI's own options, and ``top_k`` where it is asked for.

    Such servers leave out the stop: the first stop string, or the first stop token, is put back.
    """

    path = "/v1/completions"

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def body(self, request: Request, params: SamplingParams, max_tokens: int, k: int) -> dict[str, Any]:
        return {"prompt": self._text(request), **self._options(request, params, max_tokens)}

    def read(self, answer: Any, request: Request, params: SamplingParams) -> Answer:
        (choice,) = answer["choices"]
        return self._answer(choice["text"], choice["finish_reason"], request.max_tokens, params)

    def _options(self, request: Request, params: SamplingParams, max_tokens: int) -> dict[str, Any]:
        ends = [str(self._tokenizer.decode([token])) for token in params.stop_token_ids]
        options: dict[str, Any] = {
            "model": self._model,
            "max_tokens": max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": request.seed % 2**63,
            "stop": list(dict.fromkeys([*params.stop_strings, *ends]))[:4],  # OpenAI takes four
        }
        return options | ({"top_k": params.top_k} if params.top_k else {})

    def _text(self, request: Request) -> str:
        text = str(self._tokenizer.decode(request.tokens.tolist()))
        begin = self._tokenizer.bos_token
        if begin and text.startswith(begin) and self._tokenizer.encode("a")[:1] == [self._tokenizer.bos_token_id]:
            text = text.removeprefix(begin)  # the server's tokenizer puts it there
        return text

    def _answer(self, text: str, finish: str, max_tokens: int, params: SamplingParams) -> Answer:
        stop = StopReason.LENGTH if finish == "length" else StopReason.STOP
        tokens: list[int] = []
        if stop is StopReason.STOP and params.stop_strings and not any(end in text for end in params.stop_strings):
            text += params.stop_strings[0]
        if text:
            tokens = list(self._tokenizer.encode(text, add_special_tokens=False))
        if stop is StopReason.STOP and not params.stop_strings and params.stop_token_ids:
            tokens = [*tokens[: max_tokens - 1], params.stop_token_ids[0]]
        return Answer(tokens[:max_tokens], stop)


class Chat(Text):
    """OpenAI's ``/v1/chat/completions``."""

    path = "/v1/chat/completions"

    def body(self, request: Request, params: SamplingParams, max_tokens: int, k: int) -> dict[str, Any]:
        messages = messages_of(self._tokenizer, str(self._tokenizer.decode(request.tokens.tolist())))
        return {"messages": messages, **self._options(request, params, max_tokens)}

    def read(self, answer: Any, request: Request, params: SamplingParams) -> Answer:
        (choice,) = answer["choices"]
        text = choice["message"].get("content") or ""
        return self._answer(text, choice["finish_reason"], request.max_tokens, params)


def messages_of(tokenizer: Any, text: str) -> list[dict[str, str]]:
    """Split a rendered conversation at what the tokenizer's chat template puts between messages.

    A text that is no such conversation is one message of the user.
    """
    whole = [{"role": "user", "content": text}]
    if not getattr(tokenizer, "chat_template", None):
        return whole
    roles = ("system", "user", "assistant", "user")
    marked = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        head, *between, tail = re.split("|".join(_MARKS), rendered)
    except Exception as error:  # a template is a program: it may raise anything, such as of the system's role
        raise UsageError(f"the tokenizer's chat template cannot be used: {error}") from error
    if len(between) != 3 or not all(between) or not tail or not text.startswith(head) or not text.endswith(tail):
        return whole
    after_system, after_user, after_assistant = between
    body = text[len(head) : len(text) - len(tail)]
    system, cut, rest = body.partition(after_system)
    if not cut:
        return whole
    messages = [{"role": "system", "content": system}]
    for turn in rest.split(after_assistant):
        user, cut, assistant = turn.partition(after_user)
        messages.append({"role": "user", "content": user})
        if cut:
            messages.append({"role": "assistant", "content": assistant})
    return messages

"""The format of pretrained models: turns of their own chat template.

- ``ChatFormat``: system prompt, observations as user turns, actions as assistant turns, thinking optional.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .messages import NO_INFO, History, Info, ParsedAction, admissible

SYSTEM = "You act in a text world to complete a task. Each user message is what you observe."
ANSWER = "Answer with one command and nothing else."
ANSWER_THINK = (
    "First reason step by step inside <think> </think>, "
    "then give one command inside <action> </action>, and nothing after it."
)

_MARKS = ("first-observation", "first-action", "second-observation")
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|action)>")


class ChatFormat:
    """Turns of the tokenizer's chat template, each tokenised once.

    A dummy conversation goes through the template when the object is made; what stands between its messages
    is what every later message is wrapped in. The text after the end token of an assistant turn belongs to
    the observation that follows. Special tokens inside observations are broken up, so that a world cannot
    close a turn. In worlds of ``free_text`` the whole message is the action, and its form is the world's business.

    Args:
        tokenizer: its chat template must end an assistant turn with a special token (ChatML, Llama 3, …).
        system: the system prompt; folded into the first user turn where the template has no system role. ``info``'s
            ``instructions`` follow it, where the world has some.
        think: ask for ``<think>…</think><action>…</action>``, as verl-agent does, not for the bare command.
        show_admissible: list the admissible commands after every observation.

    Raises:
        UsageError: there is no chat template, or it has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str = SYSTEM,
        think: bool = False,
        show_admissible: bool = False,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("the chat format needs a tokenizer with a chat template; use the format 'plain'")
        self._tokenizer = tokenizer
        self._think = think
        self._show_admissible = show_admissible
        self.stop_strings: tuple[str, ...] = ("</action>",) if think else ()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))

        self._system = system
        first, action, second = _MARKS
        opening = self._opening({})
        start = self._render(opening)
        whole = self._render([*opening, {"role": "assistant", "content": action}, {"role": "user", "content": second}])
        self._after = start.split(first)[1]
        between, self._suffix = whole.split(action)[1].split(second)
        end = self._special.search(between)
        if end is None or between[: end.start()].strip():
            raise UsageError("this chat template cannot be used: no special token ends an assistant turn")
        self._end_text, self._between = end[0], between[end.end() :]
        self._end: int = tokenizer.vocab[end[0]]
        others: set[int] = {tokenizer.eos_token_id} - {None, self._end}
        self.stop_token_ids: tuple[int, ...] = (self._end, *others)
        self._encode = lru_cache(maxsize=1 << 14)(self._tokenise)
        self._before: dict[str, str] = {}
        """What stands before the first observation, by instruction."""

    def prompt(self, observation: str, info: Info) -> list[int]:
        before = self._before.get(key := self._instruction(info))
        if before is None:
            before = self._before[key] = self._render(self._opening(info)).split(_MARKS[0])[0]
        return list(self._encode(before, self._user(observation, info), self._after))

    def observation(self, text: str, info: Info, *, closed: bool = True) -> list[int]:
        before = self._between if closed else self._end_text + self._between
        return list(self._encode(before, self._user(text, info), self._suffix))

    def window(self, history: History, observation: str, info: Info) -> list[int]:
        lines = [f"Your task is to: {info['goal']}"]
        if history:
            lines.append(f"The last {len(history)} turns:")
            for seen, command in history:
                lines += [f"Observation: {seen.strip()}", f"Action: {command}"]
        lines.append(f"Observation: {observation.strip()}")
        return self.prompt("\n".join(lines), info)

    def render_action(self, command: str, info: Info = NO_INFO) -> list[int]:
        text = f"<action>{command}</action>" if self._think and not info.get("free_text") else command
        return [*self._encode("", text, ""), self._end]

    def parse(self, token_ids: Sequence[int], info: Info = NO_INFO) -> ParsedAction:
        ids = [int(token) for token in token_ids]
        closed = bool(ids) and ids[-1] == self._end
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        if info.get("free_text"):
            return ParsedAction(text.strip(), bool(text.strip()), closed, text)
        lines = [line for line in _TAG.sub("\n", text).splitlines() if line.strip()]
        if not self._think:
            command = lines[0].strip() if lines else ""
            return ParsedAction(command, bool(command), closed, text)
        found = _ACTION.findall(text)
        command = " ".join(found[-1].split()) if found else ""
        valid = bool(command)
        return ParsedAction(command if valid else (lines[-1].strip() if lines else ""), valid, closed, text)

    def _instruction(self, info: Info) -> str:
        parts = [self._system]
        if world := info.get("instructions"):
            parts.append(self._broken_up(world))
        if not info.get("free_text"):
            parts.append(ANSWER_THINK if self._think else ANSWER)
        return "\n".join(parts)

    def _opening(self, info: Info) -> list[dict[str, str]]:
        """The messages up to the mark of the first observation; a template may have no system role."""
        instruction = self._instruction(info)
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": _MARKS[0]}]
        try:
            self._render(messages)
        except TemplateError:
            return [{"role": "user", "content": f"{instruction}\n\n{_MARKS[0]}"}]
        return messages

    def _user(self, text: str, info: Info) -> str:
        text = text.strip()
        if self._show_admissible:
            text += "\nAdmissible commands:\n" + "\n".join(admissible(info))
        return text

    def _tokenise(self, before: str, content: str, after: str) -> tuple[int, ...]:
        text = before + self._broken_up(content) + after
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _broken_up(self, text: str) -> str:
        """``text`` of the world's without special tokens."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _render(self, messages: list[dict[str, str]]) -> str:
        # Llama 3 writes today's date unless it is given one: the same run must give the same tokens tomorrow.
        options: dict[str, Any] = {"enable_thinking": self._think, "date_string": "26 Jul 2024"}
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return str(text)

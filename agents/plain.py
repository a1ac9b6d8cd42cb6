"""The format of small models: marker tokens around observations and commands.

- ``PlainFormat``: ``<bos> <obs> text <act> command <end> <obs> text <act> …`` in words or pieces of words.
- ``FILLER``: the words it leaves out of observations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .messages import NO_INFO, History, Info, ParsedAction, admissible
from .tokenizer import ACT, BOS, END, OBS, SPECIAL_TOKENS, is_subword

FILLER = frozenset({"a", "an", "the", "and", "you", "your", "see", "is", "are", ",", ".", ":", "\n"})
"""Words whose absence leaves an observation unambiguous; about half of ALFWorld's text."""


class PlainFormat:
    """Observations and commands between marker tokens, for the tokenizers that are made from a world's text.

    Args:
        tokenizer: of ``build_word_tokenizer`` or ``build_subword_tokenizer``; it must know the markers.
        remind: end every observation after the first with ``info["goal"]``, where the world says one: it brings the
            goal to the same place before every action, which small models learn from several times faster.
        compact: leave ``FILLER`` out of observations, where tokens are words. Node texts keep it.
        show_admissible: end every observation with the admissible commands, one per line, as verl-agent does.
        hidden: beginnings of commands that are not shown, such as ``("go to ",)``: long lists cost time.

    Raises:
        UsageError: the tokenizer lacks a marker.
    """

    stop_strings: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        remind: bool = True,
        compact: bool = True,
        show_admissible: bool = False,
        hidden: Sequence[str] = (),
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [word for word in SPECIAL_TOKENS if word not in vocabulary]
        if missing:
            raise UsageError(
                f"the plain format needs a tokenizer made from a world's text, and this one lacks {missing}; "
                "use the format 'chat' for a pretrained model"
            )
        subword = is_subword(tokenizer)
        self._bos, self._obs, self._act, self._end = (vocabulary[word] for word in (BOS, OBS, ACT, END))
        self._words = {index: word for word, index in vocabulary.items() if word not in (*SPECIAL_TOKENS, "\n")}
        self._remind = remind
        self._show_admissible = show_admissible
        self._hidden = tuple(hidden)
        self.stop_token_ids = (self._end,)
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True  # a world that says "<end>" must not end a message
        filler = FILLER if compact and not subword else ()
        self._encode = _cached_encoder(backend, frozenset(vocabulary[word] for word in filler if word in vocabulary))
        self._encode_command = _cached_encoder(backend, frozenset())
        self._newline = self._encode_command("\n")
        self._pieces = backend if subword else None

    def prompt(self, observation: str, info: Info) -> list[int]:
        return [self._bos, *self._observed(observation, info)]

    def observation(self, text: str, info: Info, *, closed: bool = True) -> list[int]:
        opening = () if closed else (self._end,)
        return [*opening, *self._observed(text, info, str(info.get("goal", "")) if self._remind else "")]

    def window(self, history: History, observation: str, info: Info) -> list[int]:
        tokens = [self._bos, *self._encode(info["goal"])]
        for seen, command in history:
            tokens += [self._obs, *self._encode(seen), self._act, *self.render_action(command)]
        return tokens + self._observed(observation, info)

    def render_action(self, command: str, info: Info = NO_INFO) -> list[int]:
        return [*self._encode_command(command), self._end]

    def parse(self, token_ids: Sequence[int], info: Info = NO_INFO) -> ParsedAction:
        ids = [int(token) for token in token_ids]
        closed = bool(ids) and ids[-1] == self._end
        body = ids[:-1] if closed else ids
        known = [token for token in body if token in self._words]
        if self._pieces is None:
            text = " ".join(self._words[token] for token in known)
        else:
            text = str(self._pieces.decode(known)).strip()
        valid = bool(text) and len(known) == len(body)
        return ParsedAction(text, valid, closed, text)

    def _observed(self, text: str, info: Info, goal: str = "") -> list[int]:
        return [self._obs, *self._encode(text), *self._encode(goal), *self._choices(info), self._act]

    def _choices(self, info: Info) -> Iterable[int]:
        if not self._show_admissible:
            return
        for command in admissible(info):
            if command.startswith(self._hidden):
                continue
            yield from self._newline
            yield from self._encode_command(command)


def _cached_encoder(backend: Tokenizer, dropped: frozenset[int]) -> Callable[[str], tuple[int, ...]]:
    @lru_cache(maxsize=1 << 16)
    def encode(text: str) -> tuple[int, ...]:
        ids = backend.encode(text, add_special_tokens=False).ids
        return tuple(token for token in ids if token not in dropped)

    return encode

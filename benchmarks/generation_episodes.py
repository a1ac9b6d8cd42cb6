"""What the generation benchmark plays: multi-turn episodes of fixed tokens, and who plays them.

- ``Episodes``: shapes of a batch of episodes. ``Script``: their tokens, and every context of every turn.
- ``Player``: answers one turn of all episodes. ``EnginePlayer``, ``TransformersPlayer``.
- ``record``: a script from an engine's own actions. ``play``: time and tokens of one player.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ..agents.engines import Engine, Request, SamplingParams

Tokens = NDArray[np.int32]


class Episodes(NamedTuple):
    """The shape of a batch of episodes, in tokens. Prompts are equal within a group, observations are all different.

    Observations have ``shortest`` to ``longest`` tokens, drawn uniformly by a generator of fixed seed.
    """

    batch: int
    groups: int
    turns: int
    prompt: int
    shortest: int
    longest: int
    action: int

    def prompts(self, vocabulary: int) -> list[Tokens]:
        """The first contexts."""
        rng = np.random.default_rng(0)
        starts = [rng.integers(8, vocabulary, self.prompt, dtype=np.int32) for _ in range(self.groups)]
        return [starts[row * self.groups // self.batch] for row in range(self.batch)]

    def observations(self, turn: int, vocabulary: int) -> list[Tokens]:
        """What follows the actions of ``turn``."""
        rng = np.random.default_rng(1 + turn)
        sizes = rng.integers(self.shortest, self.longest + 1, self.batch)
        return [rng.integers(8, vocabulary, size, dtype=np.int32) for size in sizes]

    @property
    def longest_context(self) -> int:
        """An upper bound of a history's tokens."""
        return self.prompt + self.turns * (self.longest + self.action)


class Script:
    """The tokens of all episodes: every player reads these histories, whatever it would have said itself.

    Args:
        episodes: the shapes.
        vocabulary: token ids are below it.
        actions: int32[turns, batch, action].
    """

    def __init__(self, episodes: Episodes, vocabulary: int, actions: Tokens) -> None:
        self.episodes = episodes
        self.vocabulary = vocabulary
        self.actions = actions

    @cached_property
    def new(self) -> list[list[Tokens]]:
        """What each turn adds before its actions, by turn and row."""
        later = [self.episodes.observations(turn, self.vocabulary) for turn in range(self.episodes.turns - 1)]
        return [self.episodes.prompts(self.vocabulary), *later]

    @cached_property
    def contexts(self) -> list[list[Tokens]]:
        """What is read before each turn's actions, by turn and row."""
        contexts = [self.new[0]]
        for turn, added in enumerate(self.new[1:]):
            parts = zip(contexts[-1], self.actions[turn], added, strict=True)
            contexts.append([np.concatenate(part) for part in parts])
        return contexts


class Player(Protocol):
    """Plays from nothing known: ``begin`` forgets what earlier episodes left behind."""

    def begin(self, script: Script) -> None: ...

    def act(self, turn: int) -> Tokens:
        """Greedy actions of a turn, int32[batch, action]; called for turns 0, 1, 2, …"""
        ...


class EnginePlayer:
    """Any engine of this package; it reads only what is new."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def begin(self, script: Script) -> None:
        self.engine.release()
        self._script = script

    def act(self, turn: int) -> Tokens:
        return greedy(self.engine, self._script.contexts[turn], self._script.episodes.action)


def greedy(engine: Engine, contexts: Sequence[Tokens], count: int) -> Tokens:
    """The most probable next tokens, int32[n, count]."""
    requests = [Request(context, seed=i, max_tokens=count) for i, context in enumerate(contexts)]
    return np.stack([c.tokens for c in engine.generate(requests, SamplingParams(temperature=0, entropy_top_k=20))])


class TransformersPlayer:
    """``generate`` of transformers, handed its own key-value cache of the turn before, or the whole history.

    Rows of different lengths are padded on the left: each turn's new tokens where the cache is kept, else the history.
    """

    def __init__(self, model: Any, *, keep_cache: bool) -> None:
        self._model = model
        self._keep = keep_cache

    def begin(self, script: Script) -> None:
        self._script = script
        self._cache = DynamicCache()
        self._ids = self._mask = torch.zeros(script.episodes.batch, 0, dtype=torch.long)

    def act(self, turn: int) -> Tokens:
        length = self._script.episodes.action
        options: dict[str, Any] = {}
        if self._keep:
            ids, mask = padded(self._script.new[turn])
            self._ids, self._mask = torch.cat((self._ids, ids), 1), torch.cat((self._mask, mask), 1)
            options["past_key_values"] = self._cache
        else:
            self._ids, self._mask = padded(self._script.contexts[turn])
        said = Prompter(torch.from_numpy(self._script.actions[turn]).long())
        out = self._model.generate(
            self._ids,
            attention_mask=self._mask,
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([said]),
            **options,
        )
        self._ids = out
        self._mask = torch.cat((self._mask, torch.ones(len(out), length, dtype=torch.long)), 1)
        return torch.stack(said.own, 1).numpy().astype(np.int32)


class Prompter(LogitsProcessor):
    """Makes ``generate`` say the script's actions, so that its cache holds them, and keeps what it would have said."""

    def __init__(self, actions: Tensor) -> None:
        self._actions = actions
        self.own: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self._actions[:, len(self.own), None]
        self.own.append(scores.argmax(-1))
        return scores.scatter(1, wanted, torch.inf)


def padded(rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Rows padded on the left with 0, and 1 where a token is: two int64[n, longest]."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(width) >= width - lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def record(engine: Engine, episodes: Episodes, vocabulary: int) -> Script:
    """Let the engine play by itself; its greedy actions become the script."""
    engine.release()
    contexts = episodes.prompts(vocabulary)
    actions = []
    for turn in range(episodes.turns):
        actions.append(greedy(engine, contexts, episodes.action))
        parts = zip(contexts, actions[-1], episodes.observations(turn, vocabulary), strict=True)
        contexts = [np.concatenate(part) for part in parts]
    return Script(episodes, vocabulary, np.stack(actions))


class Played(NamedTuple):
    """Seconds spent acting, and the share of tokens that are the script's."""

    seconds: float
    agreement: float


def play(player: Player, script: Script, clock: Callable[[], float] = time.perf_counter) -> Played:
    """Play all turns."""
    script.contexts  # noqa: B018  made outside the measured time
    player.begin(script)
    seconds, equal = 0.0, 0.0
    for turn in range(script.episodes.turns):
        started = clock()
        actions = player.act(turn)
        seconds += clock() - started
        equal += float((actions == script.actions[turn]).mean())
    return Played(seconds, equal / script.episodes.turns)

"""TextWorld's own package, kept from leaving traces in this process.

- ``package``: a context in which ``textworld`` may be used; one thread at a time.
- ``phrases``: the words of its grammars.
- ``make_game``: a game of a recipe; equal recipes and seeds make equal games in any process.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...errors import EnvironmentFailedError
from .challenges import Recipe

ATTEMPTS = 12
"""Seeds that are tried before a recipe is given up."""
_lock = threading.RLock()


@contextlib.contextmanager
def package() -> Iterator[Any]:
    """Yield the module ``textworld``; the global generators are as before when the context ends.

    Importing it and making games draws from NumPy's global generator, and one challenge seeds TextWorld's own.
    """
    with _lock:
        ours, numbers = random.getstate(), np.random.get_state()
        own = None
        try:
            textworld = _module()
            own = textworld.g_rng._seed
            yield textworld
        finally:
            random.setstate(ours)
            np.random.set_state(numbers)
            if own is not None:
                textworld.g_rng.set_seed(own)


@functools.cache
def _module() -> Any:
    """Import TextWorld, and have it read its files in sorted order and from its own folder."""
    import textworld
    from textworld.generator import data, text_grammar

    ordered = SimpleNamespace(glob=lambda pattern: sorted(glob.glob(pattern)), escape=glob.escape)
    data.glob = text_grammar.glob = ordered
    # Where the working directory has a folder textworld_data, the import has read that.
    data.KB = _knowledge(None, data.LOGIC_DATA_PATH, data.TEXT_GRAMMARS_PATH)
    return textworld


@functools.cache
def _knowledge(folder: str | None, logic: str | None = None, grammar: str | None = None) -> Any:
    """Return a knowledge base, which takes 0.2 s to read."""
    from textworld.generator.data import KnowledgeBase

    return _load_knowledge(KnowledgeBase, folder, logic, grammar)


def _load_knowledge(cls: Any, folder: str | None, logic: str | None, grammar: str | None) -> Any:
    from textworld.logic import GameLogic

    if folder is not None:
        logic, grammar = os.path.join(folder, "logic"), os.path.join(folder, "text_grammars")
    assert logic is not None and grammar is not None
    paths = sorted(glob.glob(os.path.join(glob.escape(logic), "*.twl")))
    base = cls(GameLogic.load(paths), grammar)
    base.logic_path = logic
    return base


def make_game(recipe: Recipe, seed: int) -> Any:
    """Return a ``textworld.Game``.

    Raises:
        EnvironmentFailedError: the generator found no such game.
    """
    with package(), _quicker():
        problem: Exception | None = None
        for attempt in range(ATTEMPTS):
            # Some seeds have no game: no quest of the length fits into the map, or the recipe lacks a food.
            number = seed if attempt == 0 else (seed * 2654435761 + attempt) % 2**32
            try:
                return _make(recipe, number)
            except Exception as error:  # the generator raises everything from KeyError to NameError
                problem = error
        text = " ".join(str(problem).split())
        raise EnvironmentFailedError(
            f"TextWorld made no {recipe.challenge} game with {dict(recipe.options)} in {ATTEMPTS} attempts from seed "
            f"{seed}; the last one ended with {type(problem).__name__}: {text[:200]}"
        )


def phrases() -> tuple[str, ...]:
    """Return the words of TextWorld's grammars, as texts without their marks."""
    with package():
        from textworld.generator import data

        texts = [Path(path).read_text() for path in sorted(glob.glob(glob.escape(data.TEXT_GRAMMARS_PATH) + "/house*"))]
    lines = [line.partition(":")[2] for text in texts for line in text.splitlines() if not line.startswith("#")]
    parts = [part for line in lines for part in re.split(r"[;|]|<->|#[^#]*#|\([^)]*\)|\[[^\]]*\]", line)]
    return tuple(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip()))


def _make(recipe: Recipe, seed: int) -> Any:
    import textworld

    textworld.g_rng.set_seed(seed)
    options = textworld.GameOptions()
    options.seeds = seed
    values = dict(recipe.options)
    challenge = recipe.challenge
    if challenge == "custom":
        from textworld.generator import data, make_game

        options.kb = _knowledge(None, data.LOGIC_DATA_PATH, data.TEXT_GRAMMARS_PATH)
        options.nb_rooms = values["rooms"]
        options.nb_objects = values["objects"]
        options.nb_parallel_quests = values["quests"]
        options.quest_length = values["quest_length"]
        options.quest_breadth = values["quest_breadth"]
        options.grammar.include_adj = values["adjectives"]
        options.grammar.only_last_action = values["brief_objective"]
        options.grammar.blend_instructions = values["blended_objective"]
        return make_game(options)
    if challenge == "cooking":
        values.pop("foods")
        settings: dict[str, Any] = {**values, "recipe_seed": 0, "split": recipe.split or None}
    elif challenge == "simple":
        settings = {**values, "test": recipe.split == "test"}
    else:
        settings = values
    return _challenge(challenge)(settings, options)


def _challenge(name: str) -> Callable[[Any, Any], Any]:
    make: Callable[[Any, Any], Any] = importlib.import_module(f"textworld.challenges.tw_{name}.{name}").make
    return make


@contextlib.contextmanager
def _quicker() -> Iterator[None]:
    """Make two steps of the generator quick; its games stay the same.

    It reads the rules anew for each game, and has the challenges' walkthroughs played in a compiled game, where its own
    engine of the rules gives the same actions.
    """
    from textworld.generator.data import KnowledgeBase
    from textworld.generator.maker import GameMaker

    load, walk = KnowledgeBase.__dict__["load"], GameMaker.set_walkthrough

    def cached(target_dir: str | None = None, logic_path: str | None = None, grammar_path: str | None = None) -> Any:
        if target_dir is None and (logic_path is None or grammar_path is None):
            return load.__func__(KnowledgeBase, target_dir, logic_path, grammar_path)
        return _knowledge(target_dir, logic_path, grammar_path)

    KnowledgeBase.load = staticmethod(cached)
    GameMaker.set_walkthrough = _set_walkthrough
    try:
        yield
    finally:
        KnowledgeBase.load = load
        GameMaker.set_walkthrough = walk


def _set_walkthrough(maker: Any, commands: list[str]) -> None:
    """Do as ``GameMaker.set_walkthrough``, without compiling the game."""
    from textworld.generator.game import GameProgression
    from textworld.generator.inform7 import Inform7Game

    game = maker.build()
    inform = Inform7Game(game)
    progress = GameProgression(game)
    events = {event: event.copy() for quest in maker.quests for event in quest.win_events}
    parts = [part for quest in progress.quest_progressions for part in quest.win_events]
    actions: list[Any] = []
    last = None
    for number, command in enumerate(commands):
        before = [part.triggered for part in parts]
        valid = sorted(progress.valid_actions, key=lambda action: len(action.preconditions), reverse=True)
        named = dict(reversed(list(zip(inform.gen_commands_from_actions(valid), valid, strict=True))))
        if command in named:  # TextWorld notes the action before once more where a command does nothing
            last = named[command]
            progress.update(last)
        actions.append(last)
        for was, part in zip(before, parts, strict=True):
            if not was and part.triggered:
                events[part.event].actions = list(actions)
                events[part.event].commands = commands[: number + 1]
    for event, done in events.items():
        event.actions = done.actions
        event.commands = done.commands

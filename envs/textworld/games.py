"""Where TextWorld's games come from.

- ``GeneratedGames``: made by TextWorld's generator, one for each seed.
- ``FileGames``: the user's own ``.json`` and ``.z8`` files.
- ``Loaded``: a game on the engine that plays it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import UsageError, nearest
from .challenges import Recipe
from .expert import Expert
from .native import NativeGame
from .storing import folder, load_story, save_story
from .story import Story, UnsupportedGameError
from .upstream import make_game, package

SPLITS = ("train", "valid", "test")
DEFAULT_GAMES = {"train": 10_000, "valid": 200, "test": 200}
MOST_GAMES = 1_000_000
"""Of a split."""
MOST_GAME_SEED = 428
"""So that seeds stay below 2**32."""
_KEPT = 128
"""Games that stay loaded in a process."""
_START = 256
"""Bytes in which a saved game names its first fields."""
_SUFFIXES = (".json", *(f".z{version}" for version in range(1, 9)))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A game on the engine that plays it: ``game`` in Python, or else the compiled file at ``path``."""

    digest: str
    game: NativeGame | None
    expert: Expert | None
    path: Path | None


class Games(Protocol):
    """A source of games."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it holds, the training one first."""
        ...

    def tasks(self, split: str) -> Iterable[str]:
        """Return the ids of a split."""
        ...

    def load(self, split: str, task: str, engine: str) -> Loaded:
        """Return one game on ``"native"``, if that can play it, or on ``"inform"``."""
        ...


class _Recent:
    """Games loaded last, shared by every environment of the process."""

    def __init__(self) -> None:
        self._games: OrderedDict[tuple[object, ...], Loaded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], load: Callable[[], Loaded]) -> Loaded:
        with self._lock:
            if key in self._games:
                self._games.move_to_end(key)
                return self._games[key]
        loaded = load()
        with self._lock:
            self._games[key] = loaded
            while len(self._games) > _KEPT:
                self._games.popitem(last=False)
        return loaded


_recent = _Recent()


class GeneratedGames:
    """Games of one recipe: task ``seed-N`` is what TextWorld's generator makes from seed N of the split's own range."""

    splits = SPLITS

    def __init__(self, recipe: Recipe, num_games: Mapping[str, int] | None, game_seed: int) -> None:
        """Check the numbers; a split that ``num_games`` leaves out keeps its default."""
        if not 0 <= game_seed <= MOST_GAME_SEED:
            raise UsageError(f"game_seed must be from 0 to {MOST_GAME_SEED}, got {game_seed}")
        for split, number in (num_games or {}).items():
            if split not in SPLITS:
                raise UsageError(f"num_games names an unknown split {split!r}{nearest(split, SPLITS)}")
            if not 1 <= number <= MOST_GAMES:
                raise UsageError(f"num_games[{split!r}] must be from 1 to {MOST_GAMES}, got {number}")
        self._recipe = recipe
        self._numbers = {**DEFAULT_GAMES, **(num_games or {})}
        self._start = game_seed * 10 * MOST_GAMES

    def tasks(self, split: str) -> Iterable[str]:
        """Return the ids of a split."""
        first = SPLITS.index(split) * MOST_GAMES
        return (f"seed-{number:07}" for number in range(first, first + self._numbers[split]))

    def load(self, split: str, task: str, engine: str) -> Loaded:
        """Return one game, made now or read from the cache."""
        recipe = self._recipe
        if recipe.challenge == "cooking":
            recipe = dataclasses.replace(recipe, split=split if recipe["foods"] == "split" else "")
        elif recipe.challenge == "simple":
            recipe = dataclasses.replace(recipe, split="test" if split == "test" else "train")
        seed = self._start + int(task.removeprefix("seed-"))
        return _recent.get((recipe, seed, engine), lambda: _generated(recipe, seed, engine))


def _generated(recipe: Recipe, seed: int, engine: str) -> Loaded:
    path = folder(recipe) / f"{seed}.story"
    if engine == "native":
        story = load_story(path)
        if story is None:
            story = _compiled(make_game(recipe, seed))
            save_story(path, story)
        return _native(story)
    compiled = path.with_suffix(".z8")
    if not (compiled.is_file() and compiled.with_suffix(".json").is_file()):
        from .inform import compile_game

        compile_game(make_game(recipe, seed), compiled)
    return Loaded(_file_digest(compiled.with_suffix(".json")), None, None, compiled)


def _compiled(game: Any) -> Story:
    from .compiling import compile_story

    with package():
        story = compile_story(game)
    return dataclasses.replace(story, walkthrough=_winning(story))


def _winning(story: Story) -> tuple[str, ...]:
    """Return the walkthrough without the commands that do nothing where they come, empty if it does not win."""
    game = NativeGame(story)
    state, played = game.root, []
    for command in story.walkthrough:
        after = game.step(state, command)
        if after is not None:
            state = after[0]
            played.append(command)
    return tuple(played) if state.won else ()


def _native(story: Story) -> Loaded:
    game = NativeGame(story)
    return Loaded(story.digest, game, Expert(game), None)


class FileGames:
    """The user's own games: ids are their names without suffix."""

    def __init__(self, games: object) -> None:
        """Find the files.

        Args:
            games: a file, a folder, a list of both, or such for each split as ``{"train": ..., "valid": ...}``. A
                folder with folders called as splits has those; everything else is one split, ``"train"``.

        Raises:
            UsageError: no such file, or none that can be played.
        """
        given: Mapping[str, object]
        if isinstance(games, Mapping):
            given = games
            for split in given:
                if split not in SPLITS:
                    raise UsageError(f"games names an unknown split {split!r}{nearest(str(split), SPLITS)}")
        else:
            given = {"train": games}
            if isinstance(games, str | os.PathLike):
                inner = {split: Path(games) / split for split in SPLITS if (Path(games) / split).is_dir()}
                given = inner or given
        self._files = {split: _find(given[split]) for split in SPLITS if split in given}
        self.splits = tuple(self._files)
        if not self.splits:
            raise UsageError("games names no split: give at least one of train, valid and test its files")

    def tasks(self, split: str) -> Iterable[str]:
        """Return the ids of a split."""
        return self._files[split]

    def load(self, split: str, task: str, engine: str) -> Loaded:
        """Return one game."""
        path = self._files[split][task]
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        return _recent.get((path, changed, engine), lambda: _from_file(path, engine))


def _find(given: object) -> dict[str, Path]:
    """Return the files by task id, sorted."""
    found: dict[str, Path] = {}
    items = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(items, Sequence):
        raise UsageError(f"games must be a path, a list of paths, or one for each split, got {type(given).__name__}")
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise UsageError(f"games must be paths, got {item!r}")
        root = Path(item).expanduser().absolute()
        if root.is_dir():
            files = sorted(path for path in root.rglob("*") if _is_game(path))
            if not files:
                raise UsageError(f"{root} has no game: TextWorld plays .json and .z8 files{_glulx(root)}")
            names = {path: path.relative_to(root).with_suffix("").as_posix() for path in files}
        else:
            names = {_playable(root): root.stem}
        for path, name in names.items():
            other = found.get(name)
            if other is not None and other.with_suffix("") != path.with_suffix(""):
                raise UsageError(f"two games are called {name!r}: {other} and {path}; rename one")
            if other is None or path.suffix == ".json":
                found[name] = path
    if not found:
        raise UsageError("games names no file: name at least one .json or .z8 game")
    return dict(sorted(found.items()))


def _is_game(path: Path) -> bool:
    """Whether a file in a folder is a game; a folder may hold other ``.json`` files."""
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    if path.suffix != ".json":
        return True
    with path.open("rb") as file:
        return b'"world"' in file.read(_START)


def _playable(path: Path) -> Path:
    if path.suffix == ".ulx":
        raise UsageError(
            f"{path} is a Glulx game, which TextWorld no longer plays since version 1.7; compile it as .z8, or name "
            "the .json file that TextWorld wrote beside it"
        )
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path} is no game file: TextWorld plays .json (its own games) and .z1 to .z8")
    if not path.is_file():
        raise UsageError(f"there is no game at {path}")
    return path


def _glulx(root: Path) -> str:
    return ", and no longer .ulx" if any(root.rglob("*.ulx")) else ""


def _from_file(path: Path, engine: str) -> Loaded:
    source = path.with_suffix(".json")
    if not source.is_file():
        return Loaded(_file_digest(path), None, None, path)
    with package() as textworld:
        try:
            game = textworld.Game.load(str(source))
        except FileNotFoundError as error:
            raise UsageError(f"there is no game at {source}") from error
        except Exception as error:  # whatever a file of another kind leads to
            raise UsageError(f"{source} is no game that TextWorld saved: {type(error).__name__}: {error}") from error
    if engine == "native":
        try:
            return _native(_compiled(game))
        except UnsupportedGameError:
            pass  # its rules or texts are the user's own
    from .compiling import digest

    key = digest(game)
    compiled = next((other for other in _beside(path) if other.is_file()), None)
    if compiled is None:
        from ..cache import cache_folder
        from .inform import compile_game

        compiled = cache_folder() / "textworld" / "own" / f"{key}.z8"
        if not compiled.is_file():
            compile_game(game, compiled)
    return Loaded(key, None, None, compiled)


def _beside(path: Path) -> Iterable[Path]:
    return (path.with_suffix(suffix) for suffix in _SUFFIXES if suffix != ".json")


@functools.lru_cache(maxsize=1 << 10)
def _hashed(path: Path, changed: int) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"there is no game at {path}")
    return _hashed(path, path.stat().st_mtime_ns)

"""What is compared: one TOML file that spans recipes × environments × seeds.

- ``Grid``: the schema of the file. ``load_grid``: read and check it. ``to_toml``: the resolved grid as text.
- ``Cell``: one run of the grid, with its folder and configuration; ``cells``, ``starts``: all of them.
- ``difference``: where two configurations differ. ``DECIDED``: options that the grid decides.

Nothing here imports torch, so that a wrong file is reported before anything is spent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from ...config import PretrainedModelConfig, RunConfig, Section, merged, read_toml, validated
from ...errors import UsageError, nearest

DECIDED = {
    "seed": "seeds",
    "run_dir": "--out",
    "algorithm": "[[recipe]] or [options]",
    "env.id": "[[environment]]",
    "env.eval_split": "[[environment]]",
    "eval.also": "[[environment]]",
}
"""Options of a run that are not for its tables, and where they belong."""


class RecipeEntry(Section):
    """One method: a recipe, a preset, and options of its own."""

    name: str
    """A recipe, or several joined by ``+``; ``agentropy recipes`` lists them."""
    label: str | None = None
    """Name in the report; ``name (preset)`` when unset."""
    preset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the recipe, on top of the grid's own ``options``."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Options of the run that this recipe alone needs, such as ``train.critic_lr``."""

    @property
    def title(self) -> str:
        return self.label or (f"{self.name} ({self.preset})" if self.preset else self.name)


class EnvironmentEntry(Section):
    """One environment, and the splits of its two panels."""

    id: str
    """Gymnasium id, or the name alone for environments of this package."""
    label: str | None = None
    in_distribution: str | None = None
    """Split whose tasks resemble the training tasks."""
    out_of_distribution: str | None = None
    """Split whose tasks do not."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Options of the run for this environment, such as ``agent.max_action_tokens``."""

    @property
    def title(self) -> str:
        return self.label or self.id

    @model_validator(mode="after")
    def _some_panel(self) -> Self:
        if not self.panels:
            raise ValueError(f"'{self.title}' names no split to evaluate on; expected out_of_distribution or the other")
        if self.in_distribution == self.out_of_distribution:
            raise ValueError(f"'{self.title}' names '{self.in_distribution}' twice; expected two splits, or one")
        return self

    @property
    def panels(self) -> dict[str, str]:
        """Split of each panel, by what kind of panel it is."""
        found = {"in distribution": self.in_distribution, "out of distribution": self.out_of_distribution}
        return {kind: split for kind, split in found.items() if split is not None}


class WarmStart(Section):
    """Supervised training that all cells of an environment begin from."""

    per: Literal["environment", "seed", "none"] = "environment"
    """One for all seeds; one for each seed; or none, for models that need no warm start."""
    seed: int = Field(0, ge=0)
    """Of the one start of an environment."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Options of the run that makes it, such as ``sft.tasks``."""


class Resources(Section):
    """What one cell takes, and how many run side by side."""

    jobs: int = Field(1, ge=1)
    """Cells at once; with Ray, which counts processors itself, no more than so many."""
    cpus: float = Field(1, gt=0)
    """Processors that Ray reserves for a cell."""
    gpus: float = Field(0, ge=0)
    """GPUs that Ray reserves for a cell."""


class Grid(Section):
    """The whole comparison."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    seeds: list[int] = Field(min_length=1)
    """Two runs of one seed share their start and the order of their tasks."""
    baseline: str
    """Title of the recipe that all others are held against."""
    last: int = Field(3, ge=1)
    """The final score of a run is the mean of its last so many evaluations, never their maximum."""
    target: float | None = Field(None, gt=0, lt=1)
    """Success whose cost in environment steps is reported; when unset, a tenth above that of the start."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of every recipe, so that methods share what none of them is about."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Options of ``agentropy train`` that all cells share."""
    resources: Resources = Resources()
    warm_start: WarmStart = WarmStart()
    environment: list[EnvironmentEntry] = Field(min_length=1)
    recipe: list[RecipeEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One run: an ordinary run folder, and the configuration that fills it."""

    environment: EnvironmentEntry
    recipe: RecipeEntry | None
    """None for a start."""
    seed: int
    folder: Path
    config: RunConfig
    start: Cell | None = None
    """What it begins from; None for a start, and where there is none."""

    @property
    def title(self) -> str:
        name = "warm start" if self.recipe is None else self.recipe.title
        return f"{name}, {self.environment.title}, seed {self.seed}"

    @property
    def checkpoint(self) -> Path:
        """Of its last step."""
        return self.folder / "checkpoints" / f"step-{self.config.train.steps:06d}"

    @property
    def done(self) -> bool:
        """Whether its last step was evaluated and saved."""
        return (self.checkpoint / "state.json").is_file()


def load_grid(path: str | Path, overrides: Iterable[str] = ()) -> Grid:
    """Read ``path``, or the grid of that name that ships with the package.

    ``overrides`` are ``key=value`` of the file's own keys, with values in TOML.

    Raises:
        UsageError: an unreadable file, an unknown key (with the nearest valid one), entries that share a title or a
            folder, a baseline that is none of the recipes, or an option of a run that the grid itself decides.
    """
    shipped = Path(__file__).parents[1] / f"{path}.toml"
    grid = validated(Grid, read_toml(shipped if shipped.is_file() else path, overrides))
    titles = [entry.title for entry in grid.recipe]
    for kind, names in (("recipe", titles), ("environment", [entry.title for entry in grid.environment])):
        for name, count in Counter(names).items():
            if count > 1:
                raise UsageError(f"{count} entries of [[{kind}]] are called '{name}'; give each a label of its own")
        for name in names:
            if not _slug(name).strip("."):
                raise UsageError(f"[[{kind}]]: no folder can be called after '{name}'; give it a label with a-z or 0-9")
        for first, second in pairwise(sorted(names, key=_slug)):
            if _slug(first) == _slug(second):
                raise UsageError(f"[[{kind}]]: '{first}' and '{second}' would share a folder; change a label")
    if grid.baseline not in titles:
        raise UsageError(f"baseline: there is no recipe called '{grid.baseline}'{nearest(grid.baseline, titles)}")
    if len(set(grid.seeds)) < len(grid.seeds):
        raise UsageError(f"seeds: {grid.seeds} names a seed twice")
    tables = {"run": grid.run, "warm_start.run": grid.warm_start.run}
    tables |= {f"run of '{entry.title}'": entry.run for entry in grid.environment}
    tables |= {f"run of '{entry.title}'": entry.run for entry in grid.recipe}
    for where, table in tables.items():
        for key, instead in DECIDED.items():
            if any(f"{name}.".startswith(f"{key}.") for name in _flat(table)):
                raise UsageError(f"{where}: '{key}' is for the grid to decide; expected it in {instead}")
    return grid


def to_toml(grid: Grid) -> str:
    """The grid as text that ``load_grid`` reads back."""
    return tomli_w.dumps(grid.model_dump(mode="json", exclude_none=True))


def starts(grid: Grid, folder: Path) -> list[Cell]:
    """The runs of supervised training that ``cells`` begin from, each of them once.

    Raises:
        UsageError: an option of theirs is wrong.
    """
    if grid.warm_start.per == "none":
        return []
    seeds = grid.seeds if grid.warm_start.per == "seed" else [grid.warm_start.seed]
    return [_start(grid, folder, environment, seed) for environment in grid.environment for seed in seeds]


def cells(grid: Grid, folder: Path) -> list[Cell]:
    """Every run of the grid: all recipes of a seed before the next seed, so that a grid cut short is still balanced.

    Raises:
        UsageError: an option of a cell is wrong, or it would be evaluated otherwise than the others of its environment;
            the message names the cell.
    """
    found = [
        _cell(grid, folder, environment, recipe, seed)
        for seed in grid.seeds
        for environment in grid.environment
        for recipe in grid.recipe
    ]
    first: dict[str, Cell] = {}
    for cell in found:
        other = first.setdefault(cell.environment.title, cell)
        unlike = difference(_judged(cell.config), _judged(other.config))
        if unlike is not None:
            key, ours, theirs = unlike
            raise UsageError(
                f"{cell.title}: {key} is {ours}, and {theirs} for {other.title}; "
                "expected runs of an environment to be evaluated alike"
            )
        if not cell.config.train.steps:
            raise UsageError(f"{cell.title}: train.steps is 0, so there is nothing to compare; expected 1 or more")
    return found


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option, as ``section.key``, in which two dumped configurations differ, with both values; None where
    there is none."""
    left, right = _flat(ours), _flat(theirs)
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            return key, left.get(key), right.get(key)
    return None


def _start(grid: Grid, folder: Path, environment: EnvironmentEntry, seed: int) -> Cell:
    where = folder / "start" / _slug(environment.title) / f"seed-{seed}"
    forced = {"train": {"steps": 0}, "eval": {"before": True}}
    config = _config(grid, environment, f"warm start, {environment.title}", seed, where, grid.warm_start.run, forced)
    return Cell(environment, None, seed, where, config)


def _cell(grid: Grid, folder: Path, environment: EnvironmentEntry, recipe: RecipeEntry, seed: int) -> Cell:
    where = folder / "cells" / _slug(environment.title) / _slug(recipe.title) / f"seed-{seed}"
    algorithm = {"name": recipe.name, "overrides": grid.options | recipe.options}
    if recipe.preset is not None:
        algorithm["preset"] = recipe.preset
    forced: dict[str, Any] = {"algorithm": algorithm}
    start = None
    if grid.warm_start.per != "none":
        start = _start(grid, folder, environment, seed if grid.warm_start.per == "seed" else grid.warm_start.seed)
        pretrained = isinstance(start.config.model, PretrainedModelConfig)
        model = {"path": str(start.checkpoint)} if pretrained else {"start": str(start.folder)}
        # The start was evaluated once, for all.
        forced |= {"model": model, "sft": {"tasks": 0}, "eval": {"before": False}}
    title = f"{recipe.title}, {environment.title}, seed {seed}"
    config = _config(grid, environment, title, seed, where, recipe.run, forced)
    return Cell(environment, recipe, seed, where, config, start)


def _config(
    grid: Grid,
    environment: EnvironmentEntry,
    title: str,
    seed: int,
    folder: Path,
    own: Mapping[str, Any],
    forced: Mapping[str, Any],
) -> RunConfig:
    """Later ones win: the grid's run, the environment's, the entry's own, and what makes it a cell."""
    *others, shown = environment.panels.values()
    identity: dict[str, Any] = {
        "seed": seed,
        "run_dir": str(folder),
        "env": {"id": environment.id, "eval_split": shown},
        "eval": {"also": others},
    }
    data: dict[str, Any] = {}
    for layer in (grid.run, environment.run, own, identity, forced):
        data = merged(data, layer)
    try:
        return validated(RunConfig, data)
    except UsageError as error:
        raise UsageError(f"{title}: {error}") from error


def _judged(config: RunConfig) -> dict[str, Any]:
    """What decides how often, on what and how a run is evaluated."""
    return {
        "train": {"steps": config.train.steps},
        "env": config.env.model_dump(include={"id", "kwargs", "wrappers", "eval_split"}),
        "eval": config.eval.model_dump(),
    }


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Every value of ``table``, by ``section.key``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def _slug(title: str) -> str:
    """The title as the name of a folder.

    >>> _slug("EPO (paper)")
    'epo-paper'
    """
    return re.sub(r"[^a-z0-9.+]+", "-", title.lower()).strip("-")

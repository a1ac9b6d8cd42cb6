"""Every option of a run, as one typed schema.

- ``RunConfig``: the whole configuration; ``EnvConfig``, ``ModelConfig``, … are its sections.
- ``WORLD_DEFAULTS``, ``SMALL_DEFAULTS``, ``PRETRAINED_DEFAULTS``: what of it depends on the world, and on the model.
- ``load_config``: TOML file, then ``section.key=value`` overrides, then defaults; unknown keys are errors.
  ``read_toml`` and ``validated`` are its halves, for other files of this form.
- ``to_toml``: the resolved configuration as text that ``load_config`` reads back.

No module here imports torch, so a wrong key is reported before anything expensive starts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UsageError, nearest
from .registry import ENV_IDS

ALFWORLD = "agentropy/ALFWorld-v0"
WORLD_DEFAULTS: dict[str, dict[str, Any]] = {
    ALFWORLD: {
        "env": {
            "train_kwargs": {"max_turns": 30, "invalid_penalty": 0.05, "progress_reward": 2.0, "reward_scale": 0.5}
        },
        "sft": {"expert": {"expert": "explorer"}},
    },
    "agentropy/ScienceWorld-v0": {
        "env": {"eval_split": "dev"},
        "agent": {"max_action_tokens": 24},
        "sft": {"tasks": 300},
    },
    "agentropy/TextWorld-v0": {
        "env": {"eval_split": "test"},
        "agent": {"max_action_tokens": 24},
        "sft": {"tasks": 400, "noise": 0.1},
    },
    "agentropy/Search-v0": {
        "env": {"eval_split": "test"},
        "agent": {"max_action_tokens": 64},
    },
    "agentropy/Tools-v0": {
        "env": {"eval_split": "test"},
        "agent": {"max_action_tokens": 256},
    },
    "agentropy/BFCL-v0": {
        "env": {"eval_split": "test"},
        "agent": {"max_action_tokens": 256},
    },
}
"""Defaults of a run that depend on its world; what a user says of an option takes their place."""
SMALL_DEFAULTS: dict[str, dict[str, Any]] = {
    "agentropy/Search-v0": {"env": {"kwargs": {"k": 1}}},
    "agentropy/BFCL-v0": {
        "env": {"kwargs": {"documents": "names", "categories": ["base", "miss_func", "miss_param"]}},
    },
}
"""The same for small models alone: what they can read is short."""
PRETRAINED_DEFAULTS: dict[str, dict[str, Any]] = {
    "agentropy/ScienceWorld-v0": {"agent": {"max_context_tokens": 8192}},
    "agentropy/TextWorld-v0": {"agent": {"max_context_tokens": 8192}},
    "agentropy/Search-v0": {"agent": {"max_context_tokens": 8192, "max_action_tokens": 512}},
    "agentropy/Tools-v0": {"agent": {"max_context_tokens": 8192, "max_action_tokens": 1024}},
    "agentropy/BFCL-v0": {"agent": {"max_context_tokens": 24576, "max_action_tokens": 1024}},
}
"""The same for pretrained ones."""
ELSEWHERE: dict[str, Any] = {"sft": {"noise": 0.0, "slips": 0.0}}
"""Below those of every world but ALFWorld: few experts find back to their path after a mistake."""

_BY_TURNS: dict[str, Any] = {"aggregation": "turn-mean", "turn_credit": 4.0, "turn_gamma": 0.5}
RUN_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("grpo", "epo", "arpo", "aepo", "empg"), _BY_TURNS),
    "gigpo": {"aggregation": "turn-mean"},
}
"""Options of recipes that a run sets unless its user sets any, or a preset. Every episode counts the same, and every
turn of one (with ``token-mean`` the long failures outweigh the short successes); and what a turn was paid is held
against that turn. Of composed recipes, those that all their parts have here."""


Schema = TypeVar("Schema", bound=BaseModel)


class Section(BaseModel):
    """A part of the configuration; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class EnvConfig(Section):
    id: str = ALFWORLD
    """Gymnasium id of the world; the name alone, such as ``scienceworld``, will do for those of this package."""
    kwargs: dict[str, Any] = {}
    """Arguments of the world's constructor besides ``split``, such as ``source`` and ``data``."""
    train_split: str = "train"
    eval_split: str = "valid_unseen"
    train_kwargs: dict[str, Any] = {}
    """Arguments of the world's constructor for training rollouts, on top of ``kwargs``. By default ALFWorld's episodes
    are cut after 30 turns, an invalid command costs 0.05, and what brings the goal nearer is paid: 2 in all, and 0.5
    for reaching it. Held-out episodes are judged by success alone."""
    wrappers: list[str | dict[str, Any]] = []
    """Wrappers of ``agentropy.envs.wrappers`` around the world, the innermost first: a name, or a table with the
    wrapper's ``name`` and options."""
    train_tasks: int | None = Field(None, ge=1)
    """Train on this many tasks of the split, evenly spaced over its sorted ids; all of them when unset."""
    workers: int | None = Field(None, ge=1)
    """Processes that step the worlds; the number of processors when unset."""


class SmallModelConfig(Section):
    """A Llama of a few million parameters from random weights, with a word-level tokenizer of the world's text."""

    type: Literal["small"] = "small"
    hidden: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    intermediate: int = Field(384, ge=8)
    max_positions: int = Field(2048, ge=64)
    vocabulary: int = Field(2048, ge=320)
    """Tokens of the subword vocabulary, for worlds that cannot list their words."""
    start: str | None = None
    """Run or checkpoint folder whose small model, of whatever size, the run begins with instead of random weights; with
    ``sft.tasks=0`` several runs share one warm start."""


class PretrainedModelConfig(Section):
    """Any causal language model of ``transformers``, by local path or hub name."""

    type: Literal["pretrained"] = "pretrained"
    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that are trained."""


ModelConfig = Annotated[SmallModelConfig | PretrainedModelConfig, Field(discriminator="type")]


class AgentConfig(Section):
    format: Literal["auto", "plain", "chat"] = "auto"
    """``plain`` for the small model's own markers, ``chat`` for the model's chat template."""
    format_options: dict[str, Any] = {}
    """Options of the format, such as ``show_admissible``."""
    context: Literal["full", "window"] = "full"
    """``full``: append-only history. ``window``: each turn is rendered anew from the last turns."""
    window: int = Field(2, ge=0)
    """Turns of history in ``window`` mode."""
    max_action_tokens: int = Field(16, ge=1)
    """Most tokens sampled in one turn."""
    max_context_tokens: int = Field(1536, ge=32)
    """An episode whose history would grow beyond this ends as truncated."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    entropy_top_k: int = Field(0, ge=0)
    """0 for exact entropies, else the lower estimate that servers such as vLLM give: −Σ p log p over the k most
    probable tokens and the sampled one."""


class EngineConfig(Section):
    """What generates tokens."""

    type: Literal["torch", "vllm", "http"] = "torch"
    """``torch``: built in, in this process. ``vllm``: in this process too, from the package of that name. ``http``: a
    server that speaks OpenAI's interface, named by ``options.url``."""
    dtype: Literal["model", "float32", "bfloat16"] = "model"
    """Type of the weights that sample; that of the weights that are trained by default."""
    workers: int | None = Field(None, ge=1)
    """Processes among which the built-in engine deals out a run's rollouts, sharing the weights; 1 is the trainer's
    own. When unset: half of ``threads`` for steps of at least 64 episodes of a model of at most 20 M parameters on the
    CPU, whose operations are too short to be shared by threads, else 1."""
    options: dict[str, Any] = {}
    """Further arguments of the engine's constructor, such as ``cache_tokens`` of the built-in one."""
    correction: Literal["auto", "none", "truncate", "mask"] = "auto"
    """What is done where the engine's probabilities differ from the learner's: importance weights, truncated (TIS) or
    masked (MIS) at ``cap``. ``auto``: truncated for engines whose probabilities are not exact, none for others."""
    cap: float = Field(2.0, gt=0)
    """Largest importance weight of a token."""


class SftConfig(Section):
    tasks: int = Field(1600, ge=0)
    """Training tasks that the expert plays; 0 switches the warm start off."""
    episodes_per_task: int = Field(1, ge=1)
    expert: dict[str, Any] = {}
    """Arguments of the world's constructor for expert play, on top of ``env.kwargs``. By default ALFWorld's expert is
    the explorer."""
    noise: float = Field(0.15, ge=0, lt=1)
    """Share of turns in which a random admissible command is played instead; those are never imitated."""
    slips: float = Field(0.15, ge=0, lt=1)
    """Share of turns in which a command that is not admissible is played; never imitated either."""
    epochs: int = Field(2, ge=1)
    batch_episodes: int = Field(8, ge=1)
    lr: float = Field(3e-3, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the updates over which the learning rate rises."""


class AlgorithmConfig(Section):
    name: str = "epo"
    """A recipe; ``agentropy recipes`` lists them."""
    preset: str | None = None
    """A named set of the recipe's defaults, such as ``paper``."""
    overrides: dict[str, Any] = {}
    """Values of the recipe's own options; when unset and without a preset, those of ``RUN_OVERRIDES``."""

    @model_validator(mode="before")
    @classmethod
    def _overrides_of_the_recipe(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "overrides" in data or data.get("preset"):
            return data
        parts = [RUN_OVERRIDES.get(part, {}) for part in str(data.get("name", "epo")).split("+")]
        shared = {key: value for key, value in parts[0].items() if all(part.get(key) == value for part in parts)}
        return {**data, "overrides": shared}


class TrainConfig(Section):
    steps: int = Field(34, ge=0)
    tasks_per_step: int = Field(16, ge=1)
    group_size: int = Field(8, ge=1)
    """Episodes of each task in a step; advantages compare the members of a group."""
    lr: float = Field(1e-3, gt=0)
    critic_lr: float | None = Field(None, gt=0)
    """Highest learning rate of the critic, for recipes that have one; ``lr`` when unset."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """At a constant rate the default run gains as much by half of its steps and loses it again by the end."""
    warmup_steps: int = Field(8, ge=0)
    """Optimiser steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1)
    """Passes over a step's episodes."""
    minibatches: int = Field(4, ge=1)
    """Optimiser steps in a pass."""
    micro_batch_tokens: int = Field(4096, ge=64)
    """Tokens in one forward pass; changes memory and speed, never the result's mathematics."""
    unique_tokens: bool = True
    """Compute a prefix that episodes share once; the gradient is the same to rounding."""
    workers: int | None = Field(None, ge=1)
    """Threads that share an update, each with passes of its own. When unset: ``threads`` for models of at most 20 M
    parameters on the CPU, whose matrices are too small to be shared, else 1."""
    shuffle: Literal["auto", "rows", "groups"] = "auto"
    """What is dealt out to minibatches: episodes, or whole groups, so that branches meet their prefix. ``auto``: groups
    where rollouts fork, else episodes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products of the update; weights and optimiser state keep their own type."""
    checkpoint_every: int = Field(1, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    save_trajectories: bool = True
    oracle: bool = False
    """Predict each update's change of entropy to first order, and measure it. Costs about one and a half updates more,
    in time; in memory a copy of the weights and a gradient."""


class EvalConfig(Section):
    tasks: int | None = Field(None, ge=1)
    """Size of the fixed panel, evenly spaced over the sorted ids; the whole split when unset."""
    every: int = Field(0, ge=0)
    """Evaluate after every so many steps; 0 evaluates before the first and after the last step only."""
    before: bool = True
    """Evaluate before the first step. Off where runs share a start that is known already."""
    also: list[str] = []
    """Further splits to evaluate on, each on a panel of its own, such as one in distribution."""
    samples: int = Field(1, ge=1)
    """Episodes of each task in the last evaluation, for pass@k; success is that of the first."""
    temperature: float = Field(1.0, ge=0)
    """0 takes the most probable token."""
    batch: int = Field(200, ge=1)
    """Episodes played side by side."""
    seed: int = 0


class RunConfig(Section):
    """A whole run. ``agentropy train --dry-run`` prints it resolved."""

    seed: int = Field(0, ge=0)
    run_dir: str | None = None
    """Folder of the run; ``runs/<time>-<algorithm>-seed<seed>`` when unset."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    """Threads of torch on the CPU; the number of processors when unset."""
    env: EnvConfig = EnvConfig()
    model: ModelConfig = SmallModelConfig()
    agent: AgentConfig = AgentConfig()
    engine: EngineConfig = EngineConfig()
    sft: SftConfig = SftConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_world(cls, data: Any) -> Any:
        """Fill in what suits the world and the user has not said."""
        if not isinstance(data, dict):
            return data
        env = data.get("env") or {}
        if not isinstance(env, dict):
            return data
        world = _full_id(str(env.get("id", ALFWORLD)))
        below = merged({} if world == ALFWORLD else ELSEWHERE, WORLD_DEFAULTS.get(world, {}))
        model = data.get("model")
        model = model if isinstance(model, dict) else {}
        small = model.get("type", "pretrained" if "path" in model else "small") == "small"
        below = merged(below, (SMALL_DEFAULTS if small else PRETRAINED_DEFAULTS).get(world, {}))
        return merged(below, {**data, "env": {**env, "id": world}})

    @model_validator(mode="before")
    @classmethod
    def _default_model_type(cls, data: Any) -> Any:
        """``[model]`` without a type is pretrained when it names a path, else small."""
        if isinstance(data, dict):
            data = {k: v.model_dump(exclude_unset=True) if isinstance(v, Section) else v for k, v in data.items()}
        if isinstance(data, dict) and isinstance(model := data.get("model"), dict) and "type" not in model:
            data = data | {"model": {"type": "pretrained" if "path" in model else "small", **model}}
        return data


def _full_id(name: str) -> str:
    """The Gymnasium id of a world of this package that is named without its namespace and version, in any case."""
    short = {id.partition("/")[2].rpartition("-v")[0].lower(): id for id in ENV_IDS}
    return short.get(name.lower(), name)


# Tables that a user gives as a whole: their keys are not options of ours.
_WHOLE = frozenset({"kwargs", "train_kwargs", "expert", "format_options", "options", "overrides"})


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` with the keys of ``below`` that it lacks, in sections too."""
    result = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict) and key not in _WHOLE:
            result[key] = merged(below[key], above[key])
    return result


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read ``path`` (TOML), apply ``section.key=value`` overrides in order, and validate.

    Values of overrides are TOML (``3``, ``true``, ``[1, 2]``); a value that is not TOML is taken as text.

    Raises:
        UsageError: unreadable file, malformed override, unknown key (with the nearest valid one), or a bad value.
    """
    return validated(RunConfig, read_toml(path, overrides))


def read_toml(path: str | Path | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The tables of ``path`` with ``section.key=value`` overrides on top.

    Raises:
        UsageError: unreadable file, or malformed override.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the configuration '{path}': {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"'{path}' is not valid TOML: {error}") from error
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"'{text}' is not an override; expected section.key=value, such as train.steps=50")
        _assign(data, key.strip().split("."), _toml_value(value.strip()))
    return data


def validated(schema: type[Schema], data: Mapping[str, Any]) -> Schema:
    """``data`` as ``schema``.

    Raises:
        UsageError: unknown key (with the nearest valid one), or a bad value.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise UsageError(_explain(error, schema)) from error


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for index, key in enumerate(keys[:-1]):
        child = data.setdefault(key, {})
        if not isinstance(child, dict):
            raise UsageError(f"'{'.'.join(keys)}': '{'.'.join(keys[: index + 1])}' is a value, not a section")
        data = child
    data[keys[-1]] = value


def _section_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> type[BaseModel]:
    """The schema that holds the last key of ``location``; union tags are part of pydantic's locations."""
    variants: dict[str, type[BaseModel]] = {"small": SmallModelConfig, "pretrained": PretrainedModelConfig}
    section = schema
    for key in location[:-1]:
        if key in variants and section is RunConfig:
            section = variants[str(key)]
            continue
        field = section.model_fields.get(str(key))
        annotation = field.annotation if field is not None else None
        if get_origin(annotation) is list:
            (annotation,) = get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return section


def _explain(error: ValidationError, schema: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        name = ".".join(str(key) for key in location if key not in ("small", "pretrained"))
        if problem["type"] == "extra_forbidden":
            hint = nearest(str(location[-1]), _section_at(location, schema).model_fields)
            lines.append(f"unknown option '{name}'{hint}")
        elif problem["type"] == "union_tag_invalid":
            lines.append(f"option '{name}.type' is {problem['ctx']['tag']!r}; expected 'small' or 'pretrained'")
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            given = "" if problem["type"] == "missing" else f", not {problem['input']!r}"
            lines.append(f"option '{name}': {message}{given}")
    return "; ".join(lines)


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML; unset (``None``) options are left out, so that reading it back gives the same.

    In the overrides of a recipe, where None is a value, it is written as ``"none"``.
    """
    data = config.model_dump(mode="json", exclude_none=True)
    data["algorithm"]["overrides"] = {
        key: "none" if value is None else value for key, value in config.algorithm.overrides.items()
    }
    return tomli_w.dumps(data)

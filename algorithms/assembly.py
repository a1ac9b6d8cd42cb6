"""The parts of a run, built from its configuration.

- ``Agent``: model, tokenizer and message format; ``new_agent``, ``load_agent``.
- ``make_engine``, ``engine_policy``, ``make_pool``, ``play_tasks``, ``open_world``, ``prepare_device``.
- ``update_workers``, ``engine_workers``: threads of an update and processes of the rollouts.
- ``tasks_of``, ``demonstrations_of``: the tasks of a split, and those that the expert has ready.
- ``select_tasks``, ``seed_from``: tasks and seeds that depend on nothing but their arguments.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..agents.branching import Branching
from ..agents.engines.base import Engine, SamplingParams
from ..agents.engines.process_engine import ProcessEngine
from ..agents.engines.torch_engine import SMALL_PARAMETERS, TorchEngine
from ..agents.formats import make_format
from ..agents.messages import Format
from ..agents.models import build_small_model, compose_names, load_model, place
from ..agents.policies import EnginePolicy, Policy
from ..agents.rollout import Progress, RolloutTask, rollout
from ..agents.tokenizer import build_subword_tokenizer, build_word_tokenizer
from ..agents.tree import Tree
from ..config import EngineConfig, EnvConfig, RunConfig, SmallModelConfig
from ..envs.pool import EnvPool
from ..envs.wrappers import wrap
from ..errors import UsageError, nearest
from .checkpoint import checkpoint_of

MANY_EPISODES = 64
"""Of a step, for which starting processes pays."""


@dataclass(frozen=True)
class Agent:
    """What acts: a language model, its tokenizer, and how observations and actions are written for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: Format


def prepare_device(config: RunConfig) -> torch.device:
    """The device that the configuration names, with torch's threads set and progress bars of libraries off.

    Raises:
        UsageError: ``cuda`` is asked for and absent.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' is not available here; use --device cpu, or see `agentropy doctor`")
    logging.disable_progress_bar()  # a bar in the middle of the live table would tear it
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def update_workers(config: RunConfig, model: nn.Module, device: torch.device) -> int:
    """Threads of an update, by the configuration or by the model's size."""
    if config.train.workers is not None:
        return config.train.workers
    small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL_PARAMETERS
    return torch.get_num_threads() if small and device.type == "cpu" else 1


def open_world(config: EnvConfig, split: str) -> gymnasium.Env[str, str]:
    """One environment of the configured world, in the configured wrappers and no others.

    Raises:
        UsageError: the id is not registered, or an argument is not the world's.
    """
    try:
        world = gymnasium.make(config.id, split=split, disable_env_checker=True, **config.kwargs).unwrapped
        return wrap(world, config.wrappers)
    except ModuleNotFoundError as error:
        module, _, _ = config.id.rpartition(":")
        missing = getattr(error.__cause__, "name", None)
        if missing is None or not f"{module}.".startswith(f"{missing}."):
            raise
        raise UsageError(
            f"env.id: there is no module '{module}'; `python -m agentropy` also looks for modules in this folder"
        ) from error
    except gymnasium.error.UnregisteredEnv as error:
        # Those without a namespace are Gymnasium's own, which are no text worlds.
        hint = nearest(config.id, (name for name in gymnasium.registry if "/" in name))
        raise UsageError(f"env.id: there is no environment '{config.id}'{hint}") from error
    except gymnasium.error.Error as error:
        raise UsageError(f"env.id: {error}") from error
    except TypeError as error:
        raise UsageError(f"env.kwargs: {error}") from error


def tasks_of(config: EnvConfig, split: str) -> tuple[str, ...]:
    """The sorted task ids of ``split``."""
    world = open_world(config, split)
    tasks = tuple(sorted(world.tasks(split)))  # type: ignore[attr-defined]
    world.close()
    return tasks


def demonstrations_of(config: EnvConfig, split: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """Those of ``tasks`` that the world's expert can start at once; all where it does not say."""
    world = open_world(config, split).unwrapped
    listed = frozenset(world.demonstrations(split) if hasattr(world, "demonstrations") else tasks)
    world.close()
    return tuple(task for task in tasks if task in listed) or tuple(tasks)


def make_pool(config: EnvConfig, split: str, num_envs: int, **kwargs: Any) -> EnvPool:
    """``num_envs`` slots of the configured world on ``config.workers`` processes."""
    workers = min(config.workers or os.cpu_count() or 1, num_envs)
    arguments = {"split": split, **config.kwargs, **kwargs}
    return EnvPool(config.id, arguments, num_envs=num_envs, num_workers=workers, wrappers=config.wrappers)


def select_tasks(tasks: Sequence[str], count: int | None) -> tuple[str, ...]:
    """``count`` of the tasks, evenly spaced over the given order; all of them when ``count`` is None or larger."""
    if count is None or count >= len(tasks):
        return tuple(tasks)
    return tuple(tasks[index * len(tasks) // count] for index in range(count))


def new_agent(config: RunConfig, device: torch.device) -> Agent:
    """The model that a run starts from.

    Raises:
        UsageError: the model is not to be had, or the world cannot tell its vocabulary to the small model.
    """
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if isinstance(config.model, SmallModelConfig) and config.model.start is not None:
        return load_agent(config, checkpoint_of(config.model.start), device)
    if isinstance(config.model, SmallModelConfig):
        world = open_world(config.env, config.env.train_split)
        if hasattr(world, "lexicon"):
            tokenizer = build_word_tokenizer(world.lexicon())
        elif hasattr(world, "corpus"):
            tokenizer = build_subword_tokenizer(world.corpus(), vocab_size=config.model.vocabulary)
        else:
            raise UsageError(
                f"'{config.env.id}' has neither lexicon() nor corpus() from which to build the small model's "
                "vocabulary; name a pretrained model instead: --model NAME_OR_PATH"
            )
        world.close()
        model = build_small_model(
            len(tokenizer),
            hidden=config.model.hidden,
            layers=config.model.layers,
            heads=config.model.heads,
            intermediate=config.model.intermediate,
            max_positions=config.model.max_positions,
            seed=config.seed,
        )
        compose_names(model, tokenizer, seed=config.seed)
    else:
        model, tokenizer = load_model(config.model.path, dtype=config.model.dtype)
    return Agent(
        place(model, device), tokenizer, make_format(config.agent.format, tokenizer, **config.agent.format_options)
    )


def load_agent(config: RunConfig, checkpoint: Path | str, device: torch.device) -> Agent:
    """The model of a checkpoint folder, or of the hub."""
    dtype = "float32" if isinstance(config.model, SmallModelConfig) else config.model.dtype
    model, tokenizer = load_model(checkpoint, dtype=dtype, device=device)
    return Agent(model, tokenizer, make_format(config.agent.format, tokenizer, **config.agent.format_options))


def engine_workers(config: RunConfig, model: nn.Module, device: torch.device) -> int:
    """Processes of the built-in engine in training, by the configuration or by the sizes of model and steps."""
    if config.engine.workers is not None:
        return config.engine.workers
    episodes = config.train.tasks_per_step * config.train.group_size
    if episodes < MANY_EPISODES or not config.train.steps:
        return 1
    # Environments and this process have work of their own: on two cores one engine is faster than two.
    return max(1, update_workers(config, model, device) // 2)


def make_engine(agent: Agent, config: EngineConfig | None = None, workers: int = 1) -> Engine:
    """The engine that the configuration names; by default the built-in one, sharing the agent's weights in place.

    ``workers`` are processes of the built-in one.

    Raises:
        UsageError: an option is not the engine's, its package is absent, or its server does not answer.
    """
    config = config or EngineConfig()
    options = dict(config.options)
    if config.dtype != "model":
        options["dtype"] = getattr(torch, config.dtype)
    if config.type == "torch" and workers > 1:
        return _built(partial(ProcessEngine, agent.model, agent.tokenizer, workers=workers), options, TorchEngine)
    if config.type == "torch":
        return _built(partial(TorchEngine, agent.model, agent.tokenizer), options, TorchEngine)
    if config.type == "vllm":
        from ..agents.engines.vllm_engine import VLLMEngine

        return _built(partial(VLLMEngine, agent.model, agent.tokenizer), options, VLLMEngine)
    from ..agents.engines.http_engine import HTTPEngine

    if "url" not in options:
        raise UsageError("engine.type is 'http' and no server is named; expected engine.options.url")
    named = options.pop("url"), options.pop("model", None)
    make = partial(HTTPEngine, *named, tokenizer=agent.tokenizer, module=agent.model)
    return _built(make, options, HTTPEngine)


def _built(make: Callable[..., Engine], options: Mapping[str, Any], of: Any) -> Engine:
    known = [name for name in inspect.signature(of).parameters if name not in ("model", "tokenizer")]
    for name in options:
        if name not in known:
            raise UsageError(f"engine.options: {of.__name__} has no option '{name}'{nearest(name, known)}")
    return make(**options)


def engine_policy(
    agent: Agent, engine: Engine, config: RunConfig, temperature: float, entropy_top_k: int = 0
) -> EnginePolicy:
    """The policy that samples from ``engine`` as the configuration says, at ``temperature``.

    ``entropy_top_k`` other than 0 asks for estimates of the entropy, whatever the configuration says.
    """
    options = config.agent
    params = SamplingParams(
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        entropy_top_k=entropy_top_k or options.entropy_top_k,
    )
    return EnginePolicy(engine, agent.format, params, max_action_tokens=options.max_action_tokens)


def play_tasks(
    config: RunConfig,
    policy: Policy,
    pool: EnvPool,
    format: Format,
    tasks: Sequence[RolloutTask],
    split: str,
    progress: Callable[[Progress], None] | None = None,
    branching: Branching | None = None,
) -> list[Tree]:
    """``rollout`` with the contexts that the configuration asks for."""
    return rollout(
        policy,
        pool,
        format,
        tasks,
        context=config.agent.context,
        window=config.agent.window,
        max_context_tokens=config.agent.max_context_tokens,
        split=split,
        branching=branching,
        progress=progress,
    )


def seed_from(*words: int) -> int:
    """A 63-bit seed that depends on every word and on their order."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)

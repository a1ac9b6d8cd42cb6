"""``agentropy play``: a person, the expert, chance or a checkpoint plays one episode in the terminal.

- ``play``: run the episode and print it as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.console import Console

from ..config import RunConfig
from ..errors import UsageError
from .assembly import open_world

Choose = Callable[[str, Mapping[str, Any]], str]
"""From (observation, info) to a command."""


def play(config: RunConfig, agent: str, split: str, task: str | None, *, checkpoint: str | None = None) -> int:
    """Play one episode. ``agent`` is ``human``, ``expert``, ``random``, or anything else with a ``checkpoint``.

    Returns the exit status: 0 when the episode was won or a person left it, 1 otherwise.
    """
    console = Console(highlight=False)
    env = open_world(config.env, split)
    choose = _chooser(config, agent, env, checkpoint, console)
    observation, info = env.reset(seed=config.seed, options={"task": task} if task else None)
    console.print(f"task {info['task']}", style="dim", markup=False)
    if "instructions" in info:
        console.print(info["instructions"] + "\n", style="dim", markup=False)
    console.print(observation, markup=False)
    total = 0.0
    while True:
        try:
            command = choose(observation, info)
        except EOFError:
            console.print("left the game")
            return 0
        observation, reward, terminated, truncated, info = env.step(command)
        total += float(reward)
        console.print(observation, markup=False)
        if terminated or truncated:
            break
    ending = "won" if info["won"] else "out of turns" if truncated else "lost"
    console.print(f"{ending} after {info['turn']} turns, reward {total:g}", style="bold")
    return 0 if info["won"] or agent == "human" else 1


def _chooser(config: RunConfig, agent: str, env: Any, checkpoint: str | None, console: Console) -> Choose:
    def announced(choose: Choose) -> Choose:
        def act(observation: str, info: Mapping[str, Any]) -> str:
            command = choose(observation, info)
            console.print(f"> {command}", style="bold", markup=False)
            return command

        return act

    if agent == "human":
        listed = ", ? lists the admissible ones" if _lists(env) else ""
        console.print(f"Type a command{listed}; Ctrl-D leaves.", style="dim")
        return _human(env, console)
    if agent == "expert":
        if not getattr(env, "has_expert", hasattr(env, "expert")):
            raise UsageError(f"'{config.env.id}' has no expert")
        return announced(lambda observation, info: _expert_action(env, info))
    if agent == "random":
        if not _lists(env):
            raise UsageError(f"'{config.env.id}' lists no commands to choose from: its actions are free text")
        generator = np.random.default_rng(config.seed)
        return announced(lambda observation, info: str(generator.choice(_commands(env, info))))
    assert checkpoint is not None
    return announced(_model(config, checkpoint))


def _expert_action(env: Any, info: Mapping[str, Any]) -> str:
    action = next(env.expert(), None)
    if action is None:
        raise UsageError(f"the expert of task {info['task']!r} has no action for turn {info['turn']}")
    return str(action)


def _lists(env: Any) -> bool:
    return not getattr(env, "free_text", False)


def _commands(env: Any, info: Mapping[str, Any]) -> list[str]:
    """The admissible commands; some worlds list them on demand only."""
    return list(info["admissible"] if "admissible" in info else env.admissible())


def _human(env: Any, console: Console) -> Choose:
    def choose(observation: str, info: Mapping[str, Any]) -> str:
        while (command := input("> ").strip()) in ("", "?"):
            if _lists(env):
                console.print("\n".join(_commands(env, info)), style="dim", markup=False)
        return command

    return choose


def _model(config: RunConfig, checkpoint: str) -> Choose:
    """A checkpoint with its history kept in full, as in training."""
    from ..agents.policies import Context
    from .assembly import engine_policy, load_agent, make_engine, prepare_device, seed_from

    agent = load_agent(config, checkpoint, prepare_device(config))
    policy = engine_policy(agent, make_engine(agent, config.engine), config, config.eval.temperature)
    tokens: list[int] = []
    closed = True

    def choose(observation: str, info: Mapping[str, Any]) -> str:
        nonlocal closed
        added = agent.format.observation(observation, info, closed=closed) if tokens else None
        tokens.extend(agent.format.prompt(observation, info) if added is None else added)
        seed = seed_from(config.seed, 6, int(info["turn"]))
        context = Context(np.asarray(tokens, np.int32), seed, int(info["turn"]), observation, info)
        (act,) = policy.act([context])
        tokens.extend(act.tokens.tolist())
        closed = act.parsed.closed
        return act.parsed.command

    return choose

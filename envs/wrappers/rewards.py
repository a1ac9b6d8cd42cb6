"""Wrappers that change what an agent earns.

- ``TurnCost``: every turn costs.
- ``ToolPenalty``: calls of tools cost.
- ``price``: check an amount.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import gymnasium

from ...errors import UsageError
from .base import Info, Reply, WorldWrapper
from .calls import count_calls


class TurnCost(WorldWrapper):
    """Takes ``cost`` from the reward of every turn; ``info["turn_cost"]`` is the sum so far.

    >>> import gymnasium as gym
    >>> env = TurnCost(gym.make("agentropy/ALFWorld-v0"), cost=0.01)
    >>> _ = env.reset(seed=0)
    >>> env.step("look")[1]
    -0.01
    """

    name = "turn-cost"

    def __init__(self, env: gymnasium.Env[str, str], cost: float = 0.01, free: int = 0) -> None:
        """Set the cost.

        Args:
            env: a text world.
            cost: of one turn; not negative.
            free: turns at the start of an episode that cost nothing.

        Raises:
            UsageError: an argument is negative or no number.
        """
        cost = price("cost", cost)
        if free < 0:
            raise UsageError(f"free must not be negative, got {free}")
        super().__init__(env, cost=cost, free=free)
        self._cost, self._free = cost, free

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        self._state = 0
        return observation, {"turn_cost": 0.0}

    def _turn(self, action: str) -> Reply:
        reply = self._below(action)
        self._state += 1
        paid = max(0, self._state - self._free)
        if paid:
            reply.reward -= self._cost
        reply.notes["turn_cost"] = paid * self._cost
        return reply


class ToolPenalty(WorldWrapper):
    """Takes ``penalty`` from the reward for every call of a tool; ``info["calls"]`` counts them.

    A call is a block such as ``<search>…</search>`` outside of ``<think>…</think>``, or a function call in JSON; see
    ``count_calls``. Answers are no calls.

    >>> import gymnasium as gym
    >>> env = ToolPenalty(gym.make("agentropy/ALFWorld-v0"), penalty=0.05, free=1)  # any world: it reads the message
    >>> _ = env.reset(seed=0)
    >>> _, reward, _, _, info = env.step("<search>candle</search><search>soap</search>")
    >>> reward, info["calls"]
    (-0.05, 2)
    """

    name = "tool-penalty"

    def __init__(
        self,
        env: gymnasium.Env[str, str],
        penalty: float = 0.05,
        free: int = 0,
        tools: Sequence[str] | None = None,
        most: float | None = None,
    ) -> None:
        """Set the penalty.

        Args:
            env: a text world.
            penalty: for one call; not negative.
            free: calls in an episode that cost nothing.
            tools: names of tags and functions that count; None counts the tags of ``TOOL_TAGS`` and any function.
            most: an episode pays at most this.

        Raises:
            UsageError: an argument is negative or no number.
        """
        penalty = price("penalty", penalty)
        most = None if most is None else price("most", most)
        if free < 0:
            raise UsageError(f"free must not be negative, got {free}")
        tools = (tools,) if isinstance(tools, str) else None if tools is None else tuple(tools)
        super().__init__(env, penalty=penalty, free=free, tools=tools, most=most)
        self._penalty, self._free, self._tools = penalty, free, tools
        self._most = math.inf if most is None else most

    def _begin(self, observation: str, info: Info) -> tuple[str, Info]:
        self._state = 0
        return observation, {"calls": 0, "call_penalty": 0.0}

    def _turn(self, action: str) -> Reply:
        reply = self._below(action)
        before = self._due(self._state)
        self._state += count_calls(action, self._tools)
        due = self._due(self._state)
        reply.reward -= due - before
        reply.notes |= {"calls": self._state, "call_penalty": due}
        return reply

    def _due(self, calls: int) -> float:
        """Return what ``calls`` calls cost altogether."""
        return min(self._most, max(0, calls - self._free) * self._penalty)


def price(name: str, value: float) -> float:
    """Return ``value`` as a float.

    Raises:
        UsageError: it is negative or no number.
    """
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} must be a number that is not negative, got {value}")
    return float(value)

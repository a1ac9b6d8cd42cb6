"""The ten slots that a recipe fills: one module per slot, ``signatures`` for their types.

- ``Slots``: one choice per slot. ``DEFAULT_SLOTS``: the identity elements.
- ``register``, ``use``, ``components``, ``Component``: the registry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError, nearest
from . import (  # noqa: F401
    aggregation,
    baseline,
    clip,
    controller,
    credit,
    regulariser,
    returns,
    reward,
    sampler,
    shape,
    stream,
    weight,
)
from .registry import Component, components, register, use
from .signatures import (
    Aggregation,
    Baseline,
    Clip,
    Controller,
    Credit,
    Regulariser,
    Reward,
    Sampler,
    Shape,
    Stream,
    Term,
    Weight,
)

__all__ = ["DEFAULT_SLOTS", "Component", "Slots", "Term", "components", "register", "use"]


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What fills each slot. Tuples are applied in order; an empty one is the identity."""

    samplers: tuple[Sampler, ...] = ()
    rewards: tuple[Reward, ...]
    credit: Credit
    baseline: Baseline
    shapes: tuple[Shape, ...] = ()
    weights: tuple[Weight, ...] = ()
    clip: Clip
    aggregation: Aggregation
    regularisers: tuple[Regulariser, ...] = ()
    stream: Stream
    controllers: tuple[Controller, ...] = ()

    def extend(self, **parts: Any) -> Slots:
        """A copy in which single slots are replaced and tuples are appended to."""
        merged: dict[str, Any] = {
            name: (*getattr(self, name), *part) if isinstance(part, tuple) else part for name, part in parts.items()
        }
        return dataclasses.replace(self, **merged)

    def override(self, tables: Mapping[str, Any]) -> Slots:
        """A copy with the named slots filled from tables such as ``{"type": "ppo", "high": 0.28}``.

        A slot that holds several components takes a list of tables.

        Raises:
            UsageError: unknown slot, component or option, with the nearest valid one.
        """
        made: dict[str, Any] = {}
        for slot, value in tables.items():
            if slot not in vars(self):
                raise UsageError(f"unknown slot '{slot}'{nearest(slot, vars(self))}")
            if isinstance(getattr(self, slot), tuple):
                made[slot] = tuple(_from_table(slot.removesuffix("s"), table) for table in value)
            else:
                made[slot] = _from_table(slot, value)
        return dataclasses.replace(self, **made)


def _from_table(slot: str, table: Any) -> Any:
    if not isinstance(table, Mapping) or not isinstance(table.get("type"), str):
        raise UsageError(f"a {slot} is a table with a type, one of {', '.join(components(slot))}; not {table!r}")
    return use(slot, table["type"], **{key: value for key, value in table.items() if key != "type"})


DEFAULT_SLOTS = Slots(
    rewards=(use("reward", "environment"),),
    credit=use("credit", "broadcast"),
    baseline=use("baseline", "group"),
    clip=use("clip", "ppo"),
    aggregation=use("aggregation", "token-mean"),
    stream=use("stream", "on_policy"),
)
"""The identity elements; together they make GRPO without a KL term."""

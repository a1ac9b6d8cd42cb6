"""Handles to libdownward, Fast Downward's C library as shipped by ``fast-downward-textworld``.

- ``Planner``: one loaded copy of the library: states by id, applicable operators, effects, goal test.
- ``PlannerPool``: a bounded set of handles, lent to the games used last.

The library keeps its task in globals, so each game that is played needs a copy of its own (34 MB on disk, 7 MB of
memory); copies cannot be unloaded and are reused instead.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict

import fast_downward
import numpy as np

_OPERATOR_SIZE = ctypes.sizeof(fast_downward.Operator)


class Planner:
    """One copy of the library with one task in it. States are ids that stay valid until the next ``load``."""

    def __init__(self) -> None:
        """Load a private copy of the library."""
        self._lib = fast_downward.load_lib()
        self._lib.get_state_id.argtypes = []
        self._lib.get_state_id.restype = ctypes.c_int
        self._lib.set_state_id.argtypes = [ctypes.c_int]
        self._lib.set_state_id.restype = None
        self._buffer = (fast_downward.Operator * 256)()
        self._effects = (fast_downward.Atom * 0)()
        self._effect_count = 0

    def load(self, sas: str, most_effects: int) -> int:
        """Load a task in place of the one before and return the id of its initial state.

        Args:
            sas: the task in Fast Downward's format.
            most_effects: the largest number of effects of any of its operators.
        """
        self._effects = (fast_downward.Atom * most_effects)()
        self._lib.load_sas(sas.encode())
        return self._lib.get_state_id()

    def goal(self, state: int) -> bool:
        """Whether the goal holds in ``state``."""
        self._lib.set_state_id(state)
        return bool(self._lib.check_goal())

    def operators(self, state: int) -> bytes:
        """Return the applicable operators' ids in the library's order, as the bytes of an int32 array."""
        self._lib.set_state_id(state)
        count = self._lib.get_applicable_operators_count()
        if count > len(self._buffer):
            self._buffer = (fast_downward.Operator * (2 * count))()
        self._lib.get_applicable_operators(self._buffer)
        fields = np.frombuffer(self._buffer, np.int32).reshape(-1, _OPERATOR_SIZE // 4)
        return fields[:count, 0].tobytes()

    def apply(self, state: int, operator: int) -> int:
        """Apply ``operator``, which must be applicable in ``state``, and return the next state."""
        self._lib.set_state_id(state)
        self._effect_count = self._lib.apply_operator(operator, self._effects)
        return self._lib.get_state_id()

    def effects(self) -> list[str]:
        """Return the effects of the operator applied last, such as ``"NegatedAtom holds(agent1, mug_1)"``."""
        return [atom.name for atom in self._effects[: self._effect_count]]


class PlannerPool:
    """At most ``capacity`` planners; beyond that, the owner that used its planner longest ago loses it."""

    def __init__(self, capacity: int) -> None:
        """Start empty; planners are loaded as they are needed."""
        self._capacity = capacity
        self._held: OrderedDict[object, Planner] = OrderedDict()
        self._idle: list[Planner] = []

    def __len__(self) -> int:
        """The number of loaded planners."""
        return len(self._held) + len(self._idle)

    def acquire(self, owner: object) -> tuple[Planner, bool]:
        """Return the planner of ``owner`` and whether it is new to it, so that the task must be loaded."""
        planner = self._held.get(owner)
        if planner is not None:
            self._held.move_to_end(owner)
            return planner, False
        if self._idle:
            planner = self._idle.pop()
        elif len(self._held) < self._capacity:
            planner = Planner()
        else:
            _, planner = self._held.popitem(last=False)
        self._held[owner] = planner
        return planner, True

    def release(self, owner: object) -> None:
        """Take back the planner of ``owner``, if it still has one."""
        planner = self._held.pop(owner, None)
        if planner is not None:
            self._idle.append(planner)

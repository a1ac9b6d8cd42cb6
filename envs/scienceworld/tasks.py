"""The 30 tasks of ScienceWorld, their variations and official splits, and its simplifications.

- ``VARIATIONS``: the number of variations of each task. ``TASKS``: their names.
- ``split_variations``: those of one split. ``task_id`` and ``parse``: between them and task ids.
- ``resolve``: the simplifications that a string stands for, for one task. ``needs_electricity``: where one cannot be.

All of this is what the simulator says of itself; it stands here so that nobody must start it to list tasks.
"""

from __future__ import annotations

from ...errors import UsageError, nearest

SPLITS = ("train", "dev", "test")
VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
TASKS = tuple(VARIATIONS)

NO_ELECTRICITY = "noElectricalAction"
SIMPLIFICATIONS = ("teleportAction", NO_ELECTRICITY, "openDoors", "openContainers", "selfWateringFlowerPots")
_EASY = ("teleportAction", NO_ELECTRICITY, "openDoors", "selfWateringFlowerPots")


def split_variations(task: str, split: str) -> range:
    """Return the variations of ``task`` in ``split``: the first half, the third quarter, and the rest."""
    quarter = VARIATIONS[task] // 4
    bounds = {"train": (0, 2 * quarter), "dev": (2 * quarter, 3 * quarter), "test": (3 * quarter, VARIATIONS[task])}
    return range(*bounds[split])


def task_id(task: str, variation: int) -> str:
    """Return the id of a variation.

    >>> task_id("boil", 7)
    'boil/0007'
    """
    return f"{task}/{variation:04d}"


def parse(identifier: str) -> tuple[str, int]:
    """Return task and variation of an id.

    >>> parse("boil/0007")
    ('boil', 7)
    """
    task, _, variation = identifier.partition("/")
    return task, int(variation)


def needs_electricity(task: str) -> bool:
    """Whether the task cannot be done without the electrical actions."""
    return "power-component" in task or "conductivity" in task


def check(simplifications: str) -> tuple[str, ...]:
    """Return the simplifications of a string, separated by commas, in the order of ``SIMPLIFICATIONS``.

    Raises:
        UsageError: one is unknown.
    """
    names = {name for name in simplifications.split(",") if name}
    for name in sorted(names):
        if name not in ("easy", *SIMPLIFICATIONS):
            raise UsageError(f"unknown ScienceWorld simplification {name!r}{nearest(name, ('easy', *SIMPLIFICATIONS))}")
    if "easy" in names and len(names) > 1:
        raise UsageError(f"'easy' stands alone: {','.join(_EASY)} is what it means")
    return ("easy",) if "easy" in names else tuple(name for name in SIMPLIFICATIONS if name in names)


def resolve(simplifications: tuple[str, ...], task: str) -> str:
    """Return the simplifications as the simulator takes them for ``task``."""
    names = _EASY if simplifications == ("easy",) else simplifications
    electric = simplifications == ("easy",) and needs_electricity(task)
    return ",".join(name for name in names if not (electric and name == NO_ELECTRICITY))

"""What generated games take from ALFWorld's own package: its domain, grammar, constants and 120 floor plans.

- ``Upstream``, ``upstream``: those parts, from a file of this package, so that nothing has to be compiled to play.
- ``read_package``: the same parts, from an installed ``alfworld``.
- ``main``: ``python -m agentropy.envs.alfworld.upstream`` writes the file again from the installed package.

The parts are ALFWorld 0.4.2's, under the MIT licence, whose text the file holds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import lzma
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingDependencyError

FILE = Path(__file__).with_name("upstream.json.xz")
_CONSTANTS = ("VAL_ACTION_OBJECTS", "VAL_RECEPTACLE_OBJECTS", "MOVABLE_RECEPTACLES", "OBJECTS_WSLICED")


@dataclass(frozen=True)
class FloorPlan:
    """One of ALFRED's rooms."""

    poses: dict[str, list[float]]
    """Receptacle to the agent's pose in front of it: x, z, rotation, horizon."""
    objects: list[str]
    """Types of objects that the room has, sorted."""
    cells: list[list[float]]
    """Where an agent can stand, as x and z, sorted."""


@dataclass(frozen=True)
class Upstream:
    """The parts of ALFWorld's package that generated games are made of."""

    licence: str
    domain: str
    """``data/alfred.pddl``."""
    grammar: str
    """``data/alfred.twl2``."""
    constants: dict[str, Any]
    """Tables of ``gen/constants.py``, with their lists and sets sorted; the order of keys is theirs."""
    floor_plans: dict[int, FloorPlan]


@lru_cache(maxsize=1)
def upstream() -> Upstream:
    """Return the parts that ship with this package."""
    data = json.loads(lzma.decompress(FILE.read_bytes()))
    data["floor_plans"] = {int(number): FloorPlan(**plan) for number, plan in data["floor_plans"].items()}
    return Upstream(**data)


def read_package() -> Upstream:
    """Return the parts of the installed ``alfworld``; of its modules only the constants are executed.

    Raises:
        MissingDependencyError: ``alfworld`` is not installed.
    """
    spec = importlib.util.find_spec("alfworld")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    folder = next((folder for folder in folders if (folder / "data" / "alfred.pddl").is_file()), None)
    if folder is None:
        raise MissingDependencyError("ALFWorld is not installed; run: pip install 'agentropy[alfworld]'")
    layouts = folder / "gen" / "layouts"
    licence = importlib.metadata.distribution("alfworld").read_text("LICENSE")
    return Upstream(
        licence=licence or "",
        domain=(folder / "data" / "alfred.pddl").read_text(encoding="utf-8"),
        grammar=(folder / "data" / "alfred.twl2").read_text(encoding="utf-8"),
        constants=_constants(folder / "gen" / "constants.py"),
        floor_plans={number: _floor_plan(layouts, number) for number in sorted(_numbers(layouts))},
    )


def _constants(path: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("_alfworld_constants", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: _sorted(getattr(module, name)) for name in _CONSTANTS}


def _sorted(table: Any) -> Any:
    if isinstance(table, dict):
        return {key: _sorted(value) for key, value in table.items()}
    return sorted(table)


def _numbers(layouts: Path) -> list[int]:
    return [int(path.name.removeprefix("FloorPlan").partition("-")[0]) for path in layouts.glob("*-openable.json")]


def _floor_plan(layouts: Path, number: int) -> FloorPlan:
    plan = layouts / f"FloorPlan{number}"
    cells = sorted({(float(x), float(z)) for x, z in np.load(f"{plan}-layout.npy")})
    return FloorPlan(
        poses=dict(sorted(json.loads(Path(f"{plan}-openable.json").read_text()).items())),
        objects=sorted(set(json.loads(Path(f"{plan}-objects.json").read_text()))),
        cells=[list(cell) for cell in cells],
    )


def main() -> None:
    """Write the file of this package again."""
    text = json.dumps(asdict(read_package()), separators=(",", ":"))
    FILE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()

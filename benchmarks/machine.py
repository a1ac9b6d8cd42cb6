"""What a measurement ran on, so that figures can be compared later.

- ``describe_machine``: processor, memory, versions, commit and date as JSON-able values.
- ``summary``: the same in one line.
- ``descendants``, ``resident``: what a process has started, and the memory of all of it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..envs.pool import usable_cores


def describe_machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describe this machine; ``packages`` names the distributions whose versions matter (None where absent)."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "usable_cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("agentropy", "numpy", *packages)},
        "git_commit": _commit(),
        "gpu": _gpu(),
    }


def summary(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores, load {machine['load_average']}, "
        f"Python {machine['python']}, commit {machine['git_commit'] or 'unknown'}"
    )


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu() -> str | None:
    """The first GPU, where this process has use for one: torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with ``+`` where files differ from it."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` started, and those that they started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:  # it has just ended
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def resident(pid: int) -> int:
    """Bytes of memory of a process and of all that it started."""
    total = 0
    for each in (pid, *descendants(pid)):
        try:
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue
    return total

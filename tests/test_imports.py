"""Imports run one way between the rooms of the package, and what should be light to import is light.

The arrows: envs <- agents <- algorithms <- command line, and kernels <- agents, algorithms. The source is read, not
run, so that an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("envs", "kernels", "agents", "algorithms", "benchmarks")

TENSORS = frozenset({"torch", "triton", "numba", "llvmlite"})
MODELS = frozenset({"transformers", "tokenizers", "safetensors", "tensorboard", "vllm", "accelerate"})
WORLDS = frozenset({"textworld", "alfworld", "fast_downward", "scienceworld", "jericho"})


@dataclass(frozen=True)
class Rule:
    """What one room may import: prefixes of modules of the package, and top-level packages from outside."""

    inside: frozenset[str]
    never: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    """When set, the only outside packages allowed beyond the standard library."""


FOUNDATION = frozenset({"errors", "extras", "listening", "__init__"})
RULES = {
    "envs": Rule(FOUNDATION | {"envs", "registry"}, never=TENSORS | MODELS),
    "kernels": Rule(FOUNDATION | {"kernels"}, only=TENSORS | {"numpy"}),
    "agents": Rule(FOUNDATION | {"agents", "kernels", "envs.pool"}, never=WORLDS),
    # The trainer makes the pool and reads the configuration; a world is only a Gymnasium id to it.
    "algorithms": Rule(
        FOUNDATION | {"algorithms", "agents", "kernels", "envs.pool", "envs.wrappers", "config"}, never=WORLDS
    ),
    # Read by the command line before anything heavy is loaded.
    "__init__": Rule(frozenset(), only=frozenset()),
    "errors": Rule(frozenset(), only=frozenset()),
    "extras": Rule(FOUNDATION, only=frozenset()),
    "listening": Rule(FOUNDATION, only=frozenset()),
    "registry": Rule(frozenset(), only=frozenset()),
    "config": Rule(FOUNDATION | {"registry"}, never=TENSORS | MODELS | WORLDS),
    "doctor": Rule(FOUNDATION | {"envs.tools.interpreters"}, never=TENSORS | MODELS | WORLDS),
}


def sources() -> dict[str, Path]:
    """Return every module of the package by its dotted name below ``agentropy``."""
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(module: str, source: str, *, package: bool, modules: set[str]) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, dotted name, is it ours) of each import; ours are named below ``agentropy``."""
    here = module.split(".") if module != "__init__" else []
    base = here if package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        names: list[tuple[str, bool]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [(f"{node.module}.{alias.name}", False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = [(".".join([*start, alias.name]), True) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [(argument.value, False) for argument in node.args[:1] if _is_text(argument)]
        for name, ours in names:
            if name.split(".")[0] == "agentropy":
                name, ours = name.partition(".")[2], True
            if ours:
                # `from .room import thing`: what is imported is the longest part of the name that is a module.
                while name and name not in modules:
                    name = name.rpartition(".")[0]
                name = name or "__init__"
            yield node.lineno, name, ours


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def violations(module: str, source: str, *, package: bool = False, modules: set[str] | None = None) -> list[str]:
    """Return the imports of ``module`` that break the rule of its room, as ``module:line imports name``."""
    rule = RULES.get(module.split(".")[0])
    if rule is None:
        return []
    found = []
    for line, name, ours in imports(module, source, package=package, modules=modules or set(sources())):
        top = name.split(".")[0]
        if ours:
            allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in rule.inside)
        elif rule.only is not None:
            allowed = top in rule.only or top in sys.stdlib_module_names
        else:
            allowed = top not in rule.never
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return found


def test_every_import_follows_the_arrows():
    modules = sources()
    assert {"envs", "agents", "algorithms", "kernels", "errors", "cli"} <= modules.keys()
    broken = [
        violation
        for module, file in modules.items()
        for violation in violations(module, file.read_text(), package=file.name == "__init__.py", modules=set(modules))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("envs.alfworld.env", "import torch"),
        ("envs.alfworld.env", "from torch import nn"),
        ("envs.alfworld.env", "def f():\n    import torch.nn.functional as F"),
        ("envs.alfworld.env", "import importlib\nimportlib.import_module('torch')"),
        ("envs.alfworld.env", "from ...agents.tree import Tree"),
        ("envs.alfworld.env", "from ... import agents"),
        ("envs.pool", "from ..config import RunConfig"),
        ("envs.pool", "from agentropy.algorithms import recipe"),
        ("agents.rollout", "from ..algorithms.batch import Minibatch"),
        ("agents.rollout", "from ..envs.alfworld.env import ALFWorldEnv"),
        ("agents.rollout", "from .. import envs"),
        ("agents.rollout", "from ..config import RunConfig"),
        ("agents.rollout", "import textworld"),
        ("agents.rollout", "if TYPE_CHECKING:\n    from ..algorithms import Minibatch"),
        ("algorithms.trainer", "from .. import cli"),
        ("algorithms.trainer", "from ..envs.alfworld import generator"),
        ("algorithms.recipes.epo", "from alfworld import agents"),
        ("kernels.logprob", "import scipy"),
        ("kernels.logprob", "from ..agents.tree import Tree"),
        ("errors", "from .config import RunConfig"),
        ("config", "import torch"),
        ("registry", "import gymnasium"),
        ("__init__", "from . import envs"),
    ],
)
def test_a_violation_is_caught(module, source):
    assert len(violations(module, source, package=module == "__init__")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "envs.alfworld.env",
            "import gymnasium\nimport textworld\nfrom ...errors import UsageError\nfrom . import games",
        ),
        ("kernels.logprob", "import math\nimport torch\nimport triton.language as tl\nfrom ..errors import UsageError"),
        ("agents.rollout", "from ..envs.pool import EnvPool\nfrom .tree import Tree\nfrom ..kernels import logprob"),
        ("algorithms.trainer", "import torch\nfrom .. import __version__\nfrom ..agents.rollout import rollout"),
        ("cli", "from .algorithms.trainer import train\nfrom .envs.alfworld.env import ALFWorldEnv\nimport torch"),
    ],
)
def test_what_the_arrows_allow_passes(module, source):
    assert violations(module, source) == []


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that ``statement`` loads in a fresh interpreter, away from the repository."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["agentropy", "agentropy.envs", "agentropy.config", "agentropy.cli", "agentropy.algorithms.view.app"]
)
def test_importing_the_light_parts_loads_neither_torch_nor_a_world(module):
    heavy = TENSORS | MODELS | WORLDS | {"matplotlib"}
    assert not loaded_by(f"import {module}") & heavy


def test_playing_a_world_loads_no_torch():
    code = "import gymnasium; gymnasium.make('agentropy.envs:agentropy/ALFWorld-v0').reset(seed=0)"
    assert not loaded_by(code) & (TENSORS | MODELS)


def test_help_answers_in_under_half_a_second():
    def processor_seconds() -> float:
        command = [sys.executable, "-m", "agentropy", "--help"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    # Time on the processor, best of three: other work on the machine must not decide.
    assert min(processor_seconds() for _ in range(3)) < 0.5

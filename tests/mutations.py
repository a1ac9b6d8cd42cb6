"""Do the tests notice? Five deliberate mistakes in each of EPO, ARPO, AEPO and EMPG, one at a time.

``python tests/mutations.py`` copies the package, makes one wrong edit, runs the method's tests in the copy, and prints
whether one of them failed. It exits with 1 if a mistake went unnoticed, or if the untouched copy fails. It is not part
of the suite: it takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agents", "algorithms", "envs", "kernels", "tests")


@dataclass(frozen=True)
class Mutation:
    """One wrong edit: in ``file``, ``old`` (which stands there once) becomes ``new``."""

    method: str
    mistake: str
    file: str
    old: str
    new: str


TESTS = {
    "epo": ("tests/algorithms/test_epo.py", "tests/algorithms/test_composition.py -k epo"),
    "arpo": (
        "tests/agents/test_branching.py",
        "tests/algorithms/test_shapes.py",
        "tests/algorithms/test_reference.py -k arpo",
    ),
    "aepo": (
        "tests/agents/test_branching.py",
        "tests/algorithms/test_shapes.py",
        "tests/algorithms/test_baselines.py -k preserving",
        "tests/algorithms/test_laws.py",
    ),
    "empg": ("tests/algorithms/test_empg.py", "tests/algorithms/test_reference.py -k empg"),
}
"""What is run for each method: pytest arguments, one process each, until one fails."""

SHAPE, FORKS = "algorithms/slots/shape.py", "agents/branching.py"
ROLLOUT, EPISODES = "agents/rollout.py", "agents/episodes.py"
CONTROLLER, REGULARISER = "algorithms/slots/controller.py", "algorithms/slots/regulariser.py"

MUTATIONS = (
    Mutation("epo", "sign of the entropy bonus", REGULARISER, "Term(-self.coefficient", "Term(self.coefficient"),
    Mutation(
        "epo",
        "penalty without a gradient",
        REGULARISER,
        "(low - entropy).relu() + (entropy - high).relu()",
        "(low - entropy.detach()).relu() + (entropy.detach() - high).relu()",
    ),
    Mutation(
        "epo",
        "mean over the micro-batch",
        "algorithms/recipe.py",
        "regulariser.value(batch, term, logprobs, entropy, values)).sum()",
        "regulariser.value(batch, term, logprobs, entropy, values)).mean()",
    ),
    Mutation(
        "epo",
        "reference of the next turn",
        CONTROLLER,
        "table[torch.where(batch.turn < len(means), batch.turn, -1)]",
        "table[torch.where(batch.turn + 1 < len(means), batch.turn + 1, -1)]",
    ),
    Mutation(
        "epo", "history not saved", CONTROLLER, '"history": [list(entry) for entry in self.history]', '"history": []'
    ),
    Mutation("arpo", "sign of the rise", FORKS, "- root[:count]).sum())", "- root[:count]).sum()) * -1"),
    Mutation(
        "arpo",
        "a fork shares its parent's list of actions",
        EPISODES,
        "list(self.entropies), list(self._actions)",
        "list(self.entropies), self._actions",
    ),
    Mutation(
        "arpo",
        "shared prefix averaged over rows of one trajectory",
        SHAPE,
        "copy = (node * width + offset) * len(rows) + owner[:, None]",
        "copy = (node * width + offset) * len(rows) + 0 * owner[:, None]",
    ),
    Mutation(
        "arpo",
        "forks after the action instead of before it",
        ROLLOUT,
        """            for _ in range(unit.decide(episode, act)):
                self._pool.fork(slot, self._seat(table, unit.fork(episode)))
            episode.record(act)
""",
        """            forks = unit.decide(episode, act)
            episode.record(act)
            for _ in range(forks):
                self._pool.fork(slot, self._seat(table, unit.fork(episode)))
""",
    ),
    Mutation(
        "arpo",
        "roots of the released code not saved",
        FORKS,
        '{"slot_roots": dict(self.slot_roots)}',
        '{"slot_roots": {}}',
    ),
    Mutation("aepo", "sign of the entropy factor", SHAPE, "1 + weight * torch.where(", "1 - weight * torch.where("),
    Mutation(
        "aepo",
        "bound without its stop-gradient",
        "algorithms/slots/clip.py",
        "ratio.clamp(1 - low, 1 + high) * (difference - difference.detach()).exp()",
        "ratio.clamp(1 - low, 1 + high) * (difference - difference).exp()",
    ),
    Mutation(
        "aepo",
        "entropies standardised per row",
        SHAPE,
        "(entropy - entropy.mean()) / spread, 0)",
        "(entropy - torch.where(batch.mask, batch.old_entropy - batch.old_entropy[batch.mask].min(), 0)"
        ".sum(1, keepdim=True).div(batch.mask.sum(1, keepdim=True).clamp(min=1))"
        ".expand(batch.mask.shape)[batch.mask]) / spread, 0)",
    ),
    Mutation(
        "aepo",
        "a child forgets its chain of forks",
        FORKS,
        "self._run[child] = self._run.get(parent, 0)",
        "self._run[child] = 0",
    ),
    Mutation(
        "aepo",
        "scheduler's memory not in the recipe's state",
        "algorithms/recipe.py",
        'return state if self.branching is None else state | {"branching": self.branching.state_dict()}',
        "return state",
    ),
    Mutation("empg", "sign of k", SHAPE, "torch.exp(-k * entropy)", "torch.exp(k * entropy)"),
    Mutation(
        "empg",
        "gradient through the plan",
        "algorithms/recipe.py",
        "    @torch.no_grad()\n    def plan(",
        "    def plan(",
    ),
    Mutation(
        "empg",
        "mean over one trajectory's steps, not the batch's",
        SHAPE,
        "scale = certainty / certainty.mean()",
        "scale = certainty / torch.stack([certainty[cells.trajectory == t].mean() for t in cells.trajectory])",
    ),
    Mutation(
        "empg",
        "bonus of a step's own entropy, not the next one's",
        SHAPE,
        "torch.exp(-k_future * entropy.roll(-1))",
        "torch.exp(-k_future * entropy)",
    ),
    Mutation(
        "empg",
        "a bonus after the last step",
        SHAPE,
        "bonus = torch.where(follows & paid,",
        "bonus = torch.where(paid,",
    ),
)


def copy_package(target: Path) -> None:
    """Copy what the tests need; the root of the copy is the package."""
    target.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".txt") or path.name == "README.md":
            shutil.copy2(path, target / path.name)
    links = target / ".links"
    links.mkdir()
    (links / "agentropy").symlink_to(target)


def failing(copy: Path, method: str) -> str | None:
    """The first failing test of the method in the copy, or None."""
    environment = os.environ | {"PYTHONPATH": str(copy / ".links"), "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    for arguments in TESTS[method]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments.split(" ", 2)]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return (
                lines[0] if lines else f"pytest ended with {done.returncode}: {done.stdout[-400:]}{done.stderr[-400:]}"
            )
    return None


def main() -> int:
    """Run the chosen mutations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(TESTS), action="append", help="only these methods")
    chosen = parser.parse_args().method or sorted(TESTS)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy_package(copy)
        for method in chosen:
            if (failure := failing(copy, method)) is not None:
                print(f"the untouched copy fails: {failure}")
                return 1
            for mutation in (entry for entry in MUTATIONS if entry.method == method):
                path = copy / mutation.file
                text = path.read_text(encoding="utf-8")
                if text.count(mutation.old) != 1:
                    raise SystemExit(
                        f"{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, not once"
                    )
                path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
                started = time.perf_counter()
                failure = failing(copy, method)
                path.write_text(text, encoding="utf-8")
                unnoticed += failure is None
                seconds = time.perf_counter() - started
                print(f"{method:5} {mutation.mistake:55} {failure or 'NOT NOTICED'} ({seconds:.0f} s)", flush=True)
    print(f"{unnoticed} unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

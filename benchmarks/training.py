"""How fast an update is, and how much memory it takes, when shared prefixes are computed once.

``python -m agentropy.benchmarks.training`` makes one GRPO update of the same trees with every variant, each in a
process of its own, variants in turn within each repetition so that a noisy machine disturbs all alike. It checks that
all variants find the same loss and gradient norm, prints medians and writes JSON.

- *unique tokens*: what ``agentropy train`` does: trees packed depth first, only action tokens through the head, and
  the fused head where the logits would be large.
- *unique, naive head*: the same with materialised logits.
- *rows*: every branch alone, padded rows, only action tokens through the head.
- *rows, all logits*: every branch alone, logits of every token, ``log_softmax``: what a plain training loop does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .machine import describe_machine, summary

UNIQUE, UNIQUE_NAIVE, ROWS, ALL_LOGITS = "unique tokens", "unique, naive head", "rows", "rows, all logits"
VARIANTS = (UNIQUE, UNIQUE_NAIVE, ROWS, ALL_LOGITS)
MODELS: dict[str, dict[str, int]] = {
    "small": {"vocabulary": 1188, "hidden": 128, "layers": 4, "heads": 4, "kv_heads": 4, "intermediate": 384},
    "smollm2-6": {"vocabulary": 49152, "hidden": 576, "layers": 6, "heads": 9, "kv_heads": 3, "intermediate": 1536},
    "smollm2-30": {"vocabulary": 49152, "hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate": 1536},
}
"""Random weights; the default model, and SmolLM2-135M with 6 and with all of its 30 layers."""


def star(prefix: int, branches: int, suffix: int, vocabulary: int) -> Any:
    """A prompt, and ``branches`` actions of equal length."""
    from ..agents.tree import Trajectory, Tree

    random, tree = np.random.default_rng(0), Tree("star", "train")
    root = tree.add(-1, "prompt", random.integers(8, vocabulary, prefix))
    for branch in range(branches):
        leaf = _action(tree, root, suffix, vocabulary, random, turn=0)
        tree.nodes[leaf].reward = float(branch % 2)
        tree.trajectories.append(Trajectory(leaves=(leaf,), reward=float(branch % 2), turns=1))
    return tree


def episodes(members: int, turns: int, vocabulary: int, forks: bool) -> Any:
    """An agent's group: a prompt of 60, then observations of 12 and actions of 6 tokens.

    With ``forks``, members leave an earlier one at a random turn, as ARPO's do; else they share the prompt alone.
    """
    from ..agents.tree import Trajectory, Tree

    random, tree = np.random.default_rng(1), Tree("group", "train")
    root = tree.add(-1, "prompt", random.integers(8, vocabulary, 60))
    walks: list[list[int]] = []
    for member in range(members):
        begin = forks and member >= members // 2
        parent = walks[int(random.integers(len(walks)))] if begin else []
        walk = list(parent[: 2 * int(random.integers(1, turns))])
        for turn in range(len(walk) // 2, turns):
            action = _action(tree, walk[-1] if walk else root, 6, vocabulary, random, turn)
            seen = tree.add(action, "observation", random.integers(8, vocabulary, 12), turn=turn)
            walk += [action, seen]
        reward = float(member % 2)
        tree.trajectories.append(Trajectory(leaves=(walk[-2],), reward=reward, turns=turns))
        walks.append(walk)
    return tree


def _action(tree: Any, parent: int, length: int, vocabulary: int, random: np.random.Generator, turn: int) -> int:
    numbers = random.normal(-2.0, 0.5, length)
    index: int = tree.add(
        parent,
        "action",
        random.integers(8, vocabulary, length),
        sampled=True,
        logprobs=numbers,
        entropies=np.abs(numbers),
        turn=turn,
    )
    return index


SHAPES: dict[str, tuple[str, Callable[[int], list[Any]]]] = {
    "star": ("prefix 1000 + 8 x 100", lambda vocabulary: [star(1000, 8, 100, vocabulary)]),
    "grpo": ("8 episodes of 25 turns, shared prompt", lambda vocabulary: [episodes(8, 25, vocabulary, False)]),
    "arpo": ("8 episodes of 25 turns, 4 of them forked", lambda vocabulary: [episodes(8, 25, vocabulary, True)]),
}


def work(shape: str, model_name: str, variant: str, threads: int) -> None:
    """Answer each line of standard input with an update: seconds, peak memory, loss and gradient norm."""
    import torch
    from torch import Tensor, nn

    from ..agents.models import build_small_model
    from ..algorithms import Minibatch, forward, learner, recipe

    torch.set_num_threads(threads)
    model = build_small_model(
        MODELS[model_name]["vocabulary"],
        **{name: size for name, size in MODELS[model_name].items() if name != "vocabulary"},
    )
    config = learner.LearnerConfig(
        lr=0.0, micro_batch_tokens=1 << 20, clip_norm=math.inf, unique_tokens=variant in (UNIQUE, UNIQUE_NAIVE)
    )
    batch = Minibatch.from_trees(SHAPES[shape][1](MODELS[model_name]["vocabulary"]))
    if variant in (UNIQUE_NAIVE, ROWS):
        forward._MATERIALISED = 1 << 62
    if variant == ALL_LOGITS:

        def plain(model: nn.Module, tokens: Tensor, mask: Tensor, **_options: Any) -> tuple[Tensor, Tensor]:
            table = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[:, :-1].float(), -1)
            logprobs = table.gather(2, tokens[:, 1:, None])[..., 0]
            entropy = -(table.exp() * table).sum(-1)
            zero = torch.zeros(len(tokens), 1)
            return (
                torch.cat((zero, logprobs), 1) * mask,
                torch.cat((zero, entropy), 1) * mask,
            )

        learner.token_statistics = plain  # type: ignore[assignment]
    trainer = learner.Learner(model, recipe("grpo"), config)
    small = Minibatch.from_trees([star(8, 2, 4, MODELS[model_name]["vocabulary"])])
    trainer.update(small)  # what is made once: the optimiser's state, the probe of the attention
    for _line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        started = time.perf_counter()
        metrics = trainer.update(batch)
        seconds = time.perf_counter() - started
        found = {name: metrics[name] for name in ("loss", "grad_norm", "tokens/unique_ratio")}
        print(json.dumps({"seconds": seconds, "peak_mb": (_status("VmHWM") - before) / 1024, **found}), flush=True)


def _status(name: str) -> int:
    """A line of the process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(shape: str, model: str, repetitions: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians per variant, and how much slower and larger than unique tokens each is."""
    command = [sys.executable, "-m", "agentropy.benchmarks.training", "--threads", str(threads), "--work"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "MALLOC_TRIM_THRESHOLD_": "0"}
    workers = {
        variant: subprocess.Popen(
            [*command, shape, model, variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for variant in VARIANTS
    }
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    try:
        for repetition in range(repetitions + 1):
            for variant, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise RuntimeError(f"the process of '{variant}' ended with {worker.wait()}")
                if repetition:
                    found[variant].append(json.loads(answer))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    best = found[UNIQUE]
    return {
        variant: {
            **{name: statistics.median(row[name] for row in rows) for name in rows[0]},
            "slower": statistics.median(row["seconds"] / own["seconds"] for row, own in zip(rows, best, strict=True)),
            "larger": statistics.median(row["peak_mb"] / own["peak_mb"] for row, own in zip(rows, best, strict=True)),
        }
        for variant, rows in found.items()
    }


def show(console: Console, title: str, results: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in ("seconds", "slower", "peak\nMB", "larger", "tokens\ncomputed", "gradient\nnorm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant, row in results.items():
        share = row["tokens/unique_ratio"]
        table.add_row(
            variant,
            f"{row['seconds']:.2f}",
            f"{row['slower']:.2f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['larger']:.2f}",
            f"{share:.0%}",
            f"{row['grad_norm']:.6f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 when variants disagree on the loss or the gradient."""
    parser = argparse.ArgumentParser(prog="agentropy.benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["smollm2-6", "small"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--work", nargs=3, metavar=("SHAPE", "MODEL", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        shape, model, variant = options.work
        work(shape, model, variant, options.threads)
        return 0
    machine = describe_machine(("torch", "transformers")) | {"threads": options.threads}
    console = Console()
    console.print(summary(machine))
    console.print(f"float32, {options.threads} threads, one GRPO update, {options.repetitions} repetitions")
    measured, disagree = [], False
    for model in options.model:
        for shape in options.shape:
            results = measure(shape, model, options.repetitions, options.threads)
            show(console, f"{model}: {SHAPES[shape][0]}", results)
            measured.append({"model": model, "shape": shape, "results": results})
            norms = [row["grad_norm"] for row in results.values()]
            disagree |= max(norms) - min(norms) > 1e-3 * max(norms)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "models": MODELS, "repetitions": options.repetitions, "measured": measured}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"written to {options.out}")
    return int(disagree)


if __name__ == "__main__":
    raise SystemExit(main())

